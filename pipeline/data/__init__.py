"""Which images there are, where their bytes come from, and in which order."""
