"""Batch norm in two gloo processes against the same rows in one process."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import WORLD_SIZE, on_two_ranks, run_steps, training_config
from timm.layers import BatchNormAct2d
from tiny import NUM_IMAGES, TINY_RESNET
from torch import Tensor, nn

from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.models.sync_batch_norm import synchronise_batch_norm
from dinoray.pipeline.training.config import DINOConfig
from dinoray.pipeline.training.ddp import distribute
from dinoray.pipeline.training.state import TrainState, build_state

CPU = torch.device("cpu")
NUM_ROWS = 10
ROWS = [slice(0, 3), slice(3, NUM_ROWS)]
"""Of each rank: not as many."""


class DoubledBatchNorm(nn.BatchNorm2d):
    """A subclass whose forward does more than normalise."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(input=x, running_mean=None, running_var=None, training=True, eps=self.eps) * 2


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """One layer of each kind and the shape of a row."""
    return {
        "1d": (nn.BatchNorm1d(4), (4,)),
        "1d over length": (nn.BatchNorm1d(4), (4, 5)),
        "2d": (nn.BatchNorm2d(4), (4, 3, 2)),
        "3d": (nn.BatchNorm3d(4), (4, 3, 2, 2)),
        "cumulative": (nn.BatchNorm2d(4, momentum=None), (4, 3, 2)),
        "without statistics": (nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 2)),
        "not affine": (nn.BatchNorm2d(4, affine=False), (4, 3, 2)),
        "with activation": (BatchNormAct2d(4, act_layer=nn.SiLU), (4, 3, 2)),
        "subclass": (DoubledBatchNorm(4, eps=0.1), (4, 3, 2)),
    }


def synchronised(layer: nn.Module) -> nn.Module:
    synchronise_batch_norm(layer, CPU)
    return layer


def trained(layer: nn.Module, x: Tensor, *, rows: slice) -> dict[str, Tensor]:
    """Two forwards and a backward in float64: output, gradients and buffers."""
    torch.manual_seed(1)
    layer.double().train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    far = torch.linspace(-50, 50, 4, dtype=torch.float64).view(-1, *[1] * (x.dim() - 2))
    first, second = (x + far)[rows], (x**2)[rows].clone().requires_grad_()
    layer(first)
    y = layer(second)
    (
        y * torch.linspace(0, 1, NUM_ROWS, dtype=torch.float64)[rows].view(-1, *[1] * (x.dim() - 1))
    ).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {"output": y.detach(), "gradient of x": second.grad, **gradients, **buffers}  # type: ignore[dict-item]


def inputs(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(NUM_ROWS, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def step_configs() -> dict[str, DINOConfig]:
    """Runs of networks with batch norm in the backbone, in the head, and in both."""
    head = {"use_bn": True}
    adamw = training_config().model_dump(mode="json")
    return {
        name: DINOConfig.model_validate(
            {**adamw, **{section: {**adamw[section], **values} for section, values in changes.items()}}
        )
        for name, changes in {
            "backbone": {"backbone": TINY_RESNET},
            "head": {"head": head},
            "both, two microbatches": {
                "backbone": TINY_RESNET,
                "head": head,
                "train": {"accumulate_steps": 2},
            },
            "timm's norm with activation": {
                "backbone": {"name": "mobilenetv3_small_050", "kwargs": {}, "drop_path_rate": 0.0},
                "crops": {"global_crop_size": 32, "local_crop_size": 16},
            },
        }.items()
    }


def steps(config: DINOConfig, *, rank: int | None = None) -> dict[str, Any]:
    """What some steps of the real training come to, alone or as a rank."""
    state = build_state(config, num_images=NUM_IMAGES)
    state.student = distribute(state.dino, CPU)
    share = config.train.global_batch_size // (1 if rank is None else WORLD_SIZE)
    rows = slice((rank or 0) * share, ((rank or 0) + 1) * share)
    first_gradients: dict[str, Tensor] = {}
    state.optimizer.register_step_pre_hook(lambda *_: keep_gradients(state, first_gradients))
    metrics, centers = run_steps(state, rows=rows)
    return {
        "losses": [one["loss"] for one in metrics],
        "gradients": first_gradients,
        "centers": centers,
        "weights": {name: value.clone() for name, value in state.dino.state_dict().items()},
    }


def keep_gradients(state: TrainState, kept: dict[str, Tensor]) -> None:
    if not kept:
        kept |= {
            name: p.grad.clone() for name, p in state.dino.student.named_parameters() if p.grad is not None
        }


def work(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": {}, "steps": {}}
    for name, (layer, shape) in layers().items():
        found["layers"][name] = trained(synchronised(nn.Sequential(layer)), inputs(shape), rows=ROWS[rank])
    empty = synchronised(nn.BatchNorm2d(4))
    found["one rank without rows"] = trained(empty, inputs((4, 3, 2)), rows=[slice(0), slice(NUM_ROWS)][rank])
    for name, config in step_configs().items():
        found["steps"][name] = steps(config, rank=rank)
    if rank == 0:  # nobody answers
        empty.eval()(inputs((4, 3, 2)))
    dist.barrier()
    found["single value"] = ""
    try:
        synchronised(nn.BatchNorm1d(4))(torch.zeros(1 - rank, 4))
    except ValueError as error:
        found["single value"] = str(error)
    return found


@cache
def two_ranks() -> list[dict[str, Any]]:
    return on_two_ranks(work)


@pytest.mark.parametrize("name", layers())
def test_two_processes_normalise_as_one_forward_and_backward(name: str) -> None:
    layer, shape = layers()[name]
    alone = trained(nn.Sequential(layer), inputs(shape), rows=slice(NUM_ROWS))
    first, second = (found["layers"][name] for found in two_ranks())
    assert alone.keys() == first.keys() == second.keys()
    for what, expected in alone.items():
        if what in ("output", "gradient of x"):
            together = torch.cat([first[what], second[what]])
        elif what.startswith("gradient"):
            together = first[what] + second[what]
        else:
            assert torch.equal(first[what], second[what])
            together = first[what]
        torch.testing.assert_close(together, expected, rtol=1e-9, atol=1e-9, msg=what)


def test_a_process_without_rows_takes_part() -> None:
    alone = trained(nn.BatchNorm2d(4), inputs((4, 3, 2)), rows=slice(NUM_ROWS))
    first, second = (found["one rank without rows"] for found in two_ranks())
    assert len(first["output"]) == 0
    torch.testing.assert_close(second["output"], alone["output"], rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], alone[name], rtol=1e-9, atol=1e-9)


def test_a_single_value_over_all_processes_is_refused_as_by_torch() -> None:
    for found in two_ranks():
        assert "more than 1 value per channel" in found["single value"]


@cache
def alone(name: str) -> dict[str, Any]:
    return steps(step_configs()[name])


@pytest.mark.parametrize("name", step_configs())
def test_steps_of_two_workers_equal_those_of_one(name: str) -> None:
    one = alone(name)
    for found in two_ranks():
        together = found["steps"][name]
        assert together["losses"] == pytest.approx(one["losses"], rel=1e-5)
        torch.testing.assert_close(together["centers"], one["centers"], rtol=1e-3, atol=1e-5)
        assert together["gradients"].keys() == one["gradients"].keys()
        for parameter, gradient in one["gradients"].items():
            torch.testing.assert_close(
                together["gradients"][parameter], gradient, rtol=1e-3, atol=1e-5, msg=parameter
            )


@pytest.mark.parametrize("name", step_configs())
def test_workers_end_with_equal_weights_and_buffers_bit_for_bit(name: str) -> None:
    first, second = (found["steps"][name]["weights"] for found in two_ranks())
    assert first.keys() == second.keys() == alone(name)["weights"].keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_conversion_for_gpus_keeps_the_activation_of_timms_norm() -> None:
    config = BackboneConfig(name="mobilenetv3_small_050")
    network = build_backbone(config, crop_sizes=(32,), drop_path_rate=0.0).eval()
    x, names = torch.rand(2, 3, 32, 32), list(network.state_dict())
    expected = network(x)
    synchronise_batch_norm(network, torch.device("cuda"))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in network.modules()) > 10
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(x), expected)


def test_synchronising_twice_changes_nothing_more() -> None:
    layer = synchronised(nn.BatchNorm2d(4))
    kind = type(layer)
    assert type(synchronised(layer)) is kind is not nn.BatchNorm2d
