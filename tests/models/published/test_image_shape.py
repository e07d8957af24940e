"""Weights of RGB networks for other channels, and position embeddings that cannot be resized."""

import pytest
import timm
import torch

from dinoray.models.errors import ConfigError
from dinoray.models.published.fit import fit_backbone

NAMES = ["test_vit", "test_convnext", "resnet10t"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_channels", [1, 5])
def test_image_equal_in_all_channels_keeps_its_features(name: str, num_channels: int) -> None:
    torch.manual_seed(0)
    rgb = timm.create_model(name, num_classes=0).eval()
    other = timm.create_model(name, num_classes=0, in_chans=num_channels).eval()
    notes: list[str] = []
    other.load_state_dict(fit_backbone(rgb.state_dict(), other, notes=notes))
    size = rgb.pretrained_cfg["input_size"][-1]
    image = torch.rand(1, 1, size, size)
    with torch.no_grad():
        ours, theirs = other(image.expand(-1, num_channels, -1, -1)), rgb(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert [f"inflated from 3 to {num_channels} channels" in note for note in notes] == [True]


def test_positions_without_a_square_grid_are_refused_with_both_numbers() -> None:
    vit = timm.create_model("test_vit", num_classes=0)
    wide = timm.create_model(
        "test_vit", num_classes=0, img_size=(160, 96)
    )  # 10 x 6 patches and a class token
    with pytest.raises(ConfigError, match=r"61 tokens, cannot be resized to the backbone's 101: .*square"):
        fit_backbone(wide.state_dict(), vit)
