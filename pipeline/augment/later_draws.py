"""Draw what was added to the parameters of a crop later: vertical flips, quarter turns, changes of stains.

The row of random numbers of a crop is full, and a longer row would change the crops of all runs. These draws take the
lower bits of numbers whose upper bits decide something else: 33 of 53 bits, uniform and independent of the upper ones.
"""

import math
from typing import Any

from dinoray.pipeline.augment.jit import compiled

# Columns of CropParams.table, behind those of params.py.
VERTICAL_FLIP, QUARTER_TURN, STAINS = 17, 18, 19
NUM_STAINS = 3
NUM_COLUMNS = STAINS + 2 * NUM_STAINS


@compiled
def finer(uniform: float) -> float:
    """Return a uniform number in [0, 1) from the lower 33 bits of another one."""
    shifted = uniform * 1048576.0
    return shifted - math.floor(shifted)


@compiled
def draw_later(
    u: Any, vertical_flip_prob: float, quarter_turn_prob: float, strength: float, crop: Any
) -> None:
    """Fill the columns of this file from the numbers `u` [11] behind those of the box."""
    crop[VERTICAL_FLIP] = finer(u[0]) < vertical_flip_prob
    crop[QUARTER_TURN] = finer(u[1]) < quarter_turn_prob
    if strength > 0:
        for i in range(NUM_STAINS):
            crop[STAINS + i] = 1 + strength * (2 * finer(u[3 + i]) - 1)
            crop[STAINS + NUM_STAINS + i] = strength * (2 * finer(u[6 + i]) - 1)
