"""benchmarks/loss.py: the losses that it compares are equal, memory is counted, and so are steps with former parts."""

import loss as benchmark
import pytest
import torch

from dinoray.jobs.cli.config import load_config
from dinoray.models.head import PrototypeLayer
from dinoray.pipeline.training import step as training

TINY = ["data.path=none", "head.out_dim=64", "train.global_batch_size=2", "crops.num_local_crops=2"]


def test_it_runs_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--images", "1", "2", "--out-dim", "512", "--rounds", "1", "--step-rounds", "1"]
    benchmark.main([*few, "--step", "demo", "--set", *TINY[1:]])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row[1] for row in rows[1:7]]
    assert names == list(benchmark.LOSSES) * 2
    assert [row[0] for row in rows[8:]] == ["| now", "| before"]
    assert all(float(row[-2]) < 1e-6 for row in rows[1:7])


def test_all_losses_have_one_value_and_one_gradient() -> None:
    probs, student = benchmark.logits_of(3, 200, 4)
    first, *others = (benchmark.backward(loss, probs, student) for loss in benchmark.LOSSES.values())
    for value, grad in others:
        torch.testing.assert_close(value, first[0])
        torch.testing.assert_close(grad, first[1], rtol=1e-4, atol=1e-7)


def test_the_peak_counts_what_lives_at_the_same_time() -> None:
    def work() -> None:
        for _ in range(3):
            a = torch.empty(1_000_000)
            b = torch.empty(500_000)
            del a, b

    assert benchmark.peak_bytes(work) == pytest.approx(6_000_000, abs=1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_holds_its_gradient_and_little_more(dtype: torch.dtype) -> None:
    probs, student = benchmark.logits_of(2, 4096, 8)
    student = student.detach().to(dtype).requires_grad_()
    unit = 4 * student.numel()
    now, before = (
        benchmark.peak_bytes(lambda loss=loss: benchmark.backward(loss, probs, student)) / unit
        for loss in (benchmark.cross_entropy, benchmark.former)
    )
    assert now < 1.3
    assert before > 4


def test_a_step_as_it_was_leaves_no_trace_in_the_present_one() -> None:
    parts = training.cross_entropy, PrototypeLayer.forward
    config = load_config("demo", None, TINY).algorithm()
    now, before = (benchmark.Step(config, former_parts=former) for former in (False, True))
    for _ in range(2):
        assert now() == pytest.approx(before(), rel=1e-5)
    assert len(now.loss_ms) == len(before.loss_ms) == 2
    assert parts == (training.cross_entropy, PrototypeLayer.forward)
