"""A step, its input and a save on a GPU: the numbers of a CPU, and a host that waits for nothing.

These need neither Ray nor storage: `benchmarks/gpu_session.py` runs them where only torch and timm are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_IMAGES, TINY_RESNET, tiny_batch, tiny_config
from tiny_states import save, weights

from dinoray.models.compiled import Compilation
from dinoray.models.loss import cross_entropy, teacher_probs
from dinoray.pipeline.storage.files import Directory
from dinoray.pipeline.training.bad_images import Quarantine
from dinoray.pipeline.training.staging import DEVICE_COLUMNS, staged
from dinoray.pipeline.training.state import TrainState, build_state
from dinoray.pipeline.training.state_copy import StateCopy
from dinoray.pipeline.training.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")
MODES = ["off", "on"]
"""Of train.compile."""


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """Without TF32, whose products have three digits."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")


def started(mode: str, device: torch.device = GPU, **changes: dict[str, Any]) -> TrainState:
    train = {"compile": mode, "precision": "fp32", **changes.pop("train", {})}
    state = build_state(tiny_config(train=train, **changes), num_images=NUM_IMAGES, device=device)
    if device == GPU:
        state.compile()
    return state


def on_gpu(state: TrainState, seed: int) -> dict[str, torch.Tensor]:
    batch = tiny_batch(state.config, seed=seed)
    return {name: torch.from_numpy(batch[name]).to(GPU) for name in DEVICE_COLUMNS if name in batch}


@pytest.mark.parametrize("mode", MODES)
def test_steps_have_the_numbers_of_a_cpu(mode: str) -> None:
    sgd = {"name": "sgd"}  # AdamW makes a step of the rounding of a gradient that is 0
    there, here = started(mode, optim=sgd), started("off", torch.device("cpu"), optim=sgd)
    for seed in range(3):
        batch = tiny_batch(here.config, seed=seed)
        theirs, ours = (float(train_step(state, batch)["loss"]) for state in (there, here))
        assert theirs == pytest.approx(ours, rel=1e-4)
    found = {name: value.cpu() for name, value in weights(there).items()}
    torch.testing.assert_close(found, weights(here), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", [{"drop_path_rate": 0.1}, TINY_RESNET], ids=["vit", "resnet"])
def test_the_host_waits_for_nothing_and_compiles_nothing_after_the_first_step(
    mode: str, backbone: dict[str, Any]
) -> None:
    if mode == "on" and "name" in backbone:
        pytest.skip("it has no blocks to compile")
    state = started(mode, backbone=backbone, train={"precision": "bf16", "accumulate_steps": 2})
    batches = [on_gpu(state, seed) for seed in range(4)]
    for batch in batches[:2]:
        train_step(state, batch)
    torch.cuda.set_sync_debug_mode("error")
    metrics = [train_step(state, batch) for batch in batches[2:]]
    torch.cuda.set_sync_debug_mode("default")
    assert all(bool(torch.isfinite(one["loss"])) for one in metrics)
    assert [one.get("recompiled_graphs", 0) for one in metrics] == [0, 0]


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_the_loss_at_its_full_size_is_exact_and_holds_little_more_than_its_gradient(
    backend: str | None,
) -> None:
    K, B, temps = 65536, 8, {"student_temp": 0.1, "num_global_crops": 2}
    rng = torch.Generator(GPU).manual_seed(0)
    teacher, student = (torch.rand(crops * B, K, generator=rng, device=GPU) * 2 - 1 for crops in (2, 10))
    center = torch.zeros(K, device=GPU)
    exact = student.double().requires_grad_()
    expected = cross_entropy(torch.softmax(teacher.double() / 0.04, -1), exact, **temps).loss
    (gradient,) = torch.autograd.grad(expected, exact)
    student.requires_grad_()
    probs = teacher_probs(teacher, center, 0.04)
    with Compilation(backend).step():
        for _ in range(2):
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss = cross_entropy(probs, student, **temps).loss
            (found,) = torch.autograd.grad(loss, student)
            peak = torch.cuda.max_memory_allocated() - held
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float((found - gradient).abs().max() / gradient.abs().max()) < 1e-5
    assert peak / student.nbytes < 1.3


def test_a_save_is_the_state_at_its_step_whatever_the_next_steps_do(tmp_path: Path) -> None:
    state, copy = started("off"), StateCopy()
    train_step(state, on_gpu(state, 0))
    at_once = save(state, tmp_path / "at once")
    batches = [on_gpu(state, seed) for seed in (1, 2)]
    copy.take(state, num_images=NUM_IMAGES, quarantine=Quarantine())
    for batch in batches:
        train_step(state, batch)
    copy.write(Directory(str(tmp_path / "later")))
    assert all(buffer.is_pinned() for name, buffer in copy._buffers.items() if name.startswith("student"))
    for file in ("student.safetensors", "teacher.safetensors", "train_state.pt", "meta.json"):
        assert (tmp_path / "later" / file).read_bytes() == (at_once / file).read_bytes(), file


def test_staged_batches_arrive_in_order_with_their_values() -> None:
    batches = [tiny_batch(tiny_config(), seed=seed) for seed in range(5)]
    for sent, found in zip(batches, staged(batches, GPU), strict=True):
        for name in ("global_crops", "local_crops"):
            assert found[name].device.type == "cuda"
            assert torch.equal(found[name].cpu(), torch.from_numpy(sent[name]))
