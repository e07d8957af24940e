"""What a start of the train workers does about evaluations that an earlier one has left: no step is lost in silence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_run import write_run
from tiny_states import flip

from dinoray.jobs.cli.config import load_run_config
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.storage.run_dir import checkpoint_name
from dinoray.pipeline.training.checkpoint import load_checkpoint
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.worker import evaluations
from dinoray.pipeline.worker.agreement import Agreement
from dinoray.pipeline.worker.evaluations import Evaluations
from dinoray.pipeline.worker.evaluator import spare_node

STEPS = (4, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", steps=STEPS)


class Resumed:
    """A start of rank 0 at `step` of a run that is evaluated every 2 steps, and what it does."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, run: Path, *, where: Any, step: int, evaluated: set[int]
    ) -> None:
        self.asked: dict[int, Any] = {}
        self.missing: dict[int, str] = {}
        self.evaluated_here: list[int] = []
        outputs = SimpleNamespace(
            begun_at=0,
            evaluated=evaluated,
            log_evaluation=None,
            note=None,
            miss_evaluation=self.missing.__setitem__,
            restart_meters=lambda: None,
        )
        device = torch.device("cpu")
        state = SimpleNamespace(step=step, schedule=SimpleNamespace(total_steps=100), device=device)
        spec = SimpleNamespace(
            run=Directory(str(run)),
            eval=EvalConfig(every_steps=2, where=where),
            has_scores=True,
            give_up_after_seconds=900,
        )
        agreement = Agreement(patience_seconds=0, known=lambda _: None)
        monkeypatch.setattr(evaluations.ray, "put", lambda value: value)
        made = Evaluations(
            cast(Any, state), cast(Any, spec), cast(Any, outputs), agreement, num_ranks=1, ending=None
        )
        if made._side:
            monkeypatch.setattr(made._side, "add", self.asked.__setitem__)
        monkeypatch.setattr(made, "evaluate_here", lambda: self.evaluated_here.append(step))
        made.resume()


def test_what_was_under_way_is_asked_for_again_from_checkpoints_and_the_rest_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Resumed(monkeypatch, run, where="side", step=8, evaluated={0, 2})
    assert list(found.asked) == [4, 8]
    assert found.missing == {
        6: "it was under way when the run was left, and there is no checkpoint of that step"
    }
    state = build_state(load_run_config(Directory(str(run))).algorithm(), num_images=40)
    load_checkpoint(state, run / "checkpoints" / checkpoint_name(8))
    weights = {name: value.numpy() for name, value in state.dino.teacher.backbone.state_dict().items()}
    assert found.asked[8].keys() == weights.keys()
    assert all(np.array_equal(found.asked[8][name], value) for name, value in weights.items())


def test_a_damaged_checkpoint_leaves_a_reason(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = write_run(tmp_path / "tiny", steps=STEPS)
    flip(copy / "checkpoints" / checkpoint_name(4) / "teacher.safetensors")
    found = Resumed(monkeypatch, copy, where="side", step=8, evaluated={2, 6, 8})
    assert found.asked == {}
    assert "teacher.safetensors" in found.missing[4]


def test_the_workers_evaluate_the_step_at_which_they_were_asked_to_end(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Resumed(monkeypatch, run, where="train", step=8, evaluated={2, 4, 6})
    assert (found.evaluated_here, found.missing) == ([8], {})
    found = Resumed(monkeypatch, run, where="train", step=8, evaluated={2, 6, 8})
    assert (found.evaluated_here, found.missing) == ([], {4: "it was lost when the run was left"})


def test_a_step_that_is_not_evaluated_lacks_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("train", "side"):
        found = Resumed(monkeypatch, run, where=where, step=7, evaluated={2, 4, 6})
        assert (found.evaluated_here, found.asked, found.missing) == ([], {}, {})


def test_an_evaluator_without_cpus_of_its_own_is_where_most_are() -> None:
    def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
        return {"NodeID": name, "Alive": alive, "Resources": resources}

    nodes = [
        node("head"),
        node("gpus", CPU=32.0, GPU=8.0),
        node("cpus", CPU=32.0),
        node("few", CPU=4.0),
        node("lost", alive=False, CPU=64.0),
    ]
    assert spare_node(nodes, "here") == "cpus"
    assert spare_node(nodes[:2], "here") == "gpus"
    assert spare_node(nodes[:1], "here") == "here"
