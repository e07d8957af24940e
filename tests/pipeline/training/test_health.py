"""Health of a run: each number against its closed form, and a verdict that neither fires early nor stays silent."""

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_batch, tiny_config
from torch import Tensor

from dinoray.pipeline.training.config import HealthConfig
from dinoray.pipeline.training.health import CollapseDetector, Health, sums_of, symptom_of
from dinoray.pipeline.training.state import build_state
from dinoray.pipeline.training.step import train_step
from dinoray.pipeline.training.verdict import UnhealthyError, Verdict

K, D = 8, 4
CPU = torch.device("cpu")


def health(**config: Any) -> Health:
    return Health(HealthConfig(**config), grace_steps=0)


def reading(
    probs: Tensor, features: Tensor | None = None, *, kl: float = 0.0, of: Health | None = None
) -> dict:
    """The metrics of one step with these targets."""
    features = torch.randn(len(probs), D) if features is None else features
    entropy = torch.special.entr(probs).sum(1).mean()
    of = of or health()
    of.add(sums_of(probs, features, entropy=entropy, kl=torch.tensor(kl)))
    return of.read(1, torch.zeros(K))


def test_uniform_targets_have_all_the_entropy_and_no_information() -> None:
    found = reading(torch.full((5, K), 1 / K), kl=0.25)
    assert found["entropy_ratio"] == pytest.approx(1)
    assert found["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert found["kl_mean"] == pytest.approx(0.25)


def test_one_prototype_for_all_has_neither() -> None:
    found = reading(torch.eye(K)[[3, 3, 3, 3]])
    assert found["entropy_ratio"] == found["mutual_information"] == 0
    assert found["prototypes_used"] == 1 / K
    assert found["commonest_prototype"] == 1


def test_a_prototype_for_each_image_has_all_the_information() -> None:
    found = reading(torch.eye(K))
    assert found["entropy_ratio"] == 0
    assert found["mutual_information"] == pytest.approx(math.log(K))
    assert found["prototypes_used"] == 1
    assert found["commonest_prototype"] == 1 / K


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_steps_that_add_up_equal_one_step_of_all_rows(sizes: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(sum(sizes), K, generator=generator).softmax(1)
    features = torch.randn(sum(sizes), D, generator=generator)
    apart = health()
    for p, z in zip(probs.split(sizes), features.split(sizes), strict=True):
        entropy = torch.special.entr(p).sum(1).mean()
        apart.add(sums_of(p, z, entropy=entropy, kl=torch.tensor(0.5)))
    found, expected = apart.read(1, torch.zeros(K)), reading(probs, features, kl=0.5)
    assert found == {k: v if isinstance(v, str) else pytest.approx(v, abs=2e-6) for k, v in expected.items()}


def test_information_and_use_are_taken_over_the_window_alone() -> None:
    run = health(window=2)
    reading(torch.eye(K)[[0, 0]], of=run)
    found = reading(torch.eye(K)[[1, 1]], of=run)
    assert found["prototypes_used"] == 2 / K
    assert found["mutual_information"] == pytest.approx(math.log(2))
    found = reading(torch.eye(K)[[1, 1]], of=run)  # the first one has left the window
    assert found["prototypes_used"] == 1 / K
    assert found["mutual_information"] == pytest.approx(0, abs=1e-6)


def test_features_spread_evenly_have_the_std_of_the_sphere() -> None:
    corners = torch.cat([torch.eye(D), -torch.eye(D)])
    found = reading(torch.full((2 * D, K), 1 / K), 7 * corners)
    assert found["feature_std"] == pytest.approx(1 / math.sqrt(D))
    assert found["collapsed_dims"] == 0


def test_features_that_are_all_one_have_none_and_flat_dimensions_are_counted() -> None:
    same = reading(torch.full((4, K), 1 / K), torch.ones(4, D))
    assert same["feature_std"] == pytest.approx(0, abs=1e-3)
    assert same["collapsed_dims"] == 1
    half = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0], [-1, 1, 0, 0], [-1, -1, 0, 0]])
    assert reading(torch.full((4, K), 1 / K), half)["collapsed_dims"] == 0.5


def test_the_drift_is_how_far_the_center_went_since_the_last_reading() -> None:
    run = health()
    probs = torch.full((2, K), 1 / K)
    for center, norm, drift in (
        (torch.ones(K), math.sqrt(K), math.sqrt(K)),
        (2 * torch.ones(K),) + 2 * (None,),
    ):
        run.add(sums_of(probs, torch.ones(2, D), entropy=torch.tensor(0.0), kl=torch.tensor(0.0)))
        found = run.read(1, center)
        assert found["center_norm"] == pytest.approx(norm or 2 * math.sqrt(K))
        assert found["center_drift"] == pytest.approx(drift or math.sqrt(K))


def test_nothing_to_read_gives_the_verdict_alone() -> None:
    assert health().read(1, torch.zeros(K)) == {"verdict": "healthy"}


def test_a_continued_run_reads_what_the_first_would_have_read() -> None:
    first = health(window=3, persistence=2)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, K, generator=generator).softmax(1) for _ in range(6)]
    features = torch.randn(4, D, generator=generator)
    for probs in steps[:3]:
        reading(probs, features, of=first)
    second = health(window=3, persistence=2)
    second.load_state_dict(first.state_dict(), device=CPU)
    for probs in steps[3:]:
        assert reading(probs, features, of=first) == reading(probs, features, of=second)


# The verdict

UNIFORM = {"entropy_ratio": 0.999, "commonest_prototype": 0.1}
SINGLE = {"entropy_ratio": 0.001, "commonest_prototype": 1.0}
ALIVE = {"entropy_ratio": 0.6, "commonest_prototype": 0.1}
SHARP = {"entropy_ratio": 0.001, "commonest_prototype": 0.1}


def verdicts(*course: dict[str, float], grace_steps: int = 0, persistence: int = 2) -> list[Verdict]:
    judge = CollapseDetector(HealthConfig(persistence=persistence), grace_steps=grace_steps)
    return [judge.judge(step, metrics) for step, metrics in enumerate(course)]


def test_each_collapse_has_its_symptom_and_sharp_targets_are_none() -> None:
    assert symptom_of(UNIFORM) is Verdict.UNIFORM
    assert symptom_of(SINGLE) is Verdict.SINGLE
    assert symptom_of(ALIVE) is symptom_of(SHARP) is Verdict.HEALTHY


@pytest.mark.parametrize(("symptom", "verdict"), [(UNIFORM, Verdict.UNIFORM), (SINGLE, Verdict.SINGLE)])
def test_a_symptom_must_last(symptom: dict[str, float], verdict: Verdict) -> None:
    healthy = Verdict.HEALTHY
    assert verdicts(symptom, ALIVE, symptom, ALIVE) == [healthy] * 4
    assert verdicts(ALIVE, symptom, symptom, symptom) == [healthy, healthy, verdict, verdict]
    assert verdicts(symptom, symptom, ALIVE) == [healthy, verdict, healthy]


def test_an_untrained_network_looks_uniform_and_is_given_grace() -> None:
    assert set(verdicts(*[UNIFORM] * 9, grace_steps=9)) == {Verdict.HEALTHY}
    assert verdicts(*[UNIFORM] * 12, grace_steps=9)[-1] is Verdict.UNIFORM


def test_a_run_that_has_left_uniform_once_has_no_grace_to_go_back_there() -> None:
    assert verdicts(UNIFORM, ALIVE, UNIFORM, UNIFORM, grace_steps=99)[-1] is Verdict.UNIFORM


def test_a_single_prototype_has_no_grace() -> None:
    assert verdicts(SINGLE, SINGLE, grace_steps=99)[-1] is Verdict.SINGLE


def test_steps_without_metrics_change_nothing() -> None:
    assert verdicts(SINGLE, {}, {}, {}, persistence=2)[-1] is Verdict.HEALTHY


@pytest.mark.parametrize("verdict", [v for v in Verdict if v is not Verdict.HEALTHY])
def test_every_verdict_has_a_remedy_that_names_a_setting(verdict: Verdict) -> None:
    assert "loss." in verdict.remedy or "optim." in verdict.remedy


# In a run


def test_a_step_keeps_the_books_and_a_reading_closes_them() -> None:
    state = build_state(tiny_config(), num_images=40)
    for seed in range(3):
        train_step(state, tiny_batch(state.config, seed=seed))
    found = state.health.read(3, state.dino.center)
    assert 0 < found["entropy_ratio"] <= 1
    assert found["center_norm"] == pytest.approx(float(state.dino.center.norm()))
    assert found["center_drift"] == pytest.approx(found["center_norm"])
    assert found["verdict"] == "healthy"
    assert state.health.read(3, state.dino.center) == {"verdict": "healthy"}


def test_many_skipped_steps_in_a_row_are_a_verdict() -> None:
    assert health(max_skipped=3).read(1, torch.zeros(K), skipped_in_a_row=2)["verdict"] == "healthy"
    assert health(max_skipped=3).read(1, torch.zeros(K), skipped_in_a_row=3)["verdict"] == "non-finite"


def test_the_error_of_a_run_that_died_crosses_processes_with_its_verdict() -> None:
    error = pickle.loads(pickle.dumps(UnhealthyError("uniform at step 5", Verdict.UNIFORM)))
    assert (str(error), error.verdict, error.exit_code) == ("uniform at step 5", Verdict.UNIFORM, 1)
