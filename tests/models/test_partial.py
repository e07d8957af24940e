"""Partial training: what trains, what is frozen and shared, and adapters that are equal to merged weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from remedies import settings_to_set
from tiny import TINY_RESNET, tiny_batch
from tiny_states import after
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models.backbone import build_backbone
from dinoray.models.compiled import num_graphs
from dinoray.models.config import BackboneConfig, TrainedPart
from dinoray.models.errors import ConfigError
from dinoray.models.lora import ALPHA, is_adapter, merged
from dinoray.models.partial import freeze
from dinoray.pipeline.training.state import TrainState
from dinoray.pipeline.training.step import train_step

VIT: dict[str, Any] = {"drop_path_rate": 0.5}
LAST, RESNET_LAST = (
    {**VIT, "train": "last_n(1)"},
    {**TINY_RESNET, "drop_path_rate": 0.5, "train": "last_n(1)"},
)
LORA = {**VIT, "train": "lora(4)"}
PARTS = pytest.mark.parametrize("backbone", [LAST, RESNET_LAST, LORA], ids=["last_n", "resnet", "lora"])


def images(num_images: int = 3, size: int = 16) -> Tensor:
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained_names(state: TrainState) -> set[str]:
    """Names of the backbone's parameters that the optimiser has."""
    trained = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    return {name for name, p in state.dino.student.backbone.named_parameters() if id(p) in trained}


def with_adapters_moved(state: TrainState) -> TrainState:
    """Adapters after a long training: B of the size of A."""
    for network in (state.dino.student, state.dino.teacher):
        for name, p in network.named_parameters():
            if name.endswith("lora_b"):
                nn.init.normal_(p, std=0.2)
    return state


def test_a_part_is_read_from_its_text() -> None:
    assert TrainedPart.parse("all") == ("all", 0)
    assert TrainedPart.parse("last_n(12)") == ("last_n", 12)
    assert BackboneConfig(train="lora(8)").trained_part == ("lora", 8)
    for text in ("", "last_n", "last_n(0)", "last_n(-1)", "lora(1.5)", "lora(8) ", "lora(08)", "none"):
        with pytest.raises(ValueError, match=r"must be all, last_n\(BLOCKS\) or lora\(RANK\)"):
            BackboneConfig(train=text)


@pytest.mark.parametrize(
    ("backbone", "trained", "frozen_modules"),
    [
        (LAST, ("blocks.1.", "norm."), {"patch_embed", "blocks.0"}),
        ({**VIT, "train": "last_n(2)"}, ("blocks.", "norm."), {"patch_embed"}),
        (RESNET_LAST, ("layer4.0.",), {"conv1", "bn1", "layer1", "layer2", "layer3"}),
    ],
)
def test_the_last_blocks_and_what_follows_them_train(
    backbone: dict[str, Any], trained: tuple[str, ...], frozen_modules: set[str]
) -> None:
    state = after(0, backbone=backbone)
    student = state.dino.student.backbone
    assert trained_names(state) == {k for k, _ in student.named_parameters() if k.startswith(trained)}
    assert {name.removesuffix(".0") if "conv1" in name else name for name in student.frozen_modules} == (
        frozen_modules
    )


def test_registers_and_norms_before_the_blocks_are_frozen() -> None:
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, reg_tokens=2, pre_norm=True, fc_norm=True, **kwargs
    )
    freeze(network, BackboneConfig(train="last_n(1)"), crop_size=16)
    trained = {k for k, p in network.named_parameters() if p.requires_grad}
    assert {k for k in trained if not k.startswith("blocks.1.")} == {"fc_norm.weight", "fc_norm.bias"}


@PARTS
def test_only_the_part_changes_in_steps_and_the_rest_stays_in_eval_mode(backbone: dict[str, Any]) -> None:
    state = after(0, backbone=backbone)
    before = {k: v.clone() for k, v in state.dino.state_dict().items()}
    config = state.config
    for seed in range(2):
        train_step(state, tiny_batch(config, seed=seed))
        state.dino.teacher.backbone.eval().train()  # as an evaluation does
        state.dino.train()
    changed = {k for k, v in state.dino.state_dict().items() if not torch.equal(v, before[k])}
    trained = trained_names(state)
    moved = {k.removeprefix("student.backbone.") for k in changed if k.startswith("student.backbone.")}
    counters = {k for k, _ in state.dino.student.backbone.named_buffers() if k.startswith("layer4.")}
    assert moved == trained | counters
    assert {k.removeprefix("teacher.backbone.") for k in changed if "teacher.backbone." in k} == moved
    for network in (state.dino.student, state.dino.teacher):
        for name in network.backbone.frozen_modules:
            assert not any(m.training for m in network.backbone.get_submodule(name).modules())
    assert any(m.training for m in state.dino.student.backbone.modules())


@PARTS
def test_the_frozen_part_is_one_in_memory(backbone: dict[str, Any]) -> None:
    dino = after(1, backbone=backbone).dino
    student, teacher = (dict(n.named_parameters()) for n in (dino.student, dino.teacher))
    same = {k for k in student if student[k].data_ptr() == teacher[k].data_ptr()}
    frozen = {k for k, p in student.items() if k.startswith("backbone.") and not p.requires_grad}
    assert same == frozen
    assert frozen

    def held(*tensors: Tensor) -> int:
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    both = held(*student.values(), *teacher.values())
    assert both == 2 * held(*student.values()) - held(*(student[k] for k in frozen))


def test_no_gradient_passes_a_frozen_block() -> None:
    state = after(0, backbone={**LAST, "drop_path_rate": 0.0})
    backbone = state.dino.student.backbone
    passed: list[int] = []
    for number, block in enumerate(backbone.blocks):
        block.register_forward_hook(
            lambda _m, _i, out, n=number: passed.append(n) if out.requires_grad else None
        )
    train_step(state, tiny_batch(state.config))
    assert set(passed) == {1}


@PARTS
def test_recomputed_activations_change_nothing(backbone: dict[str, Any]) -> None:
    plain, full = (
        after(2, backbone=backbone, train={"activation_checkpointing": m}) for m in ("none", "full")
    )
    theirs = full.dino.state_dict()
    assert all(torch.equal(x, theirs[k]) for k, x in plain.dino.state_dict().items())


@PARTS
def test_several_processes_exchange_gradients_of_the_part_alone(
    backbone: dict[str, Any], tmp_path: Path
) -> None:
    plain, state = after(2, backbone=backbone), after(0, backbone=backbone)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        state.student = DistributedDataParallel(state.dino.student)
        for seed in range(2):
            train_step(state, tiny_batch(state.config, seed=seed))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(state.dino.state_dict(), plain.dino.state_dict(), rtol=1e-3, atol=1e-5)


def test_adapters_are_compiled_with_their_blocks() -> None:
    backbone, crops = {**LORA, "drop_path_rate": 0.0}, {"num_local_crops": 0}
    state = after(0, backbone=backbone, crops=crops, train={"compile": "on"})
    plain = after(2, backbone=backbone, crops=crops)
    state.compile(backend="eager")
    before = num_graphs()
    metrics = [train_step(state, tiny_batch(state.config, seed=seed)) for seed in range(2)]
    # Of the student's first block, whose input needs no gradient, of its others, and of the teacher, which merges; 6
    # of the loss.
    assert num_graphs() - before == 3 + 6
    assert metrics[1]["recompiled_graphs"] == 0
    torch.testing.assert_close(state.dino.state_dict(), plain.dino.state_dict(), rtol=1e-3, atol=1e-5)


# Adapters


def test_adapters_are_on_the_linear_layers_of_blocks_and_begin_at_zero() -> None:
    state = after(0, backbone=LORA)
    layers = {k.rpartition(".")[0] for k in trained_names(state)}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == {f"blocks.{i}.{kind}" for i in range(2) for kind in kinds}
    for name, p in state.dino.student.backbone.named_parameters():
        if name.endswith("lora_a"):  # Kaiming: uniform within 1 / sqrt(in)
            assert p.shape == (4, p.shape[1])
            assert 0.8 * p.shape[1] ** -0.5 < float(p.detach().abs().max()) <= p.shape[1] ** -0.5
        elif name.endswith("lora_b"):
            assert not p.any()


def test_new_adapters_leave_the_network_as_it_is_bit_for_bit() -> None:
    plain, lora = after(0), after(0, backbone=LORA)
    backbone, x = lora.dino.student.backbone.eval(), images()
    expected = plain.dino.student.backbone.eval()(x)
    assert torch.equal(backbone(x), expected)
    with torch.no_grad():
        assert torch.equal(backbone(x), expected)


def test_merged_weights_equal_adapters() -> None:
    state = with_adapters_moved(after(0, backbone=LORA))
    backbone, x = state.dino.student.backbone.eval(), images()
    plain = build_backbone(state.config.backbone, crop_sizes=(16, 8), drop_path_rate=0.0).eval()
    weights = merged(backbone.state_dict())
    plain.load_state_dict(weights)
    apart = (plain(x) - backbone(x)).abs().max()
    assert apart < 1e-6 * max(1, float(plain(x).detach().abs().max()))
    with torch.no_grad():
        assert torch.equal(backbone(x), plain(x))
    assert merged(weights) == weights  # nothing is left to merge
    layer = backbone.blocks[0].attn.proj
    change = (ALPHA / 4) * layer.lora_b.double() @ layer.lora_a.double()
    torch.testing.assert_close(weights["blocks.0.attn.proj.weight"].double(), layer.weight.double() + change)
    # The adapters matter.
    plain.load_state_dict({k: v for k, v in backbone.state_dict().items() if not is_adapter(k)})
    assert (plain(x) - backbone(x)).abs().max() > 1e-2


def test_under_autocast_the_merged_weight_is_rounded_once() -> None:
    state = with_adapters_moved(after(0, backbone=LORA))
    backbone, x = state.dino.teacher.backbone, images()
    plain = build_backbone(state.config.backbone, crop_sizes=(16, 8), drop_path_rate=0.0).eval()
    plain.load_state_dict(merged(backbone.state_dict()))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone(x), plain(x))


@pytest.mark.parametrize(
    ("name", "kwargs", "train", "why"),
    [
        ("resnet10t", TINY_RESNET["kwargs"], "lora(2)", "resnet10t has no attention in its blocks"),
        ("convnext_atto", {"depths": [1] * 4, "dims": [8] * 4}, "lora(2)", "has no attention in its blocks"),
        ("resnet10t", TINY_RESNET["kwargs"], "last_n(5)", "resnet10t has 4 blocks"),
        ("vit_tiny_patch16_224", {"embed_dim": 16, "num_heads": 2, "depth": 2}, "lora(17)", "at most 16"),
        (
            "beit_base_patch16_224",
            {"embed_dim": 16, "num_heads": 2, "depth": 2},
            "lora(2)",
            r"reads the weights of blocks\.0\.attn\.qkv itself",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(
    name: str, kwargs: dict[str, Any], train: str, why: str
) -> None:
    def try_part(train: str) -> None:
        config = BackboneConfig(name=name, kwargs=kwargs, train=train)
        network = build_backbone(
            config, crop_sizes=(32,) if "beit" not in name else (224,), drop_path_rate=0.0
        )
        freeze(network, config, crop_size=32 if "beit" not in name else 224)

    with pytest.raises(ConfigError, match=why) as error:
        try_part(train)
    assert "\n" not in str(error.value)
    (setting,) = settings_to_set(str(error.value))
    try_part(setting.removeprefix("backbone.train="))


def test_a_backbone_without_known_blocks_has_no_last_ones() -> None:
    with pytest.raises(ConfigError, match=r"whose blocks timm tells apart.*; set backbone\.train=all$"):
        freeze(nn.Linear(2, 2), BackboneConfig(train="last_n(1)"), crop_size=8)
