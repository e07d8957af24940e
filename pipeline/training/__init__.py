"""The DINO step and all that a run of it must remember: plain Python and torch, no Ray."""
