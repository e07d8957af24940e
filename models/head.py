"""DINOHead: features -> logits over K prototypes.

MLP -> L2-normalised bottleneck -> weight-normed linear layer without bias (DINO, arXiv 2104.14294, appendix C).
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoray.models.config import HeadConfig
from dinoray.models.settings import number


class PrototypeLayer(nn.Module):
    """Weight-normed linear layer without bias: `x @ (g * v / |v|).T`.

    Parameters have the published checkpoints' names: `weight_g` [K, 1], `weight_v` [K, bottleneck].
    """

    def __init__(self, in_dim: int, out_dim: int, *, frozen_magnitude: bool) -> None:
        super().__init__()
        # The order of the parameters determines their numbers in a saved optimiser.
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not frozen_magnitude)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))
        # The teacher: the same without writing the normalised matrix, which is larger than its logits.
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(x, self.weight_v).mul_((self.weight_g / lengths).squeeze(1))


class DINOHead(nn.Module):
    """Maps features [N, D] to float32 logits [N, K]."""

    def __init__(self, config: HeadConfig, *, in_dim: int) -> None:
        super().__init__()
        widths = [in_dim] + [config.hidden_dim] * (config.num_layers - 1) + [config.bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            if i > 0:
                if config.use_bn:
                    layers.append(nn.BatchNorm1d(n_in))
                layers.append(nn.GELU())
            layers.append(nn.Linear(n_in, n_out))
        # In the published code a head of one layer is a bare Linear; this gives the same state-dict names.
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.mlp.apply(_init_linear)
        self.last_layer = PrototypeLayer(
            config.bottleneck_dim, number(config.out_dim), frozen_magnitude=config.norm_last_layer
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        # float32 from the bottleneck on: at a temperature of 0.04 a bfloat16 logit has an error of up to
        # 0.06.
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(F.normalize(x.float(), dim=-1))


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
