"""What users can set of embeddings."""

from typing import Literal

Dtype = Literal["float16", "float32"]
"""Of the vectors in the parts."""
Precision = Literal["fp32", "bf16"]
"""Of the forward that makes them."""
