"""The DINO algorithm: backbones, head, loss, schedules, optimiser. Uses torch and timm; no Ray, no
storage."""
