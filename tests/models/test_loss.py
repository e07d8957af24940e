"""The loss equals its definition; the centre is a running mean of what the teacher said."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import double_loop_loss
from pydantic import ValidationError
from torch import Tensor

from dinoray.models.config import LossConfig
from dinoray.models.loss import (
    batch_center,
    cross_entropy,
    koleo,
    sinkhorn_probs,
    teacher_probs,
    update_center,
)

GRID = [
    (G, L, B, K, teacher_temp, student_temp)
    for G in (1, 2, 3)
    for L in (0, 1, 4)
    for B in (1, 3)
    for K in (2, 17)
    for teacher_temp, student_temp in ((0.04, 0.1), (0.07, 0.2), (1.0, 1.0))
    if G + L > 1
]


def random_logits(G: int, L: int, B: int, K: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher [G*B, K], student [(G+L)*B, K] and centre [K]: cosines, as the head returns them."""
    rng = torch.Generator().manual_seed(seed)

    def cosines(rows: int) -> Tensor:
        return torch.rand(rows, K, generator=rng) * 2 - 1

    return cosines(G * B), cosines((G + L) * B), cosines(1)[0] * 0.1


@pytest.mark.parametrize(("G", "L", "B", "K", "teacher_temp", "student_temp"), GRID)
def test_loss_and_gradient_equal_the_double_loop_over_pairs(
    G: int, L: int, B: int, K: int, teacher_temp: float, student_temp: float
) -> None:
    teacher, student, center = random_logits(G, L, B, K)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = cross_entropy(
        teacher_probs(teacher, center, teacher_temp), ours, student_temp=student_temp, num_global_crops=G
    ).loss
    oracle = double_loop_loss(
        teacher, theirs, center, teacher_temp=teacher_temp, student_temp=student_temp, num_global_crops=G
    )
    loss.backward()
    oracle.backward()
    # Logits over temperatures, in float32, are exact to some 2e-6; the loss itself may be much smaller.
    assert loss.item() == pytest.approx(oracle.item(), rel=1e-5, abs=2e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=3e-6)


def test_each_global_crop_is_compared_with_the_other_and_never_with_itself() -> None:
    says_a, says_b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    probs = torch.cat([says_a, says_b])  # of one image: the teacher sees A in crop 0 and B in crop 1

    def loss(crop_0: Tensor, crop_1: Tensor) -> float:
        logits = 10 * torch.cat([crop_0, crop_1])
        return float(cross_entropy(probs, logits, student_temp=1.0, num_global_crops=2).loss)

    assert loss(says_b, says_a) == pytest.approx(math.log1p(math.exp(-10)), abs=2e-6)
    assert loss(says_a, says_b) == pytest.approx(10, rel=1e-3)


def test_the_only_global_crop_teaches_the_local_crops_alone() -> None:
    teacher, student, center = random_logits(1, 2, 4, 8)
    student.requires_grad_()
    probs = teacher_probs(teacher, center, 0.04)
    cross_entropy(probs, student, student_temp=0.1, num_global_crops=1).loss.backward()
    assert student.grad is not None
    assert not student.grad[:4].any()
    assert student.grad[4:].any(dim=1).all()


def test_logits_in_sample_major_order_give_another_loss() -> None:
    G, L, B, K = 2, 3, 6, 6
    # Each image has a prototype of its own and all crops agree on it: no pairing of crops could do better.
    student = 1.0 * torch.eye(K).repeat(G + L, 1)
    probs = teacher_probs(torch.eye(K).repeat(G, 1), torch.zeros(K), 0.04)
    sample_major = student.unflatten(0, (G + L, B)).transpose(0, 1).flatten(0, 1)

    def loss(logits: Tensor) -> float:
        return float(cross_entropy(probs, logits, student_temp=0.1, num_global_crops=G).loss)

    assert loss(student) < 0.01
    assert loss(sample_major) > 1


def test_loss_is_the_teachers_entropy_plus_the_divergence_from_it() -> None:
    G, B = 2, 3
    teacher, student, center = random_logits(G, 1, B, 9)
    probs = teacher_probs(teacher, center, 0.07)
    result = cross_entropy(probs, student, student_temp=0.1, num_global_crops=G)
    log_p = torch.log_softmax(student / 0.1, dim=1)
    divergences = [
        (probs[g * B + b] * (probs[g * B + b].log() - log_p[v * B + b])).sum()
        for g in range(G)
        for v in range(G + 1)
        for b in range(B)
        if v != g
    ]
    kl = float(torch.stack(divergences).mean())
    assert float(result.loss - result.teacher_entropy) == pytest.approx(kl, rel=1e-4)
    assert float(result.teacher_entropy) == pytest.approx(
        -float((probs * probs.log()).sum(1).mean()), rel=1e-5
    )


@pytest.mark.parametrize(("K", "log_k"), [(2048, 7.6246), (4096, 8.3178), (65536, 11.0904)])
def test_uniform_collapse_gives_ln_k(K: int, log_k: float) -> None:
    same = torch.zeros(4, K)
    loss, entropy = cross_entropy(
        teacher_probs(same, same[0], 0.04), same, student_temp=0.1, num_global_crops=2
    )
    assert float(loss) == pytest.approx(log_k, abs=1e-3)
    assert float(entropy) == pytest.approx(log_k, abs=1e-3)


def test_collapse_to_one_prototype_gives_zero() -> None:
    logits = torch.tensor([10.0, -10.0, -10.0]).repeat(6, 1)
    probs = teacher_probs(logits[:4], torch.zeros(3), 0.04)
    loss, entropy = cross_entropy(probs, logits, student_temp=0.1, num_global_crops=2)
    assert float(loss) == float(entropy) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits_give_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    teacher = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]).to(dtype)
    student = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 1e4]]).to(dtype).requires_grad_()
    probs = teacher_probs(teacher, torch.zeros(3), 0.04)
    loss, entropy = cross_entropy(probs, student, student_temp=0.1, num_global_crops=2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert entropy.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_targets_are_centred_and_sharpened() -> None:
    # exp(ln 3 / 1) : 1 is 3 : 1, and 9 : 1 at half the temperature.
    logits, center = torch.tensor([[math.log(3) + 5, 2.0]]), torch.tensor([5.0, 2.0])
    torch.testing.assert_close(teacher_probs(logits, center, 1.0), torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(teacher_probs(logits, center, 0.5), torch.tensor([[0.9, 0.1]]))


def test_targets_carry_no_gradient_and_are_float32() -> None:
    logits = torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    probs = teacher_probs(logits, torch.zeros(4), 0.04)
    assert not probs.requires_grad
    assert probs.dtype == torch.float32


def test_batch_center_holds_the_sum_and_the_number_of_rows() -> None:
    assert batch_center(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [4, 6, 2]


def test_ranks_of_unequal_size_count_by_their_rows() -> None:
    summed = batch_center(torch.tensor([[8.0]])) + batch_center(torch.tensor([[0.0], [0.0], [4.0]]))
    # The mean over four rows is 3; the mean of the ranks' means would be 4.67.
    assert update_center(torch.zeros(1), summed, momentum=0).tolist() == [3]


def test_center_moves_by_the_share_that_momentum_leaves() -> None:
    summed = torch.tensor([40.0, 0.0, 4.0])  # a mean of [10, 0]
    torch.testing.assert_close(
        update_center(torch.tensor([1.0, 1.0]), summed, momentum=0.9), torch.tensor([1.9, 0.9])
    )


def test_center_counts_raw_logits_in_float32() -> None:
    # There is no 1001 in bfloat16.
    summed = batch_center(torch.ones(1001, 1, dtype=torch.bfloat16, requires_grad=True))
    assert summed.tolist() == [1001, 1001]
    assert not summed.requires_grad


def test_a_warmup_temperature_above_the_final_one_is_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"warmup_teacher_temp=0\.07 must not exceed teacher_temp=0\.04"
    ):
        LossConfig(warmup_teacher_temp=0.07, warmup_teacher_temp_epochs=1)
    LossConfig(warmup_teacher_temp=0.07)  # without a warm-up it is not used


def test_a_center_that_never_moves_is_refused() -> None:
    with pytest.raises(ValidationError, match="center_momentum"):
        LossConfig(center_momentum=1.0)


# Sinkhorn-Knopp


def naive_sinkhorn(logits: Tensor, temp: float) -> Tensor:
    """Three rounds of dividing columns and rows, in float64, on the exponentials themselves."""
    q = [[math.exp(float(t) / temp) for t in row] for row in logits.double()]
    rows, columns = len(q), len(q[0])
    for _ in range(3):
        for k in range(columns):
            total = sum(row[k] for row in q)
            for row in q:
                row[k] *= rows / columns / total
        q = [[x / sum(row) for x in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


def same(values: Tensor) -> Tensor:
    return values


def sinkhorn(logits: Tensor, temp: float) -> Tensor:
    return sinkhorn_probs(logits, temp, reduce_sum=same, reduce_max=same)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 12), st.sampled_from([0.04, 0.1, 1.0]), st.integers(0, 999))
def test_sinkhorn_targets_equal_those_of_the_written_out_iteration(
    rows: int, columns: int, temp: float, seed: int
) -> None:
    logits = 2 * torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) - 1
    torch.testing.assert_close(
        sinkhorn(logits, temp).double(), naive_sinkhorn(logits, temp), rtol=2e-4, atol=1e-6
    )


def test_sinkhorn_shares_the_rows_among_all_prototypes() -> None:
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([9.0] + 7 * [0.0])
    assert (logits.argmax(1) == 0).all()
    probs = sinkhorn(logits, 0.5)
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    assert float(probs.sum(0).max()) < 1.5 * 64 / 8


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_sinkhorn_survives_logits_that_overflow_an_exponential(scale: float) -> None:
    logits = scale * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    probs = sinkhorn(logits, 0.04)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(1), torch.ones(16))


def test_sinkhorn_has_no_center_momentum_to_tune() -> None:
    with pytest.raises(ValueError, match=r"center_momentum=0.99 has no effect with centering=sinkhorn_knopp"):
        LossConfig(centering="sinkhorn_knopp", center_momentum=0.99)
    LossConfig(centering="sinkhorn_knopp")


# KoLeo


def naive_koleo(features: Tensor) -> float:
    z = [row / row.norm() for row in features.double()]
    nearest = [min(float((a - b).norm()) for j, b in enumerate(z) if j != i) for i, a in enumerate(z)]
    return -sum(math.log(distance) for distance in nearest) / len(z)


@pytest.mark.parametrize("rows", [2, 3, 17])
def test_koleo_equals_the_search_of_every_pair(rows: int) -> None:
    features = torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows))
    assert float(koleo(features)) == pytest.approx(naive_koleo(features), rel=1e-4)


def test_koleo_pushes_neighbours_apart() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    koleo(features).backward()
    assert features.grad is not None
    moved = features.detach() - 0.01 * features.grad
    assert naive_koleo(moved) < naive_koleo(features.detach())


def test_koleo_of_equal_rows_is_finite_and_of_one_row_nothing() -> None:
    equal = torch.ones(4, 3, requires_grad=True)
    koleo(equal).backward()
    assert equal.grad is not None
    assert equal.grad.isfinite().all()
    assert float(koleo(torch.ones(1, 3))) == 0
