"""Published checkpoints that do not fit name the remedy; files that are none are refused and run nothing."""

import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from published import Run, ViT, saved
from published_twins import HEAD, RESNET, dino, read, torchvision_resnet
from remedies import settings_to_set
from tiny import tiny_config

from dinoray.jobs.cli.config import apply_overrides
from dinoray.models.errors import ConfigError, DataError
from dinoray.models.published.checkpoint import load, parse, read_weights


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def own_vit(**kwargs: Any) -> dict[str, Any]:
    """The `backbone` section of the tiny ViT with other arguments."""
    return {"pos_embed": "official", "kwargs": {**tiny_config().backbone.kwargs, **kwargs}}


# Mistakes, in one line with the remedy


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"out_dim": 64}, {}, r"head.out_dim=32 but the checkpoint has 64 prototypes; set head.out_dim=64"),
        (
            {"hidden": 40},
            {},
            r"head.hidden_dim=48 but .* 40 channels in hidden layers; set head.hidden_dim=40",
        ),
        ({"bottleneck": 8}, {}, r"head.bottleneck_dim=16 but .* 8 channels .*; set head.bottleneck_dim=8"),
        ({"num_layers": 2}, {}, r"head.num_layers=3 but the checkpoint has 2 layers; set head.num_layers=2"),
        ({"use_bn": True}, {}, r"head.use_bn=false but the checkpoint has batch norm; set head.use_bn=true"),
        ({}, {"use_bn": True}, r"head.use_bn=true but .* has no batch norm; set head.use_bn=false"),
    ],
)
def test_a_head_of_another_shape_names_the_setting_and_the_value_that_fits(
    theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$") as error:
        load(dino(**ours), read(Run(**theirs).state()))
    followed = {"head": {**HEAD, **ours}}
    head = apply_overrides(followed, settings_to_set(str(error.value)))["head"]
    load(dino(**head), read(Run(**theirs).state()))


def test_all_settings_of_the_head_that_differ_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load(dino(), read(Run(out_dim=64, hidden=40, bottleneck=8).state()))
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        "head.out_dim",
        "head.bottleneck_dim",
        "head.hidden_dim",
    ]


def test_nothing_is_loaded_when_something_does_not_fit() -> None:
    ours = dino()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = Run().state()
    state["teacher"] = Run(out_dim=64).state()["teacher"]
    with pytest.raises(ConfigError):
        load(ours, read(state))
    for k, v in ours.state_dict().items():
        assert torch.equal(v, before[k])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            {"patch": 8, "size": 32},
            r"patch 4, but the checkpoint has .* patch 8; set backbone.kwargs.patch_size=8$",
        ),
        ({"depth": 3}, r"; set backbone.kwargs.depth=3$"),
        ({"dim": 48}, r"; set backbone.kwargs.embed_dim=48 backbone.kwargs.num_heads=1, or as many heads"),
        (
            {"dim": 384, "depth": 12, "patch": 8},
            r"^backbone.name=vit_tiny_patch16_224 has width 32, 2 blocks, patch 4, but the checkpoint has width 384, "
            r"12 blocks, patch 8; set backbone.name=vit_small_patch8_224 and no backbone.kwargs$",
        ),
    ],
)
def test_a_vit_of_another_shape_names_what_fits(theirs: dict[str, Any], message: str) -> None:
    kwargs = tiny_config().backbone.kwargs
    with pytest.raises(ConfigError, match=message) as caught:
        load(dino(), read(ViT(**theirs).state_dict()), kwargs=kwargs)
    name = re.search(r"backbone\.name=(\w+)", str(caught.value).partition("set ")[2])
    settings = dict(re.findall(r"backbone\.kwargs\.(\w+)=(\w+)", str(caught.value)))
    followed = {} if name else kwargs | {key: int(value) for key, value in settings.items()}
    backbone = {"name": name[1] if name else "vit_tiny_patch16_224", "kwargs": followed}
    ours = dino(backbone=backbone, crops={"global_crop_size": 32, "local_crop_size": 16})
    load(ours, read(ViT(**theirs).state_dict()))


def test_attention_heads_which_no_shape_tells_are_compared_by_the_architecture_s_name() -> None:
    state = Run(backbone=lambda: ViT(dim=192, num_heads=3)).train().state({"arch": "vit_tiny"})
    with pytest.raises(
        ConfigError, match=r"2 attention heads, .* \(arch=vit_tiny\) has 3; set .*num_heads=3$"
    ):
        load(dino(backbone=own_vit(embed_dim=192)), read(state))
    load(dino(backbone=own_vit(embed_dim=192, num_heads=3)), read(state))


def test_another_kind_of_backbone_is_named_in_one_line_with_a_few_tensors() -> None:
    state = Run(backbone=torchvision_resnet).state({"arch": "resnet18"})
    message = (
        r"^the checkpoint \(arch=resnet18\) does not fit backbone.name=vit_tiny_patch16_224: it lacks cls_token, "
        r".* and \d+ more; .*; set backbone.name=resnet18$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        load(dino(), read(state))
    assert "\n" not in str(caught.value)
    load(dino(backbone=RESNET), read(state))


def test_a_centre_of_another_length_is_refused() -> None:
    state = Run().state()
    state["dino_loss"] = {"center": torch.zeros(1, 5)}
    with pytest.raises(DataError, match=r"centre .* has 5 values for 32 prototypes; set init.load=backbone"):
        load(dino(), read(state))
    load(dino(), read(state), backbone_only=True)


# Files that are none, or more than that


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_would_run_a_program_is_refused_and_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    state = Run().state() | {"args": Malicious(tmp_path / "made")}
    data = saved(state, legacy=legacy)
    with pytest.raises(DataError, match=r"^evil.pth wants (posix|nt)\.mkdir to be called") as caught:
        read_weights(data, "evil.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^evil.pth .*mkdir"):
        read_weights(pickle.dumps(Malicious(tmp_path / "made"), protocol=2), "evil.pth")
    assert not (tmp_path / "made").exists()


def test_the_permission_to_read_a_namespace_ends_with_the_reading() -> None:
    before = set(torch.serialization.get_safe_globals())
    read(Run().state())
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "is empty"),
        (b"something else", r"was not written by torch\.save; "),
        (saved(Run().state())[:-4000], "is not a file of weights, or damaged: "),
        (saved(Run().state())[:100], "is not a file of weights, or damaged: "),
    ],
)
def test_a_damaged_file_is_one_line(data: bytes, what: str) -> None:
    with pytest.raises(DataError, match=rf"^checkpoint\.pth {what}") as caught:
        read_weights(data, "checkpoint.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a dict"),
        ({}, "holds no weights: its keys are none"),
        ({"epoch": 3, "best": 0.5}, "holds no weights: its keys are epoch, best"),
        ({"student": {}, "teacher": {}}, "holds no weights: its keys are student, teacher"),
    ],
)
def test_a_file_without_weights_is_refused(state: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(state)


@pytest.mark.parametrize("optimizer", [None, [], {"state": []}, {"state": {}, "param_groups": 3}])
def test_what_is_no_optimiser_s_state_is_none(optimizer: Any) -> None:
    assert read(Run().state() | {"optimizer": optimizer, "epoch": "seven"}).optimizer is None


def test_metadata_of_any_kind_do_no_harm() -> None:
    state = OrderedDict(ViT().state_dict())
    state._metadata = ["strange"]  # type: ignore[attr-defined]
    assert parse(state).official


@pytest.mark.parametrize("place", [lambda state: state, lambda state: {"state_dict": state}])
def test_arrays_of_numpy_are_named_and_the_command_makes_tensors_of_them(place: Any, tmp_path: Path) -> None:
    vit, path = ViT(), tmp_path / "arrays.pth"
    path.write_bytes(saved(place({k: v.numpy() for k, v in vit.state_dict().items()})))
    with pytest.raises(DataError, match="holds numpy arrays, not tensors") as caught:
        read_weights(path.read_bytes(), str(path))
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    found = read_weights((tmp_path / "weights.pth").read_bytes(), "weights.pth").teacher
    assert torch.equal(found["backbone.cls_token"], vit.cls_token)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html></html>", "is a web page"),
        (b"\n <HTML lang=en><body>404</body>", "is a web page"),
        (b"<!-- x -->\n<head></head>", "is a web page"),
    ],
)
def test_what_a_failed_download_leaves_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_weights(data, "x.pth")
