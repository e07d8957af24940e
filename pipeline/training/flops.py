"""The arithmetic of a step: its FLOPs per image, and how fast a device multiplies matrices. No data, no Ray.

MFU (model FLOPs utilisation, arXiv 2204.02311) is the share of the second that the first one needs: it counts what the
networks compute, not what an implementation computes twice.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinoray.models.backbone import build_backbone, embed_dim
from dinoray.models.head import DINOHead
from dinoray.models.input_channels import in_chans
from dinoray.models.partial import freeze
from dinoray.pipeline.training.config import DINOConfig

_SIDES = {"cuda": 8192, "cpu": 512}
"""Side of the square matrices that are multiplied, by type of device: large enough for its full rate."""
_PRODUCTS, _ROUNDS = 10, 5


@dataclass(frozen=True)
class Utilisation:
    """What the devices of a run do, from its images per second."""

    flops_per_image: float
    matmul_rate: float
    """FLOP/s of one device in large matrix products."""
    num_devices: int

    @classmethod
    def of_run(cls, config: DINOConfig, device: torch.device, *, num_devices: int) -> "Utilisation | None":
        """Measure this device; None on a CPU, and for a network that cannot be counted."""
        if device.type != "cuda":
            return None
        try:
            dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
            return cls(flops_per_image(config), matmul_rate(device, dtype), num_devices)
        except RuntimeError:  # not every network runs on the meta device
            return None

    def at(self, images_per_second: float) -> dict[str, float]:
        """Return `tflops`, TFLOP/s of each device, and `mfu`, its share of what the device can, 0 to 1."""
        each = images_per_second * self.flops_per_image / self.num_devices
        return {"tflops": each / 1e12, "mfu": each / self.matmul_rate}


def flops_per_image(config: DINOConfig) -> float:
    """Return the FLOPs of one training step per image, a multiplication and an addition counted as two.

    A forward of the teacher for each global crop, and of the student for each crop; a backward takes as many as two
    forwards, or what is counted if a part of the backbone is frozen. Matrix products, convolutions and attention count;
    the rest of a step is below a hundredth. Counted on networks without memory, on the meta device. `head.out_dim`
    must be a number.
    """
    crops = config.crops
    with torch.device("meta"):
        backbone = build_backbone(
            config.backbone, crop_sizes=crops.crop_sizes, drop_path_rate=0.0, in_chans=crops.channels
        )
        head = DINOHead(config.head, in_dim=embed_dim(backbone))
        of_head = 2 * sum(p.numel() for p in head.parameters() if p.ndim == 2 and p.shape[1] > 1)
        # In eval mode batch norm needs no second image.
        forward = {size: of_head + _forward(backbone.eval(), size) for size in crops.crop_sizes}
        both = {size: 3 * flops for size, flops in forward.items()}
        if config.backbone.train != "all":
            freeze(backbone, config.backbone, crop_size=min(crops.crop_sizes))
            both = {size: 3 * of_head + _both_ways(backbone.eval(), size) for size in crops.crop_sizes}
    of_globals = crops.num_global_crops * (forward[crops.global_crop_size] + both[crops.global_crop_size])
    return of_globals + crops.num_local_crops * both.get(crops.local_crop_size, 0.0)


def _forward(backbone: nn.Module, size: int) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        backbone(torch.empty(1, in_chans(backbone), size, size))
    return float(counted.get_total_flops())


def _both_ways(backbone: nn.Module, size: int) -> float:
    """Return the FLOPs of a forward and of the backward to all that trains."""
    with FlopCounterMode(display=False) as counted:
        backbone(torch.empty(1, 3, size, size)).sum().backward()
    return float(counted.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of products of large square matrices on `device`: the median of a few short measurements.

    Its products are 66 TFLOP on a GPU, a tenth of a second at 700 TFLOP/s, and take 0.4 GB in bfloat16.
    """
    side = _SIDES.get(device.type, _SIDES["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    rates = []
    for _ in range(1 + _ROUNDS):  # the first one chooses an algorithm
        _wait(device)
        begin = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(a, b, out=out)
        _wait(device)
        rates.append(2 * side**3 * _PRODUCTS / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
