"""Recipes for images of one kind, which have no up and down: tissue, land from above, cells, surfaces.

As recipes.py. Networks and training are the published ViT-S/16 with a head sized by the number of images, for one
machine; what is of a domain is its crops. No accuracy was published for these settings as a whole. Except for tissue,
no crop has a change that needs red, green and blue, so each recipe takes any `data.channels`.
"""

from typing import Any

Tree = dict[str, Any]

_NO_COLOURS = {"saturation": 0, "hue": 0, "gray_prob": 0}


def pathology() -> Tree:
    """Tissue stained with H&E, in RGB: any orientation, other stains instead of other hues, weaker crops.

    Laboratories differ in how strongly they stain, so the amounts of the stains are changed; hue and grayscale, which
    no slide has, are nearly left out. Shapes of cells tell tissues apart, so regions are larger and squarer than of
    photos, and no crop is solarized.

    Source: vertical flips, stain augmentation and weaker colours of Kang et al. (arXiv 2212.04690); HED jitter of
    Tellez et al. (arXiv 1902.06543), whose light one is 0.05, here of optical densities; crops that keep shapes, as
    Zimmermann et al. (arXiv 2405.01688) advise. Unverified: values are ours or quoted from memory.
    Command: dinoray pretrain --recipe pathology data.path=s3://BUCKET/tiles
    """
    crops = {
        "global_crop_scale": [0.5, 1.0],
        "local_crop_scale": [0.1, 0.5],
        "aspect_ratio": [0.9, 1.1],
        "hed_jitter": 0.05,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.1,
        "hue": 0.02,
        "gray_prob": 0.02,
        "global_solarize_prob": [0.0, 0.0],
    }
    return _tree(crops)


def satellite() -> Tree:
    """Land from above, in any number of bands: any orientation, brightness and contrast of each band.

    Source: SSL4EO-S12 (arXiv 2211.07044), pretrain_dino_s2c.py of its code: crops, brightness and contrast of 0.4,
    blur, solarization and ViT-S/16 for 100 epochs; its grayscale, a mean of all bands, is left out. Vertical flips and
    quarter turns are ours.
    Command: dinoray pretrain --recipe satellite data.path=s3://BUCKET/tiles data.channels=13
    """
    return _tree(_NO_COLOURS)


def microscopy() -> Tree:
    """Cells in any number of fluorescent channels: any orientation, brightness and contrast of each, no blur.

    Source: DINO4Cells (Doron et al., 2023), config.yaml of its code: both flips, brightness and contrast with a
    probability of 0.5, no blur, no solarization, the crops of DINO, 100 epochs. Its strengths, its ViT-B and its
    removal of whole channels are not taken over; quarter turns are ours.
    Command: dinoray pretrain --recipe microscopy data.path=s3://BUCKET/cells data.channels=4
    """
    crops = {
        "jitter_prob": 0.5,
        "global_blur_prob": [0.0, 0.0],
        "local_blur_prob": 0.0,
        "global_solarize_prob": [0.0, 0.0],
    }
    return _tree(_NO_COLOURS | crops)


def industrial() -> Tree:
    """Surfaces and parts under constant light, gray or RGB: any orientation, large regions, weak changes.

    A defect is a small change of texture or brightness, so crops keep most of the resolution and little is blurred.
    Where parts always lie the same way, set the flips and turns to 0.

    Source: ours, by the reasons above; not measured.
    Command: dinoray pretrain --recipe industrial data.path=PHOTOS data.channels=1
    """
    crops = {
        "global_crop_scale": [0.6, 1.0],
        "local_crop_scale": [0.15, 0.6],
        "brightness": 0.2,
        "contrast": 0.2,
        "global_blur_prob": [0.2, 0.1],
        "local_blur_prob": 0.1,
        "blur_sigma": [0.1, 1.0],
        "global_solarize_prob": [0.0, 0.0],
    }
    return _tree(_NO_COLOURS | crops)


def _tree(crops: Tree) -> Tree:
    return {
        "crops": {"vertical_flip_prob": 0.5, "quarter_turn_prob": 0.5, **crops},
        "backbone": {"name": "vit_small_patch16_224"},
        "head": {"out_dim": "auto"},
        "teacher": {"teacher_momentum": "auto"},
        "train": {"epochs": 100, "global_batch_size": 256},
    }
