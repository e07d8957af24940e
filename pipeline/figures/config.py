"""Settings of figures."""

MASS = 0.6
"""Share of a head's attention that its mask holds, as in the paper's figures."""
