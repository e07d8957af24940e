"""The DINO training step, its schedules, health and checkpoints: plain Python and torch, no Ray."""
