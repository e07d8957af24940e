"""The loss's own gradient: right for each number of crops and each float dtype; its inputs are only read."""

import pytest
import torch
from torch import Tensor

from dinoray.models.loss import cross_entropy, teacher_probs

TEMP = 0.1


def inputs(
    G: int, L: int, B: int, K: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Targets [G*B, K], and the student's logits [(G+L)*B, K] as leaves: cosines."""
    rng = torch.Generator().manual_seed(seed)
    teacher, student = (
        torch.rand(rows, K, generator=rng, dtype=torch.float64) * 2 - 1 for rows in (G * B, (G + L) * B)
    )
    probs = torch.softmax(teacher / 0.07, dim=1)
    exact = dtype == torch.float64
    return probs if exact else probs.float(), student.to(dtype).requires_grad_()


def loss_of(probs: Tensor, student: Tensor, G: int) -> Tensor:
    return cross_entropy(probs, student, student_temp=TEMP, num_global_crops=G).loss


@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("G", "L"), [(1, 1), (1, 3), (2, 0), (2, 3), (3, 0), (3, 2)])
def test_the_gradient_is_that_of_finite_differences(G: int, L: int, B: int, K: int) -> None:
    probs, student = inputs(G, L, B, K, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss_of(probs, s, G), student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    probs, student = inputs(2, 3, 2, 300, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    loss, expected = loss_of(probs, student, 2), loss_of(probs, wide, 2)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    assert student.grad is not None
    assert wide.grad is not None
    assert torch.equal(student.grad, wide.grad.to(dtype))


def test_autocast_changes_nothing() -> None:
    probs, student = inputs(2, 3, 2, 50)
    plain = loss_of(probs, student, 2)
    (expected,) = torch.autograd.grad(plain, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(probs, student, 2)
    loss.backward()
    assert torch.equal(loss, plain)
    assert student.grad is not None
    assert torch.equal(student.grad, expected)


def test_the_gradient_is_scaled_by_what_comes_from_above() -> None:
    probs, student = inputs(2, 3, 2, 50)
    loss = loss_of(probs, student, 2)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student, retain_graph=True)
    (thrice,) = torch.autograd.grad(-3 * loss, student)
    assert torch.equal(once, again)
    torch.testing.assert_close(thrice, -3 * once)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    probs, student = inputs(2, 1, 1, 5)
    (first,) = torch.autograd.grad(loss_of(probs, student, 2), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def test_inputs_are_not_written_to() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        probs, student = inputs(2, 3, 2, 50, dtype=dtype)
        before = probs.clone(), student.detach().clone()
        loss_of(probs, student, 2).backward()
        assert torch.equal(probs, before[0])
        assert torch.equal(student.detach(), before[1])


def test_without_a_gradient_the_loss_is_the_same() -> None:
    probs, student = inputs(2, 3, 2, 50)
    with torch.inference_mode():
        alone = loss_of(probs, student, 2)
    assert not alone.requires_grad
    assert alone.item() == loss_of(probs, student, 2).item() == loss_of(probs, student.detach(), 2).item()


def test_logits_need_not_be_contiguous() -> None:
    probs, student = inputs(2, 3, 2, 50)
    expected = torch.autograd.grad(loss_of(probs, student, 2), student)[0]
    turned = student.detach().T.contiguous().requires_grad_()
    loss_of(probs, turned.T, 2).backward()
    assert turned.grad is not None
    torch.testing.assert_close(turned.grad.T, expected)


def test_a_logit_that_is_not_finite_makes_the_loss_so() -> None:
    for value in (float("nan"), float("inf")):
        probs, student = inputs(2, 1, 2, 5)
        with torch.no_grad():
            student[3, 2] = value
        assert not loss_of(probs, student, 2).isfinite()


def test_the_entropy_of_targets_with_zeros_is_exact() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1e-40, 1.0, 0.0]])
    entropy = cross_entropy(probs, torch.zeros(6, 3), student_temp=TEMP, num_global_crops=2).teacher_entropy
    torch.testing.assert_close(entropy, torch.special.entr(probs.double()).sum(1).mean().float())


def test_targets_of_a_network_get_no_gradient() -> None:
    _, student = inputs(2, 1, 2, 5)
    teacher = torch.randn(4, 5, requires_grad=True)
    loss_of(teacher_probs(teacher, torch.zeros(5), 0.04), student, 2).backward()
    assert teacher.grad is None
