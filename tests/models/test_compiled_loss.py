"""The compiled loss has the numbers of the definition in float64, as the eager one has, in fewer passes.

The backend `aot_eager` captures what Inductor captures; the nightly test runs generated code, that of a GPU where there
is one.
"""

import shutil
from typing import Any

import pytest
import torch
from oracles import double_loop_loss
from torch import Tensor

from dinoray.models.compiled import Compilation, compiled_in_steps, is_compiled_now, num_graphs
from dinoray.models.loss import batch_center, cross_entropy, teacher_probs
from dinoray.models.loss_rows import row_sums

TEACHER_TEMP, STUDENT_TEMP = 0.04, 0.1
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")],
    ),
]


def cosines(rows: int, K: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, K, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def check(backend: str, G: int, L: int, B: int, K: int, device: str = "cpu") -> None:
    teacher, student, center = cosines(G * B, K), cosines((G + L) * B, K, seed=1), 0.1 * cosines(1, K)[0]
    exact = student.double().requires_grad_()
    temps = {"teacher_temp": TEACHER_TEMP, "student_temp": STUDENT_TEMP}
    oracle = double_loop_loss(teacher, exact, center, num_global_crops=G, **temps)
    oracle.backward()
    ours = student.to(device).requires_grad_()
    before = num_graphs()
    with Compilation(backend).step():
        probs = teacher_probs(teacher.to(device), center.to(device), TEACHER_TEMP)
        loss, entropy = cross_entropy(probs, ours, student_temp=STUDENT_TEMP, num_global_crops=G)
        (3 * loss).backward()
        total = batch_center(teacher.to(device))
    # Targets, their entropy, centre; rows of one global crop and of all local ones, forward and backward.
    assert num_graphs() - before == 3 + 2 * (1 + (L > 0))
    assert ours.grad is not None
    assert exact.grad is not None
    # As for the eager loss in test_loss.py.
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5, abs=2e-6)
    torch.testing.assert_close(ours.grad.cpu().double(), 3 * exact.grad, rtol=1e-4, atol=9e-6)
    expected = torch.softmax((teacher.double() - center.double()) / TEACHER_TEMP, dim=1)
    torch.testing.assert_close(probs.cpu().double(), expected, rtol=1e-5, atol=1e-8)
    assert entropy.item() == pytest.approx(float(torch.special.entr(expected).sum(1).mean()), rel=1e-5)
    torch.testing.assert_close(total.cpu(), torch.cat([teacher.sum(0), torch.tensor([len(teacher)])]))


@pytest.mark.parametrize(
    ("G", "L", "B", "K"),
    [(1, 2, 2, 17), (2, 3, 2, 96), (3, 0, 1, 64)],
    ids=["one global crop", "pieces of 32", "no local crops"],
)
def test_loss_and_gradient_equal_the_double_loop_over_pairs(G: int, L: int, B: int, K: int) -> None:
    check("aot_eager", G, L, B, K)


@pytest.mark.nightly
@pytest.mark.parametrize("device", DEVICES)
def test_generated_code_equals_the_double_loop_over_pairs(device: str) -> None:
    for G, L, B, K in ((2, 8, 2, 4096), (2, 3, 3, 1000), (3, 0, 1, 77)):
        check("inductor", G, L, B, K, device)


@pytest.mark.parametrize("K", [77, 96, 2048])
@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_pieces_of_rows_add_up(K: int, largest: float) -> None:
    logits, targets = largest * cosines(6, K).unflatten(0, (3, 2)), cosines(2, K, seed=1).softmax(1)
    lses, dots = row_sums(logits, targets, STUDENT_TEMP)
    wide = logits.double()
    torch.testing.assert_close(lses.double(), torch.logsumexp(wide / STUDENT_TEMP, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dots.double(), (wide * targets).sum(), rtol=1e-5, atol=1e-6 * largest)


def test_logits_of_half_precision_are_computed_in_float32() -> None:
    probs = cosines(4, 64).softmax(1)
    grads = []
    for backend in (None, "aot_eager"):
        student = cosines(10, 64, seed=1).bfloat16().requires_grad_()
        with Compilation(backend).step():
            loss = cross_entropy(probs, student, student_temp=STUDENT_TEMP, num_global_crops=2).loss
            loss.backward()
        assert loss.dtype == torch.float32
        assert student.grad is not None
        grads.append(student.grad)
    torch.testing.assert_close(*grads, rtol=8e-3, atol=1e-6)  # a bit of bfloat16


def test_a_number_that_moves_is_not_compiled_anew() -> None:
    @compiled_in_steps
    def scaled(x: Tensor, factor: float) -> Any:
        return x * factor, is_compiled_now()

    x, before = torch.ones(3), num_graphs()
    with Compilation("aot_eager").step():
        found = [scaled(x, factor)[0].tolist() for factor in (0.5, 0.25, 2.0)]
    assert found == [[0.5] * 3, [0.25] * 3, [2.0] * 3]
    assert num_graphs() - before == 1
    assert scaled(x, 0.5)[1] is False  # outside of steps it is eager
    assert num_graphs() - before == 1
