"""FLOPs of a step: published figures, a count by hand, and the share of a device that they take."""

import pytest
import torch
from tiny import tiny_config

from dinoray.pipeline.training.flops import Utilisation, flops_per_image, matmul_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "gflops"), [("vit_small_patch16_224", 9.2), ("resnet50", 8.2)])
def test_flops_of_known_networks(name: str, gflops: float) -> None:
    """Published: 4.6 and 4.1 billion multiplications for an image of 224 px, two FLOPs each."""
    config = tiny_config(
        crops={"num_local_crops": 0, "global_crop_size": 224},
        backbone={"name": name, "kwargs": {}},
        head={"out_dim": 2, "hidden_dim": 2, "bottleneck_dim": 2},
    )
    # Two global crops: a forward of the teacher, and three of the student.
    assert flops_per_image(config) / 8 / 1e9 == pytest.approx(gflops, rel=0.02)


def test_flops_add_up_over_crops_and_layers() -> None:
    """By hand: a block has 12 D^2 + 2 N D multiplications per token; N tokens, D wide."""

    def block(tokens: int, width: int = 32) -> int:
        return 2 * tokens * (12 * width**2 + 2 * tokens * width)

    def network(tokens: int) -> int:
        patches = 2 * (tokens - 1) * 32 * 3 * 16
        head = 2 * (32 * 256 + 256 * 256 + 256 * 16 + 16 * 32)
        return patches + 2 * block(tokens) + head

    of_global, of_local = network(17), network(5)
    assert flops_per_image(tiny_config()) == 2 * of_global + 3 * (2 * of_global + 2 * of_local)


def test_a_frozen_part_costs_a_forward() -> None:
    """No backward before the last block; adapters need gradients of all inputs, but of no frozen weight."""
    crops, head = {"num_local_crops": 0}, {"out_dim": 2, "hidden_dim": 2, "bottleneck_dim": 2}
    whole, last, lora = (
        flops_per_image(tiny_config(crops=crops, head=head, backbone={"train": part}))
        for part in ("all", "last_n(1)", "lora(1)")
    )
    # Of the 4 forwards of two blocks, a backward through one block saves that of the other; lora half a backward.
    assert last / whole == pytest.approx(3 / 4, abs=0.03)
    assert lora / whole == pytest.approx(3 / 4, abs=0.05)


def test_a_device_has_a_rate() -> None:
    assert 1e8 < matmul_rate(CPU, torch.float32) < 1e15


def test_utilisation_is_of_one_device() -> None:
    """Two devices of 1,000 TFLOP/s, 8,000 images/s of 100 GFLOP."""
    found = Utilisation(100e9, 1000e12, 2).at(8000.0)
    assert found == {"tflops": pytest.approx(400), "mfu": pytest.approx(0.4)}


def test_a_cpu_has_none() -> None:
    assert Utilisation.of_run(tiny_config(), CPU, num_devices=1) is None
