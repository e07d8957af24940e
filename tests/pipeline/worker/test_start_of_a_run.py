"""The initial weights are evaluated as the line to beat: what is measured, logged and told of them."""

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from dinoray.pipeline.augment.config import CropsConfig
from dinoray.pipeline.evaluation.config import EvalConfig
from dinoray.pipeline.evaluation.in_training import Evaluation
from dinoray.pipeline.evaluation.published import Preprocessing
from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.frozen_stage import FrozenStage
from dinoray.pipeline.worker import evaluations, evaluator
from dinoray.pipeline.worker.evaluations import Evaluations
from dinoray.pipeline.worker.outputs import Outputs

HALF = Preprocessing("timm's", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


_NO_STAGE = FrozenStage(0, total_steps=40, device=torch.device("cpu"))


def outputs_from(step: int, **spec: Any) -> Outputs:
    """As much of rank 0's outputs as evaluations need; the run begins at `step`."""
    outputs = object.__new__(Outputs)
    health = HealthConfig(regression_persistence=1)
    values: dict[str, Any] = {
        "_spec": SimpleNamespace(check_fence=Mock(), health=health, starts_from_weights=True, **spec),
        "_log": Mock(),
        "_gauges": Mock(),
        "_channel": Mock(),
        "_evaluations": [],
        "_grace_steps": 20,
        "start": None,
        "begun_at": step,
    }
    for name, value in values.items():
        setattr(outputs, name, value)
    return outputs


def test_later_evaluations_are_logged_beside_the_start_and_judged_by_it() -> None:
    outputs = outputs_from(5)  # of init.load=run
    for step, knn in ((5, 0.5), (15, 0.3), (25, 0.75)):
        outputs.log_evaluation(step, Evaluation({"knn_20": knn, "num_val": 100}, None, None))
        assert outputs.regression is None  # step 15 is before the grace
    logged = [call.args for call in outputs._log.log.call_args_list]  # type: ignore[attr-defined]
    outputs._gauges.set_start.assert_called_once_with(outputs.start)  # type: ignore[attr-defined]
    assert logged[0] == (5, {"knn_20": 0.5, "num_val": 100, "above_start": 0.0})
    assert [values["above_start"] for _, values in logged[1:]] == pytest.approx([-0.2, 0.25])
    outputs.log_evaluation(35, Evaluation({"knn_20": 0.3, "num_val": 100}, None, None))
    assert outputs.regression is not None
    assert outputs.regression.since == 35


@pytest.mark.parametrize(
    ("knn", "verdict", "logged"),
    [
        (0.3, "healthy", "worse than the start"),
        (0.3, "uniform collapse", "uniform collapse"),
        (0.5, "healthy", "healthy"),
    ],
)
def test_logged_steps_have_the_verdict_unless_the_run_has_collapsed(
    knn: float, verdict: str, logged: str
) -> None:
    outputs = outputs_from(0, num_images=10, run=SimpleNamespace(uri="s3://bucket/run"))
    for step, score in ((0, 0.5), (20, knn)):
        outputs.log_evaluation(step, Evaluation({"knn_20": score, "num_val": 100}, None, None))
    outputs._checked_at, outputs._images_per_step, outputs._staged = 0.0, 4, {}
    outputs._utilisation = None
    for name, read in (("_meter", "read"), ("_nodes", "read"), ("_pool", "metrics")):
        setattr(outputs, name, SimpleNamespace(**{read: dict}))
    state: Any = SimpleNamespace(
        step=30, skipped=0, schedule=SimpleNamespace(total_steps=40), stage=_NO_STAGE
    )
    outputs._meter = SimpleNamespace(read=lambda: {"images_per_second": 1.0})  # type: ignore[assignment]
    quarantine: Any = SimpleNamespace(trained=0, counts=Counter())
    outputs.log_step(state, {"verdict": verdict}, quarantine)
    assert outputs._log.log.call_args.args[1]["verdict"] == logged  # type: ignore[attr-defined]


def test_the_start_is_evaluated_with_both_preprocessings_and_a_difference_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crops = CropsConfig()
    spec = SimpleNamespace(published=HALF, config=SimpleNamespace(crops=crops), starts_from_weights=True)
    outputs = outputs_from(0)
    outputs.note = Mock()  # type: ignore[method-assign]
    outputs.restart_meters = Mock()  # type: ignore[method-assign]
    made = object.__new__(Evaluations)
    made._state = Mock(step=0)
    made._spec, made._outputs = spec, outputs  # type: ignore[assignment]
    scores = {"knn_20": 0.3, "majority": 0.1, "num_val": 400}
    monkeypatch.setattr(evaluations, "evaluate_step", lambda *_: Evaluation(scores, None, None))
    monkeypatch.setattr(evaluations, "published_scores", lambda *_: {"published_knn_20": 0.7})
    made.evaluate_start()
    assert outputs.start == {"step": 0, **scores, "published_knn_20": 0.7}
    (line,) = [call.args[0] for call in outputs.note.call_args_list]
    told = "the initial weights score k-NN 30.0% (k=20) with this run's preprocessing and 70.0% with the published"
    assert line.startswith(f"warning: {told}")


@pytest.mark.parametrize(
    ("labelled", "from_weights", "lidar"),
    [(False, True, True), (False, False, False), (True, True, False)],
)
def test_trained_weights_without_labels_have_lidar_too(
    labelled: bool, from_weights: bool, lidar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(evaluator.ray, "get", lambda value: value)
    monkeypatch.setattr(evaluator, "evaluate", lambda *_, **how: asked.append(how))
    spec: Any = SimpleNamespace(
        eval_sources=("train", "val") if labelled else None,
        eval=EvalConfig(),
        starts_from_weights=from_weights,
        stream=SimpleNamespace(source="images"),
        pictures=[],
        config=None,
        probe=None,
        published=HALF,
    )
    evaluator.evaluate_step(spec, Mock(), 0)
    evaluator.published_scores(spec, Mock())
    assert [how["config"].lidar for how in asked] == [lidar, lidar]
    assert [how.get("preprocessing") for how in asked] == [None, HALF]
    spec.published = None
    assert evaluator.published_scores(spec, Mock()) == {}
    assert len(asked) == 2
