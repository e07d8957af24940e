"""The pipelines that benchmarks/augment.py compares with ours: the published pipeline, and libraries.

Each function takes the config of the crops and returns a function from the bytes of a JPEG file to all crops
of the image. It imports its library when it is called, so a missing library omits only its own row. Every
library draws its own random numbers and uses its fastest form of each operation. If that form only
approximates the published operation, the docstring states it.
"""

import io
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from dinoray.pipeline.augment.config import CropKind, CropsConfig, crop_kinds

Cut = Callable[[bytes], Any]
"""Function from a file to its crops: one array per crop, or arrays that stack them."""

_BLUR_TAPS = 9
"""Blur width for libraries that need it, as in DINOv2.

It truncates a sigma of 2, and costs less than the full width.
"""


class CannotCut(Exception):  # noqa: N818 (nothing went wrong)
    """Reason why a library cannot take part with these settings."""


def look_at(name: str, crops: Any, others: Any, config: CropsConfig) -> str:
    """Return the dtype of a pipeline's crops of an image; raise an error unless they match the config.

    `others` are the pipeline's next crops of the same image: they must differ.
    """
    stacks, other_stacks = ([np.asarray(stack) for stack in made] for made in (crops, others))
    shapes = [
        shape[-3:] for stack in stacks for shape in [stack.shape] * (len(stack) if stack.ndim == 4 else 1)
    ]
    sides = [shape[1:] if shape[0] == 3 else shape[:2] for shape in shapes]
    if sides != [(kind.size, kind.size) for kind in crop_kinds(config)]:
        raise ValueError(f"{name} makes other crops than configured, of shapes {shapes}")
    if all(map(np.array_equal, stacks, other_stacks)):
        raise ValueError(f"{name} makes the same crops of an image twice: nothing in them is random")
    return str(stacks[0].dtype)


def published(config: CropsConfig) -> Cut:
    """Return DINO's published augmentation, float32, by Pillow and torchvision on Pillow images."""
    from PIL import Image, ImageFilter, ImageOps
    from torchvision import transforms as T

    def transform(kind: CropKind) -> Any:
        def blur(image: Any) -> Any:
            return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*kind.blur_sigma)))

        def solarize(image: Any) -> Any:
            return ImageOps.solarize(image, kind.solarize_threshold)

        jitter = T.ColorJitter(kind.brightness, kind.contrast, kind.saturation, kind.hue)
        steps: list[Any] = [
            T.RandomResizedCrop(
                kind.size, kind.scale, kind.aspect_ratio, interpolation=T.InterpolationMode.BICUBIC
            ),
            T.RandomHorizontalFlip(kind.flip_prob),
            T.RandomApply([jitter], kind.jitter_prob),
            T.RandomGrayscale(kind.gray_prob),
            T.RandomApply([blur], kind.blur_prob),
        ]
        if kind.solarize_prob:
            steps.append(T.RandomApply([solarize], kind.solarize_prob))
        return T.Compose([*steps, T.ToTensor(), T.Normalize(config.pixel_mean, config.pixel_std)])

    steps = [transform(kind) for kind in crop_kinds(config)]

    def cut(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [step(image) for step in steps]

    return cut


def _torchvision_v2(config: CropsConfig, decode: Callable[[bytes], Any]) -> Cut:
    import torch
    from torchvision.transforms import v2

    def transform(kind: CropKind) -> Any:
        jitter = v2.ColorJitter(kind.brightness, kind.contrast, kind.saturation, kind.hue)
        blur = v2.GaussianBlur(_BLUR_TAPS, (max(kind.blur_sigma[0], 1e-3), kind.blur_sigma[1]))
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    kind.size, kind.scale, kind.aspect_ratio, interpolation=v2.InterpolationMode.BICUBIC
                ),
                v2.RandomHorizontalFlip(kind.flip_prob),
                v2.RandomApply([jitter], kind.jitter_prob),
                v2.RandomGrayscale(kind.gray_prob),
                v2.RandomApply([blur], kind.blur_prob),
                v2.RandomSolarize(kind.solarize_threshold, kind.solarize_prob),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(config.pixel_mean, config.pixel_std),
            ]
        )

    steps = [transform(kind) for kind in crop_kinds(config)]

    def cut(data: bytes) -> Any:
        image = decode(data)
        return [step(image) for step in steps]

    return cut


def torchvision_pillow(config: CropsConfig) -> Cut:
    """Return torchvision.transforms.v2 on Pillow images."""
    from PIL import Image

    return _torchvision_v2(config, lambda data: Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_tensor(config: CropsConfig) -> Cut:
    """Return torchvision.transforms.v2 on uint8 tensors, decoded by torchvision."""
    return _torchvision_v2(config, _tensor_decoder())


def _tensor_decoder() -> Callable[[bytes], Any]:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    # A copy, because torch warns about read-only bytes.
    return lambda data: decode_jpeg(
        torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=ImageReadMode.RGB
    )


def albumentations(config: CropsConfig, *, antialias: bool = True) -> Cut:
    """Return albumentations behind the fastest available decoder, with uint8 output: its best known setup.

    Its bicubic filter does not antialias: with `antialias` a crop that shrinks is resized by area instead.
    """
    import albumentations as A
    import cv2
    import simplejpeg

    def transform(kind: CropKind) -> Any:
        steps: list[Any] = [
            A.RandomResizedCrop(
                (kind.size, kind.size),
                kind.scale,
                kind.aspect_ratio,
                interpolation=cv2.INTER_CUBIC,
                area_for_downscale="image" if antialias else None,
            ),
            A.HorizontalFlip(p=kind.flip_prob),
            A.ColorJitter(kind.brightness, kind.contrast, kind.saturation, kind.hue, p=kind.jitter_prob),
            A.ToGray(p=kind.gray_prob),
            A.GaussianBlur(blur_limit=0, sigma_limit=kind.blur_sigma, p=kind.blur_prob),
        ]
        if kind.solarize_prob:
            threshold = min(kind.solarize_threshold / 255, 1.0)
            steps.append(A.Solarize((threshold, threshold), p=kind.solarize_prob))
        return A.Compose(steps)

    steps = [transform(kind) for kind in crop_kinds(config)]

    def cut(data: bytes) -> Any:
        image = simplejpeg.decode_jpeg(data, "RGB")
        return [step(image=image)["image"] for step in steps]

    return cut


def albumentations_aliased(config: CropsConfig) -> Cut:
    """Return albumentations at its fastest: fine patterns alias in smaller crops."""
    return albumentations(config, antialias=False)


def lightly(config: CropsConfig) -> Cut:
    """Return lightly's own DINOTransform on Pillow images.

    Its defaults are the published settings but for one.
    """
    from lightly.transforms import DINOTransform
    from PIL import Image

    published_settings = CropsConfig(decode_slack=config.decode_slack, kernel=config.kernel)
    if config != published_settings:
        raise CannotCut("compared with the published settings only")
    transform = DINOTransform(n_local_views=config.num_local_crops)
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def kornia(config: CropsConfig) -> Cut:
    """Return kornia on float tensors; crops with equal settings form one batch.

    Its bicubic does not antialias.
    """
    import kornia.augmentation as K
    import torch

    def transform(kind: CropKind) -> Any:
        low, high = kind.blur_sigma
        steps: list[Any] = [
            K.RandomResizedCrop((kind.size, kind.size), kind.scale, kind.aspect_ratio, resample="BICUBIC"),
            K.RandomHorizontalFlip(kind.flip_prob),
            K.ColorJitter(kind.brightness, kind.contrast, kind.saturation, kind.hue, p=kind.jitter_prob),
            K.RandomGrayscale(p=kind.gray_prob),
            K.RandomGaussianBlur((_BLUR_TAPS, _BLUR_TAPS), (max(low, 1e-3), high), p=kind.blur_prob),
        ]
        if kind.solarize_prob:
            threshold = kind.solarize_threshold / 255
            steps.append(K.RandomSolarize((threshold, threshold), (0.0, 0.0), p=kind.solarize_prob))
        steps.append(K.Normalize(torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)))
        return torch.nn.Sequential(*steps)

    alike = [list(kinds) for _, kinds in itertools.groupby(crop_kinds(config), key=lambda kind: kind[1:])]
    steps = [(transform(kinds[0]), len(kinds)) for kinds in alike]
    decode = _tensor_decoder()

    def cut(data: bytes) -> Any:
        with torch.inference_mode():
            image = decode(data)[None].float().div_(255)
            return [step(image.expand(count, -1, -1, -1)) for step, count in steps]

    return cut


def dali(config: CropsConfig) -> Cut:
    """Return NVIDIA DALI on the CPU, one decode for all crops.

    DALI's own definitions: contrast turns about mid-gray, and hue is a linear map in one fixed order with the
    others.
    """
    from nvidia.dali import fn, pipeline_def, types

    kinds = crop_kinds(config)  # not below: DALI rewrites the function's source

    def jittered(strength: float, on: Any) -> Any:
        return 1 + on * fn.random.uniform(range=(max(-strength, -1.0), strength))

    @pipeline_def(
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
        enable_conditionals=True,
        seed=0,
    )
    def build() -> Any:
        image = fn.decoders.image(fn.external_source(name="jpeg"), device="cpu", output_type=types.RGB)
        crops = []
        for kind in kinds:
            crop = fn.random_resized_crop(
                image,
                size=[kind.size, kind.size],
                random_area=list(kind.scale),
                random_aspect_ratio=list(kind.aspect_ratio),
                interp_type=types.INTERP_CUBIC,
            )
            on = fn.cast(fn.random.coin_flip(probability=kind.jitter_prob), dtype=types.FLOAT)
            colourful = fn.cast(fn.random.coin_flip(probability=1 - kind.gray_prob), dtype=types.FLOAT)
            crop = fn.color_twist(
                crop,
                brightness=jittered(kind.brightness, on),
                contrast=jittered(kind.contrast, on),
                saturation=colourful * jittered(kind.saturation, on),
                hue=360 * on * fn.random.uniform(range=(-kind.hue, kind.hue)),
            )
            if fn.random.coin_flip(probability=kind.blur_prob, dtype=types.BOOL):
                low, high = kind.blur_sigma
                crop = fn.gaussian_blur(crop, sigma=fn.random.uniform(range=(max(low, 1e-3), high)))
            if fn.random.coin_flip(probability=kind.solarize_prob, dtype=types.BOOL):
                bright = fn.cast(crop >= kind.solarize_threshold, dtype=types.UINT8)
                crop = crop * (1 - bright) + (255 - crop) * bright
                crop = fn.cast(crop, dtype=types.UINT8)
            crops.append(
                fn.crop_mirror_normalize(
                    crop,
                    mirror=fn.random.coin_flip(probability=kind.flip_prob),
                    mean=[255 * mean for mean in config.pixel_mean],
                    std=[255 * std for std in config.pixel_std],
                    dtype=types.FLOAT,
                )
            )
        return tuple(crops)

    pipeline = build()
    pipeline.build()

    def cut(data: bytes) -> Any:
        pipeline.feed_input("jpeg", [np.frombuffer(data, np.uint8)])
        return [crop.at(0) for crop in pipeline.run()]

    return cut
