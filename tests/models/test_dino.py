"""Student and teacher start as one, the teacher follows by averages alone, crops keep their order."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY_RESNET, tiny_batch, tiny_config
from torch import Tensor, nn

from dinoray.models.config import TeacherConfig
from dinoray.models.dino import DINO, MultiCropNet, crop_major
from dinoray.pipeline.training.state import build_state


def tiny_dino(**changes: dict[str, Any]) -> Any:
    config = tiny_config(**changes)
    torch.manual_seed(0)
    return DINO(config.backbone, config.head, crop_sizes=(16, 8))


def resnet_dino() -> Any:
    return tiny_dino(backbone=TINY_RESNET)


def images(num_images: int = 4, size: int = 16) -> Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def scramble(network: nn.Module) -> None:
    """Move every parameter, as training would."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))


@pytest.mark.parametrize("changes", [{}, {"head": {"use_bn": True, "norm_last_layer": False}}])
def test_student_and_teacher_start_bit_identical_head_included(changes: dict[str, dict[str, Any]]) -> None:
    dino = tiny_dino(**changes)
    student, teacher = dino.student.state_dict(), dino.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert any(name.startswith("head.last_layer") for name in student)
    assert all(torch.equal(student[name], teacher[name]) for name in student)


def test_student_and_teacher_share_no_memory() -> None:
    dino = resnet_dino()
    student = {x.untyped_storage().data_ptr() for x in [*dino.student.parameters(), *dino.student.buffers()]}
    teacher = {x.untyped_storage().data_ptr() for x in [*dino.teacher.parameters(), *dino.teacher.buffers()]}
    assert not student & teacher


def test_the_teacher_is_never_trained_by_gradients() -> None:
    state = build_state(tiny_config(head={"norm_last_layer": False}), num_images=40)
    dino = state.dino
    optimized = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert not any(p.requires_grad for p in dino.teacher.parameters())
    assert optimized == {id(p) for p in dino.student.parameters()}
    assert not dino.teacher_output(images().requires_grad_()).logits.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_teacher_is_the_moving_average_of_each_parameter(momentum: float) -> None:
    dino = tiny_dino(head={"norm_last_layer": False})
    scramble(dino.student)
    old = {name: p.detach().double() for name, p in dino.teacher.named_parameters()}
    student = {name: p.detach().clone() for name, p in dino.student.named_parameters()}
    dino.update_teacher(momentum, torch.tensor(True))
    for name, p in dino.teacher.named_parameters():
        expected = momentum * old[name] + (1 - momentum) * student[name].double()
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, student[name]) for name, p in dino.student.named_parameters())


def test_at_a_momentum_of_one_the_teacher_stays_bit_for_bit() -> None:
    dino = tiny_dino()
    scramble(dino.student)
    before = {name: p.detach().clone() for name, p in dino.teacher.named_parameters()}
    dino.update_teacher(1.0, torch.tensor(True))
    assert all(torch.equal(p, before[name]) for name, p in dino.teacher.named_parameters())


def test_batch_statistics_are_the_teachers_own() -> None:
    dino = resnet_dino()
    dino.student([10 * images()])
    dino.update_teacher(0.0, torch.tensor(True))
    norm = next(name for name, m in dino.student.named_modules() if isinstance(m, nn.BatchNorm2d))
    student, teacher = dino.student.get_submodule(norm), dino.teacher.get_submodule(norm)
    assert student.running_mean.any()
    assert not teacher.running_mean.any()
    dino.teacher_output(images())
    assert teacher.running_mean.any()


def test_stochastic_depth_is_the_students_alone() -> None:
    dino, x = tiny_dino(backbone={"drop_path_rate": 0.5}), images(16)
    assert dino.training
    assert torch.equal(dino.teacher_output(x).logits, dino.teacher_output(x).logits)
    assert not torch.equal(dino.student([x]).logits, dino.student([x]).logits)


def test_stochastic_depth_is_the_students_alone_with_batch_norm_too() -> None:
    dino, x = tiny_dino(backbone=TINY_RESNET | {"drop_path_rate": 0.9}), images(16)
    for m in dino.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)  # the last one of a block starts at 0 and would hide what is dropped
    assert torch.equal(dino.teacher_output(x).logits, dino.teacher_output(x).logits)
    assert not torch.equal(dino.student([x]).logits, dino.student([x]).logits)


def test_without_stochastic_depth_the_student_repeats_itself() -> None:
    dino, x = tiny_dino(), images(16)
    assert torch.equal(dino.student([x]).logits, dino.student([x]).logits)


def test_a_teacher_with_batch_norm_normalises_by_its_own_batch_while_training() -> None:
    dino, x = resnet_dino(), images(8)
    alone = dino.teacher_output(x[:4]).logits
    assert not torch.allclose(dino.teacher_output(x).logits[:4], alone, atol=1e-3)
    dino.eval()
    torch.testing.assert_close(
        dino.teacher_output(x).logits[:4], dino.teacher_output(x[:4]).logits, rtol=1e-4, atol=1e-5
    )


def test_a_teacher_without_batch_norm_never_leaves_eval_mode() -> None:
    dino = tiny_dino()
    for mode in (True, False, True):
        dino.train(mode)
        assert dino.student.training is mode
        assert not any(m.training for m in dino.teacher.modules())


def test_the_center_is_a_float32_buffer_outside_of_the_networks() -> None:
    dino = tiny_dino()
    assert dict(dino.named_buffers())["center"].dtype == torch.float32
    assert dino.center.tolist() == [0.0] * 32
    assert not any("center" in name for name in [*dino.student.state_dict(), *dino.teacher.state_dict()])


def test_crop_c_of_image_b_becomes_row_c_times_num_images_plus_b() -> None:
    num_images, num_crops = 3, 2
    crops = torch.empty(num_images, num_crops, 4, 5, 3)
    for b in range(num_images):
        for c in range(num_crops):
            crops[b, c] = 10 * b + c
    rows = crop_major(crops)
    assert rows.shape == (6, 3, 4, 5)
    assert rows[:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21]
    for b in range(num_images):
        for c in range(num_crops):
            assert (rows[c * num_images + b] == 10 * b + c).all()


def test_crop_major_moves_channels_before_rows_and_columns() -> None:
    image = torch.from_numpy(np.arange(2 * 4 * 3).reshape(1, 1, 2, 4, 3))
    rows = crop_major(image)
    for y in range(2):
        for x in range(4):
            for channel in range(3):
                assert rows[0, channel, y, x] == image[0, 0, y, x, channel]


class CountedBackbone(nn.Module):
    """Mean of each channel, and a list of what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return x.mean(dim=(2, 3))


def test_there_is_one_backbone_forward_per_resolution_and_one_of_the_head() -> None:
    backbone, head = CountedBackbone(), CountedHead()
    MultiCropNet(backbone, head)([images(4, 16), images(12, 8)])
    assert backbone.calls == [(4, 3, 16, 16), (12, 3, 8, 8)]
    assert head.calls == [16]


def test_local_crops_of_the_global_size_join_the_globals_and_order_is_kept() -> None:
    net = MultiCropNet(CountedBackbone(), nn.Identity())
    x = images(6, 16)
    assert torch.equal(net([x[:2], x[2:]]).logits, x.mean(dim=(2, 3)))
    assert net.backbone.calls == [(6, 3, 16, 16)]


def test_sizes_that_alternate_keep_their_order() -> None:
    net = MultiCropNet(CountedBackbone(), nn.Identity())
    parts = [images(2, 16), images(3, 8), images(1, 16)]
    expected = torch.cat([part.mean(dim=(2, 3)) for part in parts])
    assert torch.equal(net(parts).logits, expected)


class CountedHead(nn.Module):
    """Identity, and a list of how many rows it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x


def test_the_multi_crop_forward_equals_one_forward_per_crop() -> None:
    dino, batch = tiny_dino(), tiny_batch(tiny_config())
    crops = [torch.from_numpy(batch[name]).float() / 255 for name in ("global_crops", "local_crops")]
    together = dino.student([crop_major(x) for x in crops]).logits
    one_by_one = [
        dino.student.head(dino.student.backbone(x[b : b + 1, c].permute(0, 3, 1, 2)))
        for x in crops
        for c in range(x.shape[1])
        for b in range(len(x))
    ]
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_one_resolution_and_in_the_head_those_of_all_crops() -> None:
    dino = resnet_dino()
    norm = next(m for m in dino.student.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    seen: list[int] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    dino.student([images(8, 16), images(12, 8)])
    assert seen == [8, 12]
    head = tiny_dino(head={"use_bn": True}).student
    head.head.mlp[1].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    head([images(8, 16), images(12, 8)])
    assert seen == [8, 12, 20]


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_outside_of_zero_to_one_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="teacher_momentum"):
        TeacherConfig(teacher_momentum=momentum)
