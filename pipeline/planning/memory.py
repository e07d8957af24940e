"""How much memory a training step needs on one device, by arithmetic: for plain ViTs of timm. No torch.

Counted are the tensors that are alive at once, in the three moments of a step that may be its peak: when the loss has
its gradient, when a block's gradient is computed, and when the teacher follows. What a device needs besides (the
driver's context, workspaces of libraries, gaps between tensors) is not counted. Blocks are taken to be eager: what
compiled ones keep (train.compile) is not modelled. Of a frozen part (backbone.train) there is one copy and no gradient.
Axes: b images of a microbatch, G global crops, V = G + L crops, K prototypes, D width.
"""

import re
from itertools import pairwise, product
from typing import Any, NamedTuple, get_args

from dinoray.models.config import Checkpointing, TrainedPart
from dinoray.models.settings import number
from dinoray.pipeline.data.partition import batch_size_per_worker, num_microbatches
from dinoray.pipeline.training.auto import resolve
from dinoray.pipeline.training.config import DINOConfig

_SIZES = {
    "tiny": (192, 12, 4.0),
    "small": (384, 12, 4.0),
    "base": (768, 12, 4.0),
    "large": (1024, 24, 4.0),
    "huge": (1280, 32, 4.0),
    "giant": (1408, 40, 48 / 11),
    "gigantic": (1664, 48, 64 / 13),
}
"""Width, depth and hidden width of the MLP as a multiple of the width, in timm."""
_NAME = re.compile(rf"vit_({'|'.join(_SIZES)})_patch(\d+)_\d+(\.\w+)?")
_MOMENTS = {"adamw": 2, "lars": 1, "sgd": 1}
_LEAST_IMAGES = 8
"""Of a microbatch, below which a GPU computes at less than its rate: an assumption."""
_KNOWN = {"embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size"}


class Vit(NamedTuple):
    """What decides the size of a plain ViT, and the part of it that trains."""

    width: int
    depth: int
    hidden: int
    patch: int
    part: TrainedPart

    @classmethod
    def of(cls, config: DINOConfig) -> "Vit | None":
        """Return that of a config; None for another network, or arguments whose effect is not known here."""
        found, given = _NAME.fullmatch(config.backbone.name), config.backbone.kwargs
        if found is None or not given.keys() <= _KNOWN:
            return None
        width, depth, ratio = _SIZES[found[1]]
        width = given.get("embed_dim", width)
        hidden = int(width * given.get("mlp_ratio", ratio))
        depth, patch = given.get("depth", depth), given.get("patch_size", int(found[2]))
        return cls(width, depth, hidden, patch, config.backbone.trained_part)

    @property
    def num_backward(self) -> int:
        """The blocks that gradients pass."""
        return min(self.part.number, self.depth) if self.part.kind == "last_n" else self.depth

    @property
    def rank(self) -> int:
        """The rank of the adapters; 0 without."""
        return self.part.number if self.part.kind == "lora" else 0

    def tokens(self, size: int) -> int:
        """Return the tokens of a crop of `size` px, the class token among them."""
        return (size // self.patch) ** 2 + 1

    def num_parameters(self, size: int) -> int:
        """Return the parameters, with position embeddings for crops of `size` px."""
        d = self.width
        return self.num_of_blocks(self.depth) + (3 * self.patch**2 + 1) * d + (self.tokens(size) + 1) * d

    def num_of_blocks(self, num_blocks: int) -> int:
        """Return the parameters of so many blocks and of the norm after them."""
        d, m = self.width, self.hidden
        return num_blocks * (4 * d * d + 4 * d + 2 * d * m + m + d + 4 * d) + 2 * d

    def num_trained(self, size: int) -> int:
        """Return the parameters that train; of adapters: those of qkv, proj and both layers of the MLP."""
        if self.part.kind == "all":
            return self.num_parameters(size)
        if self.part.kind == "last_n":
            return self.num_of_blocks(self.num_backward)
        return self.depth * self.rank * (8 * self.width + 2 * self.hidden)

    def block(self, tokens: int, half: int) -> int:
        """Return the bytes that a block keeps; `half`: bytes of a number that autocast casts.

        The residual stream before each norm; the norms' outputs, q, k, v and attention's output; both sides of the
        GELU; the middle of four adapters.
        """
        return (8 * self.width + half * (6 * self.width + 2 * self.hidden + 4 * self.rank)) * tokens

    def kept(self, tokens: int, half: int, mode: Checkpointing) -> int:
        """Return the bytes that the backbone keeps for its backward pass: of a block that is recomputed, its input."""
        depth = self.num_backward
        recomputed = {"none": 0, "selective": (depth + 1) // 2, "full": depth}[mode]
        inputs = (recomputed + 1) * 4 * self.width * tokens
        return (depth - recomputed) * self.block(tokens, half) + inputs

    def during(self, tokens: int, half: int, mode: Checkpointing) -> int:
        """Return the bytes that the backward pass of the last blocks needs beside what is kept.

        Gradients of the residual stream, twice, and of both sides of the GELU; and a recomputed block, unless a block
        that is not recomputed comes before it and makes room.
        """
        makes_room = mode == "none" or (mode == "selective" and self.num_backward % 2 == 0)
        gradients = (8 * self.width + half * 2 * self.hidden) * tokens
        return gradients + (0 if makes_room else self.block(tokens, half))


class Memory(NamedTuple):
    """Bytes on one device. `held` all the time, the others in the moment that is the peak."""

    held: int
    """Student, teacher, what they share once, and moments; with several workers the gradients too."""
    activations: int
    """What the backward pass keeps, crops and casted weights among it."""
    logits: int
    """Of student and teacher, targets, gradient, and what the loss needs."""
    gradients: int
    """Unless they are held all the time; and the teacher's next values."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


def memory_of(config: DINOConfig, *, num_images: int, train_workers: int, bf16: bool) -> Memory | None:
    """Return what a step needs on each device; None for a backbone that is not a plain ViT.

    Raises ConfigError if the batch cannot be divided among the workers.
    """
    config, vit = resolve(config, num_images=num_images).config, Vit.of(config)
    if vit is None:
        return None
    each = batch_size_per_worker(config.train.global_batch_size, train_workers)
    images = each // num_microbatches(
        each, config.train.accumulate_steps, config.train.max_batch_size_per_worker
    )
    crops, head, d = config.crops, config.head, vit.width
    num_global, num_crops = crops.num_global_crops, crops.num_global_crops + crops.num_local_crops
    out_dim, rows = number(head.out_dim), images * num_crops
    widths = [d, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim]
    head_parameters = sum(n * m + m for n, m in pairwise(widths))
    prototypes = out_dim * head.bottleneck_dim
    backbone = vit.num_trained(crops.global_crop_size)
    parameters = 4 * (backbone + head_parameters + prototypes + out_dim)  # that train
    # Adapters come on top of what is frozen.
    frozen = 4 * (vit.num_parameters(crops.global_crop_size) - (0 if vit.rank else backbone))

    half = 2 if bf16 else 4  # bytes of what autocast casts
    sizes = ((crops.global_crop_size, num_global), (crops.local_crop_size, crops.num_local_crops))
    calls = [
        images * count * vit.tokens(size) for size, count in sizes
    ]  # tokens of each call of the backbone
    pixels = (
        images * sum(crops.channels * count * size**2 for size, count in sizes) * (4 + (2 if bf16 else 0))
    )
    of_head = rows * (half * (2 * sum(widths[1:-1]) + d) + 12 * head.bottleneck_dim) + 4 * prototypes
    casts = 2 * (backbone + head_parameters) if bf16 else 0
    besides = pixels + casts + of_head

    is_shared = train_workers > 1
    held = (2 + _MOMENTS[config.optim.name] + is_shared) * parameters + frozen
    gradients = 0 if is_shared else parameters
    of_head_gradients = 0 if is_shared else 4 * (head_parameters + prototypes)
    one = 4 * images * out_dim  # logits of one crop of each image
    seen = (2 * num_global + num_crops) * one
    mode = config.train.activation_checkpointing
    # Autocast keeps the casts of weights that train for all calls, those of others for each call anew.
    cast_again = 2 * vit.num_of_blocks(vit.depth) if bf16 and vit.rank else 0
    kept = [vit.kept(n, half, mode) + (cast_again if n else 0) for n in calls]
    moments = [
        Memory(held, besides + sum(kept), seen + num_crops * one + max(2 * one, 8 * prototypes), 0),
        # The backward pass goes through the calls from the last to the first.
        *(
            Memory(held, besides + sum(kept[: i + 1]) + vit.during(n, half, mode), seen, of_head_gradients)
            for i, n in enumerate(calls)
        ),
        Memory(held, pixels + casts, seen, gradients),
        Memory(held, 0, 0, gradients + parameters),
    ]
    return max(moments, key=lambda memory: memory.total)


def fitting(
    config: DINOConfig, limit: float, *, num_images: int, train_workers: int, bf16: bool
) -> dict[str, Any] | None:
    """Return the settings of `train` to change so that a step needs at most `limit` bytes; None if there are none.

    Microbatches are tried before activation checkpointing, which takes time, but not below 8 images unless nothing else
    fits. What is set already only grows.
    """
    train = config.train
    each = batch_size_per_worker(train.global_batch_size, train_workers)
    parts = [n for n in range(train.accumulate_steps, each + 1, train.accumulate_steps) if each % n == 0]
    modes = get_args(Checkpointing)
    modes = modes[modes.index(train.activation_checkpointing) :]
    large = [n for n in parts if n == train.accumulate_steps or each // n >= _LEAST_IMAGES]
    for mode, num_parts in (*product(modes, large), *product(modes, parts)):
        change = {"accumulate_steps": num_parts, "activation_checkpointing": mode}
        changed = config.model_copy(update={"train": train.model_copy(update=change)})
        found = memory_of(changed, num_images=num_images, train_workers=train_workers, bf16=bf16)
        if found is not None and found.total <= limit:
            return {name: value for name, value in change.items() if value != getattr(train, name)}
    return None
