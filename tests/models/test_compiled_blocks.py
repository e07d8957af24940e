"""Compiled blocks: the same numbers under the same names, few graphs, none after the first step, and who is refused.

The backend `aot_eager` captures graphs and divides them into forward and backward as the product's does, and runs them
by PyTorch's own kernels: it shows all but the generated code, which the nightly test runs.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch, tiny_config
from tiny_states import after, same, save, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dinoray.models.compiled import Compilation, compile_blocks, num_graphs
from dinoray.models.errors import ConfigError, ResourceError
from dinoray.pipeline.training.checkpoint import load_checkpoint
from dinoray.pipeline.training.rank_shares import RankShares
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.step import train_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEEP = {"kwargs": {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}}
SGD = {"name": "sgd"}
"""AdamW makes a step of the rounding of a gradient that is 0, as of the bias of keys."""


def compiled(
    *, backend: str = "aot_eager", train: dict[str, Any] | None = None, **changes: Any
) -> TrainState:
    config = tiny_config(train={"compile": "on", **(train or {})}, **changes)
    state = build_state(config, num_images=NUM_IMAGES)
    state.compile(backend=backend)
    return state


def step(state: TrainState, seed: int, **batch: int) -> dict[str, float]:
    return {
        name: float(x) for name, x in train_step(state, tiny_batch(state.config, seed=seed, **batch)).items()
    }


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_learnt_has_the_same_names_and_nearly_the_same_values() -> None:
    """Every second block recomputes its activations, and runs compiled code twice."""
    recomputed = {"activation_checkpointing": "selective"}
    plain = after(0, train=recomputed, backbone=DEEP, optim=SGD)
    state = compiled(train=recomputed, backbone=DEEP, optim=SGD)
    for seed in range(2):
        losses = [step(each, seed)["loss"] for each in (plain, state)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights(state), weights(plain), rtol=1e-3, atol=1e-5)


def test_graphs_are_few_and_those_of_the_first_step(one_process: None, tmp_path: Path) -> None:
    """Blocks with other rates of stochastic depth, microbatches, DDP; resumed in the middle."""
    torch._dynamo.reset()
    state = compiled(train={"accumulate_steps": 2}, backbone={**DEEP, "drop_path_rate": 0.3})
    state.student = DistributedDataParallel(state.dino.student)
    before = num_graphs()
    assert state.is_compiling
    assert [step(state, seed)["recompiled_graphs"] for seed in range(2)] == [0, 0]
    # Of the student's blocks with stochastic depth and without, for both sizes of crops, and of the teacher's: 5. Of
    # the loss: rows of one global crop and of the local crops, forward and backward, and 4 of the targets.
    assert num_graphs() - before == 5 + 8
    assert not state.is_compiling
    resumed = compiled(train={"accumulate_steps": 2}, backbone={**DEEP, "drop_path_rate": 0.3})
    load_checkpoint(resumed, save(state, tmp_path / "checkpoint"))
    for each in (state, resumed):
        step(each, 2)
    assert same(weights(state), weights(resumed))
    other = step(state, 3, num_images=6)
    assert other["recompiled_graphs"] > 0  # another shape is not passed over in silence


def test_outside_of_steps_blocks_are_eager() -> None:
    state = compiled()
    before = num_graphs()
    state.dino.teacher.backbone(torch.zeros(3, 3, 24, 24))
    assert num_graphs() == before
    with state.compilation.step():
        state.dino.teacher.backbone(torch.zeros(3, 3, 24, 24))
    assert num_graphs() > before


def test_stochastic_depth_keeps_the_mean_and_drops_whole_rows() -> None:
    state = compiled(backbone={"drop_path_rate": 0.25})
    path = state.dino.student.backbone.blocks[-1].drop_path1
    torch.manual_seed(0)
    rows = path(torch.ones(4000, 3))
    assert rows.unique().tolist() == [0, pytest.approx(1 / 0.75)]
    assert torch.equal(rows[:, 0], rows[:, 2])
    assert float(rows.mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(path.eval()(rows), rows)


def test_a_replay_names_compiled_blocks() -> None:
    config = tiny_config(train={"compile": "on"})
    shares = RankShares.of(after(0), 1)
    assert [line.partition(":")[0] for line in shares.inexact(config)] == ["compiled blocks"]
    assert shares.inexact(tiny_config()) == []


def test_it_is_off_on_a_cpu_unless_asked_for() -> None:
    assert compile_blocks([nn.Linear(2, 2)], "auto", CPU) == Compilation()
    assert compile_blocks([nn.Linear(2, 2)], "off", GPU) == Compilation()
    assert "recompiled_graphs" not in step(after(0), 0)


def test_a_network_without_blocks_to_compile_is_refused_with_the_remedy() -> None:
    resnet = after(0, backbone=TINY_RESNET).dino.student.backbone
    why = "ResNet has no blocks that timm tells apart and without batch norm"
    with pytest.raises(ConfigError, match=f"^train.compile=on: {why}; set train.compile=off$"):
        compile_blocks([resnet], "on", CPU)
    assert compile_blocks([resnet], "auto", GPU).note == f"train.compile=auto leaves blocks eager: {why}"


def test_without_a_compiler_it_is_refused_or_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = after(0).dino.student.backbone
    monkeypatch.setattr(shutil, "which", lambda _: None)
    why = r"PyTorch needs a C\+\+ compiler \(g\+\+\) on the PATH"
    with pytest.raises(
        ResourceError, match=f"^train.compile=on: {why}; install it, or set train.compile=off$"
    ):
        compile_blocks([vit], "on", CPU)
    found = compile_blocks([vit], "auto", GPU)
    assert not found.is_on
    needs = "PyTorch needs a C compiler (gcc), for Triton, on the PATH; install it"
    assert found.note == f"train.compile=auto leaves blocks eager: {needs}"


def test_a_compiler_that_fails_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "here")

    def failing(*_: Any) -> Any:
        raise RuntimeError("Python.h: No such file or directory")

    with pytest.raises(
        ResourceError, match=r"PyTorch cannot compile .*Python\.h.*; install the header files"
    ):
        compile_blocks([after(0).dino.student.backbone], "on", CPU, backend=failing)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_generated_code_has_the_numbers_of_eager_blocks() -> None:
    plain = after(0, backbone=DEEP, optim=SGD)
    state = compiled(backend="inductor", backbone=DEEP, optim=SGD)
    for seed in range(3):
        losses = [step(each, seed)["loss"] for each in (plain, state)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(weights(state), weights(plain), rtol=1e-3, atol=1e-5)
    assert step(state, 3)["recompiled_graphs"] == 0
