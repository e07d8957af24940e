"""Processes of the tests that find this file start in less time, as Python imports it by itself before all else.

PyTorch, Ray and timm make a million objects that stay. With Python's own threshold, a train worker looks at them again
and again for a fifth of its start.
"""

import gc

gc.set_threshold(50_000, 20, 20)
