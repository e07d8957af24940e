"""Images in motion and training in motion: sources, crops, the Ray Data plan, the training step, checkpoints."""
