"""The stains of H&E slides: from levels of red, green and blue to optical densities, and back.

Ruifrok and Johnston, Quantification of histochemical staining by color deconvolution (2001): a pixel's optical
densities are the sum of the amounts of hematoxylin, eosin and DAB, each times the densities of that stain. Both
kernels read the tables here. No pixels, no random numbers and no Ray here.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

STAINS: npt.NDArray[np.float64] = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Densities of hematoxylin, eosin and DAB in red, green and blue."""
AMOUNTS: npt.NDArray[Any] = np.linalg.inv(STAINS)
"""Amounts of the three stains for a density of 1 in red, green and blue."""

STEPS = 4096
"""Steps of the table of levels for a density of 1: a step is at most 0.15 levels."""
_BLACK = 0.25
"""The level that black is taken for, since its density would be infinite; it becomes 0 again."""

DENSITIES: npt.NDArray[np.float32] = -np.log10(np.maximum(np.arange(256), _BLACK) / 255).astype(np.float32)
"""Optical density of each level."""
LEVELS: npt.NDArray[np.uint8] = np.rint(255 * 10 ** (-np.arange(int(3.1 * STEPS)) / STEPS)).astype(np.uint8)
"""Level of each step of the density."""
