"""The two kernels that make the pixels: numba's, and torch's with OpenCV."""
