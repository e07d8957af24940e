"""Checkpoints of partial training: resumed bit for bit, the frozen part once, and opened as any other network's."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from exports import run_directory
from published import Run
from safetensors.torch import load_file
from test_checkpoint import assert_same_run, eventful_config, run_to, state_at
from tiny import NUM_IMAGES, TINY_RESNET, tiny_config
from tiny_states import after, same, save, weights
from torch import Tensor, nn

from dinoray.jobs.runs.open_checkpoint import open_network
from dinoray.models.errors import ConfigError, DataError
from dinoray.pipeline.export.weights import export_official, export_state_dict
from dinoray.pipeline.training.checkpoint import FrozenBackbone, load_checkpoint, read_frozen
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.init_weights import load_initial_weights, read_weights
from dinoray.pipeline.training.state import TrainState, build_state

LAST: dict[str, Any] = {"drop_path_rate": 0.5, "train": "last_n(1)"}
LORA: dict[str, Any] = {"drop_path_rate": 0.5, "train": "lora(4)"}
PARTS = {"last_n": LAST, "resnet": {**TINY_RESNET, **LAST}, "lora": LORA}


@pytest.fixture(scope="module", params=PARTS)
def state(request: pytest.FixtureRequest) -> TrainState:
    return state_at(3, eventful_config(backbone=PARTS[request.param]))


@pytest.fixture
def folder(state: TrainState, tmp_path: Path) -> Path:
    return save(state, tmp_path / "checkpoint")


def output(network: nn.Module | FrozenBackbone) -> Tensor:
    backbone = network.backbone() if isinstance(network, FrozenBackbone) else network
    with torch.no_grad():
        return backbone.eval()(torch.linspace(-1, 1, 2 * 3 * 256).reshape(2, 3, 16, 16))


def begun_from(path: Path, load: Literal["weights", "run"], **backbone: Any) -> tuple[TrainState, list[str]]:
    """A new run that starts from a checkpoint, and the lines about it."""
    begun = build_state(tiny_config(backbone=backbone), num_images=NUM_IMAGES)
    return begun, load_initial_weights(begun, read_weights(str(path)), load)


@pytest.mark.parametrize(("part", "optimizer"), [("last_n", "adamw"), ("resnet", "lars"), ("lora", "adamw")])
def test_a_resumed_run_equals_the_one_that_was_not_stopped(part: str, optimizer: str, tmp_path: Path) -> None:
    config = eventful_config(backbone=PARTS[part], optim={"name": optimizer, "layer_decay": 0.7})
    whole = state_at(2, config)
    resumed = build_state(config, num_images=NUM_IMAGES)
    torch.rand(2)
    load_checkpoint(resumed, save(whole, tmp_path))
    for each in (whole, resumed):
        run_to(each, 4)
    assert_same_run(resumed, whole)
    student, teacher = (dict(n.named_parameters()) for n in (resumed.dino.student, resumed.dino.teacher))
    assert all(student[name] is teacher[name] for name in resumed.dino.shared & student.keys())


def test_the_frozen_part_is_in_the_teachers_file_alone(state: TrainState, folder: Path) -> None:
    student, teacher = (load_file(folder / f"{which}.safetensors") for which in ("student", "teacher"))
    assert same(teacher, state.dino.teacher.state_dict())
    assert student.keys() == teacher.keys() - state.dino.shared
    assert state.dino.shared
    moments = torch.load(folder / "train_state.pt", weights_only=True)["optimizer"]["state"]
    trained = [p for p in state.dino.student.parameters() if p.requires_grad]
    assert len(moments) == len(trained)
    size = sum((folder / f"{which}.safetensors").stat().st_size for which in ("student", "teacher"))
    plain = 2 * sum(x.nbytes for x in teacher.values())
    assert size < plain - sum(teacher[name].nbytes for name in state.dino.shared) + 20_000  # headers


def test_an_opened_checkpoint_is_a_network_without_adapters(
    state: TrainState, folder: Path, tmp_path: Path
) -> None:
    run_directory(tmp_path / "run", state)
    plain = build_state(
        DINOConfig.model_validate(
            {**state.config.model_dump(), "backbone": {**state.config.backbone.model_dump(), "train": "all"}}
        ),
        num_images=NUM_IMAGES,
    )
    names = plain.dino.teacher.backbone.state_dict().keys()
    for which, network in (("teacher", state.dino.teacher), ("student", state.dino.student)):
        opened = read_frozen(folder, which)  # type: ignore[arg-type]
        assert opened.weights.keys() == names
        assert torch.equal(output(opened), output(network.backbone))
        again = open_network(str(tmp_path / "run"), None, which).network  # type: ignore[arg-type]
        assert same(again.weights, opened.weights)
    exported = tmp_path / "x.pth"
    exported.write_bytes(export_state_dict(read_frozen(folder)))
    assert same(torch.load(exported), read_frozen(folder).weights)
    state.dino.train()


def test_weights_of_any_part_begin_a_run_of_any_part(state: TrainState, folder: Path) -> None:
    kept = {k: v for k, v in state.config.backbone.model_dump().items() if k in ("name", "kwargs")}
    parts = ("all", "last_n(1)") if "resnet" in kept["name"] else ("all", "last_n(1)", "lora(2)")
    for part in parts:
        begun, lines = begun_from(folder, "weights", **kept, train=part)
        teacher = output(state.dino.teacher.backbone)
        assert torch.equal(output(begun.dino.teacher.backbone), teacher)
        student = output(state.dino.student.backbone)
        from_teacher = any("begins as the teacher's" in line for line in lines)
        assert torch.equal(output(begun.dino.student.backbone), teacher if from_teacher else student)
        # Merged adapters differ in student and teacher, where the new run has one frozen part.
        assert from_teacher == (part != "all" and "lora" in state.config.backbone.train + part)
    state.dino.train()


def test_a_run_begun_with_the_same_part_continues_it(state: TrainState, folder: Path) -> None:
    begun = build_state(state.config, num_images=NUM_IMAGES)
    lines = load_initial_weights(begun, read_weights(str(folder)), "run")
    assert any("optimizer state of" in line for line in lines)
    assert same(weights(begun), weights(state))
    assert begun.optimizer.state_dict()["state"].keys() == state.optimizer.state_dict()["state"].keys()


def test_a_run_begun_with_another_part_has_fresh_moments(folder: Path, state: TrainState) -> None:
    kept = {k: v for k, v in state.config.backbone.model_dump().items() if k in ("name", "kwargs")}
    part = state.config.backbone.train
    _, lines = begun_from(folder, "run", **kept, train="all")
    assert any(
        f"because backbone.train=all is {part} there; set backbone.train={part}" in line for line in lines
    )


def test_another_part_cannot_resume_a_checkpoint(state: TrainState, folder: Path) -> None:
    kept = {k: v for k, v in state.config.backbone.model_dump().items() if k in ("name", "kwargs")}
    other = build_state(eventful_config(backbone={**kept, "drop_path_rate": 0.5}), num_images=NUM_IMAGES)
    part = state.config.backbone.train
    with pytest.raises(DataError) as error:
        load_checkpoint(other, folder)
    assert str(error.value).endswith(f"; set backbone.train={part}")


@pytest.mark.parametrize("part", ["last_n(1)", "lora(4)"])
def test_the_published_code_resumes_an_exported_checkpoint(part: str, tmp_path: Path) -> None:
    head = {"out_dim": 32, "hidden_dim": 48, "bottleneck_dim": 16}
    state = after(12, backbone={"pos_embed": "official", "train": part}, head=head)
    run = Run()
    assert run.restart(export_official(save(state, tmp_path))) == 1
    x = torch.randn(3, 3, 8, 8)
    for ours, theirs in zip((state.dino.student, state.dino.teacher), run.networks, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(theirs.eval()(x), ours.eval()([x]).logits, rtol=1e-4, atol=1e-5)
    restored = {k for k, p in run.networks[0].named_parameters() if run.optimizer.state.get(p)}
    own = {k for k, p in state.dino.student.named_parameters() if p.requires_grad and "lora" not in k}
    assert restored == own
    run.train(1)


def test_a_students_file_alone_is_refused_and_the_teachers_is_whole(state: TrainState, folder: Path) -> None:
    kept = {k: v for k, v in state.config.backbone.model_dump().items() if k in ("name", "kwargs")}
    with pytest.raises(
        ConfigError, match=r"lacks the part .*; pass the checkpoint's folder, (\S+)$"
    ) as error:
        begun_from(folder / "student.safetensors", "weights", **kept)
    begun_from(Path(str(error.value).rpartition(" ")[2]), "weights", **kept)
    begun, _ = begun_from(folder / "teacher.safetensors", "weights", **kept)
    assert torch.equal(output(begun.dino.student.backbone), output(state.dino.teacher.backbone))
    state.dino.train()
