"""The Ray Data plan: blocks of positions, augmentation actors, one split per train worker."""
