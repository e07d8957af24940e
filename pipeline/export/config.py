"""Settings of embeddings."""

from typing import Literal

Dtype = Literal["float16", "float32"]
"""dtype of the vectors in the parts."""
Precision = Literal["fp32", "bf16"]
"""Precision of the forward pass."""
