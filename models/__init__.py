"""The DINO algorithm: backbones, head, loss, schedules, optimiser. Knows torch and timm, nothing of Ray or storage."""
