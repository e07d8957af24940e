"""Networks and files of weights that cannot be used: following the message's remedy ends the error."""

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from remedies import settings_to_set
from torch import nn

from dinoray.models.attention import cls_attention, patch_size
from dinoray.models.backbone import build_backbone
from dinoray.models.config import BackboneConfig
from dinoray.models.errors import ConfigError, DataError, DinorayError
from dinoray.models.published.checkpoint import read_weights

SMALL: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}

# Attention


def without_class_token() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=0)


def with_oblong_patches() -> nn.Module:
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **SMALL)
    network.patch_embed.patch_size = (4, 8)
    return network


@pytest.mark.parametrize("network", [without_class_token, with_oblong_patches])
def test_the_network_that_is_named_has_attention_maps(network: Callable[[], nn.Module]) -> None:
    with pytest.raises(
        ConfigError, match=r"; attention maps need a ViT with a class token, e\.g\. (\w+)$"
    ) as error:
        patch_size(network())
    name = str(error.value).rpartition(" ")[2]
    named = timm.create_model(name, num_classes=0, img_size=16, **SMALL)
    assert patch_size(named) == 4
    assert cls_attention(named, torch.zeros(1, 3, 16, 16)).shape == (1, 3, 4, 4)


def test_a_network_with_the_option_that_is_named_takes_any_size() -> None:
    images = torch.zeros(1, 3, 20, 16)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **SMALL)
    with pytest.raises(ConfigError, match=r"; take a backbone with (\w+), which takes any size$") as error:
        cls_attention(network, images)
    found = re.search(r"a backbone with (\w+)", str(error.value))
    assert found
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=16, **{found[1]: True}, **SMALL
    )
    assert cls_attention(network, images).shape == (1, 3, 5, 4)


# Backbones


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("vit_tiny_patch16_224", SMALL), ("convnext_atto_rms", {})],
    ids=["weights of another shape", "no weights"],
)
def test_a_network_that_has_no_published_weights_starts_without(
    name: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("size mismatch for patch_embed.proj.weight")  # as where there is a network

    monkeypatch.setattr("timm.models._builder.load_pretrained", load)

    def built(pretrained: bool) -> nn.Module:
        config = BackboneConfig(name=name, kwargs=kwargs)
        return build_backbone(config, crop_sizes=(64, 32), drop_path_rate=0.0, pretrained=pretrained)

    with pytest.raises(DinorayError) as error:
        built(True)
    assert settings_to_set(str(error.value)) == ["backbone.pretrained=false"]
    assert built(False) is not None


# Files


def saved(path: Path, content: Any) -> None:
    torch.save(content, path)


def zipped(path: Path, _: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path, _: path.write_bytes(b""), "; save or download it anew"),
        (lambda path, _: path.write_bytes(b"something else"), "; save or download it anew"),
        (lambda path, _: path.write_bytes(path.read_bytes()[:-100]), "; save or download it anew"),
        (zipped, "; save or download it anew"),
        (
            lambda path, _: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "; run git lfs pull in its repository",
        ),
        (
            lambda path, _: path.write_bytes(b"<!DOCTYPE html>\n<html></html>"),
            "; download the file itself from its direct address",
        ),
        (
            lambda path, state: saved(path, [*state.values()]),
            "; save a network's state_dict() with torch.save",
        ),
        (lambda path, _: saved(path, {"epoch": 3}), "; pass a file that holds a network's state dict"),
    ],
    ids=["empty", "text", "cut", "zip", "LFS pointer", "page", "list", "no weights"],
)
def test_a_file_is_read_once_it_is_the_one_that_the_message_asks_for(
    spoil: Callable[[Path, Any], object], says: str, tmp_path: Path
) -> None:
    """Each remedy leads to the same file, whether it is downloaded, pulled or saved again."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=16, **SMALL)
    path = tmp_path / "x.pth"
    torch.save(network.state_dict(), path)
    good = path.read_bytes()
    spoil(path, network.state_dict())
    with warnings.catch_warnings(), pytest.raises(DataError, match=f"{re.escape(says)}$"):
        read_weights(path.read_bytes(), "x.pth")
    assert "backbone.cls_token" in read_weights(good, "x.pth").teacher
