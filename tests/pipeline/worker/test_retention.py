"""Which checkpoints are kept, against the rule spelt out, and over resumes."""

from hypothesis import example, given
from hypothesis import strategies as st

from dinoray.pipeline.training.config import CheckpointConfig
from dinoray.pipeline.worker.retention import Retention, kept

configs = st.builds(
    CheckpointConfig,
    num_to_keep=st.integers(1, 4),
    num_best_to_keep=st.integers(0, 3),
    keep_every_steps=st.none() | st.integers(1, 9),
)
all_steps = st.lists(st.integers(1, 40), unique=True, min_size=1, max_size=20).map(sorted)
scores = st.dictionaries(st.integers(1, 40), st.sampled_from([0.1, 0.2, 0.3, 0.5]), max_size=40)


def is_kept(step: int, steps: list[int], scores: dict[int, float], config: CheckpointConfig) -> bool:
    """The rule for one checkpoint: how many are newer, how many are better, and its step."""
    newer = sum(other > step for other in steps)
    better = sum(
        scores[other] > scores[step] or (scores[other] == scores[step] and other > step)
        for other in steps
        if other in scores and step in scores
    )
    is_best = step in scores and better < config.num_best_to_keep
    is_multiple = config.keep_every_steps is not None and step % config.keep_every_steps == 0
    return newer < config.num_to_keep or is_best or is_multiple


@given(all_steps, scores, configs)
@example([1, 2, 3], {1: 0.5, 2: 0.5, 3: 0.1}, CheckpointConfig(num_to_keep=1))
def test_the_newest_the_best_and_the_multiples_are_kept(
    steps: list[int], scores: dict[int, float], config: CheckpointConfig
) -> None:
    found = kept(steps, scores, config)
    assert found == {step for step in steps if is_kept(step, steps, scores, config)}
    assert max(steps) in found


@given(all_steps, scores, configs, st.sets(st.integers(1, 40)))
def test_one_save_after_the_other_keeps_what_all_at_once_would_through_any_resume(
    steps: list[int], scores: dict[int, float], config: CheckpointConfig, killed_after: set[int]
) -> None:
    """A score is known when its step is saved, and never before."""
    retention, there = Retention(config, []), set[int]()
    for step in steps:
        known = {evaluated: score for evaluated, score in scores.items() if evaluated <= step}
        there |= {step}
        dropped = retention.add(step, known, replaces=True)
        assert step not in dropped
        assert there.issuperset(dropped)
        assert dropped == sorted(dropped)
        there -= set(dropped)
        if step in killed_after:
            retention = Retention(config, there)
    assert there == {step for step in steps if is_kept(step, steps, scores, config)}


@given(all_steps, scores, configs, configs)
def test_a_resume_with_other_settings_obeys_them_from_its_next_save(
    steps: list[int], scores: dict[int, float], before: CheckpointConfig, after: CheckpointConfig
) -> None:
    there = kept(steps, scores, before)
    there = {*there, 41} - set(Retention(after, there).add(41, scores, replaces=True))
    assert there == kept([*kept(steps, scores, before), 41], scores, after)


@given(all_steps, scores, configs)
def test_one_that_cannot_be_resumed_from_replaces_none(
    steps: list[int], scores: dict[int, float], config: CheckpointConfig
) -> None:
    retention = Retention(config, steps)
    assert retention.add(41, scores, replaces=False) == []
    assert set(retention.add(42, scores, replaces=True)) == {*steps, 41} - kept(
        [*steps, 41, 42], scores, config
    )


@given(all_steps, scores, configs, st.integers(1, 3), st.sets(st.integers(1, 40)))
def test_scores_that_come_late_keep_the_same_checkpoints_in_the_end(
    steps: list[int], scores: dict[int, float], config: CheckpointConfig, late: int, killed_after: set[int]
) -> None:
    """A score is known `late` saves after its step's own; its checkpoint is there until then."""
    retention, there = Retention(config, []), set[int]()
    for number, step in enumerate(steps):
        under_way = [other for other in steps[max(0, number + 1 - late) : number + 1] if other in scores]
        known = {evaluated: score for evaluated, score in scores.items() if evaluated not in under_way}
        there |= {step}
        there -= set(retention.add(step, known, replaces=True, under_way=under_way))
        assert there.issuperset(under_way)
        if step in killed_after:
            retention = Retention(config, there)
    there -= set(retention.drop(scores))
    assert there == {step for step in steps if is_kept(step, steps, scores, config)}
