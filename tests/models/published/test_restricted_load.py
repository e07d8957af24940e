"""Files are read without running anything in them: what other programs keep beside weights, and hostile files."""

import argparse
import collections
import io
import itertools
import os
import pathlib
import pickle
import shlex
import subprocess
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import Run, saved

from dinoray.models.errors import DataError
from dinoray.models.published.checkpoint import Weights, read_weights
from dinoray.models.published.restricted_load import restricted_load, values_of

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
SCALAR = np.float64(1).__reduce__()[0]


class OldNamesPickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes the names that numpy 1 gave to what a pickle calls."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is SCALAR:
            self.write(b"cnumpy.core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


class NewNamesPickler(OldNamesPickler):
    """Writes the names of numpy 2, whichever numpy is here."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj is SCALAR:
            self.write(b"cnumpy._core.multiarray\nscalar\n")
            self.memoize(obj)
        else:
            super().save_global(obj, name)


def written_by(pickler: type, state: Any, *, legacy: bool) -> bytes:
    """As `saved`, with another pickler."""
    module = types.ModuleType("pickler")
    module.__dict__.update(vars(pickle) | {"Pickler": pickler})
    module.dump = lambda obj, file, protocol: pickler(file, protocol).dump(obj)  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save(state, file, pickle_module=module, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def refused(data: bytes) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(DataError, match=r"^evil\.pth ") as caught:
        restricted_load(data, "evil.pth")
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Calls:
    """An object that calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.parts


# What training programs write


@FORMATS
@pytest.mark.parametrize("pickler", [OldNamesPickler, NewNamesPickler])
def test_published_checkpoint_is_read_under_old_and_new_numpy_names(pickler: type, legacy: bool) -> None:
    run = Run().train(3)
    assert type(run.optimizer.param_groups[0]["lr"]) is np.float64
    data = written_by(pickler, run.state(), legacy=legacy)
    name = b"numpy.core.multiarray" if pickler is OldNamesPickler else b"numpy._core.multiarray"
    assert name in data
    weights = read_weights(data, "checkpoint.pth")
    assert (weights.epoch, weights.args["arch"]) == (7, "vit_own")
    groups = restricted_load(data, "checkpoint.pth")["optimizer"]["param_groups"]
    for group, theirs in zip(groups, run.optimizer.param_groups, strict=True):
        assert type(group["lr"]) is float
        assert (group["lr"], group["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
    for number, moments in run.optimizer.state_dict()["state"].items():
        assert torch.equal(weights.optimizer["state"][number]["exp_avg"], moments["exp_avg"])


def test_given_published_checkpoint_is_read() -> None:
    case = "shared/data/cases/published-full-checkpoint/data/checkpoint.pth"
    found = [folder / case for folder in Path(__file__).parents if (folder / case).exists()]
    if not found:
        pytest.skip("there is no such file here")
    path = found[0]
    weights = read_weights(path.read_bytes(), str(path))
    assert (weights.epoch, weights.has_head, weights.args["arch"]) == (1, True, "vit_tiny")
    assert weights.optimizer["state"]


@FORMATS
@pytest.mark.parametrize("as_what", [argparse.Namespace, dict])
def test_arguments_of_numpy_and_pathlib_come_as_plain_values(as_what: Any, legacy: bool) -> None:
    values = {
        "lr": np.float64(0.1),
        "half": np.float16(0.5),
        "long": np.longdouble(1.5),
        "steps": np.int64(-3),
        "big": np.uint8(200),
        "other_order": np.array([1.25], ">f8")[0],
        "flag": np.bool_(True),
        "wave": np.complex64(1j),
        "text": np.str_("déjà"),
        "bytes": np.bytes_(b"raw"),
        "folder": pathlib.PurePosixPath("/data/images"),
        "groups": collections.defaultdict(list, a=1),
    }
    data = saved({"args": as_what(**values), "table": np.ones(3), "kind": np.dtype("f4")}, legacy=legacy)
    read = values_of(restricted_load(data, "x.pth")["args"])
    numbers = {"lr": 0.1, "half": 0.5, "long": 1.5, "steps": -3, "big": 200, "other_order": 1.25}
    others = {"flag": True, "wave": 1j, "text": "déjà", "bytes": b"raw", "folder": "/data/images"}
    assert read == numbers | others | {"groups": {"a": 1}}
    plain = {bool, int, float, complex, str, bytes, OrderedDict}
    assert {type(value) for value in read.values()} <= plain


# Hostile files


@FORMATS
@pytest.mark.parametrize(
    "function", [os.system, os.mkdir, subprocess.run, eval, exec, getattr, np.load, open]
)
def test_call_of_a_function_is_refused(function: Any, legacy: bool, tmp_path: Path) -> None:
    evil = Calls(function, f"mkdir {tmp_path}/made" if function is os.system else str(tmp_path / "made"))
    message = refused(saved({"args": evil}, legacy=legacy))
    assert "to be called while it is read, which could run any program; " in message
    assert not (tmp_path / "made").exists()


@FORMATS
@pytest.mark.parametrize(
    "evil",
    [
        Calls(SCALAR, np.dtype("O"), b"12345678"),
        Calls(SCALAR, np.dtype("f8"), b"1234"),
        Calls(SCALAR, np.dtype("f8"), "12345678"),
        Calls(SCALAR, "f8", b"12345678"),
        Calls(SCALAR),
        Calls(SCALAR, np.dtype("U2"), b"\xff" * 8),
        Calls(np.dtype, "O8", False, True),
        Calls(np.dtype, "V9999999999", False, True),
        Calls(np.dtype, ["f8"], False, True),
        Calls(np.dtype, "f8", False, True, state=("x",)),
        Calls(
            np.dtype, "f8", False, True, state=(3, "<", (np.dtype("f8"), (10**12,)), None, None, -1, -1, 0)
        ),
        Calls(pathlib.PurePosixPath, 3),
        np.array([1, "a"], dtype=object),
        np.datetime64("2020-01-01"),
        np.zeros(1, [("a", "f8")])[0],
    ],
    ids=lambda evil: None,
)
def test_strange_numpy_values_are_refused(evil: Any, legacy: bool) -> None:
    assert "; where you trust it, save its weights alone" in refused(saved({"args": evil}, legacy=legacy))


@FORMATS
def test_stand_ins_take_any_argument_and_run_nothing(legacy: bool, tmp_path: Path) -> None:
    array = Calls(
        np.ones(1).__reduce__()[0], np.ndarray, (10**15,), b"b", state=(1, (10**15,), "x", False, b"")
    )
    state = {"args": argparse.Namespace(a=array, b=Calls(collections.defaultdict, list))}
    read = values_of(restricted_load(saved(state, legacy=legacy), "x.pth")["args"])
    assert (type(read["a"]).__name__, read["b"]) == ("_Array", {})


@FORMATS
@pytest.mark.parametrize("as_key", [False, True])
def test_references_that_multiply_are_refused(as_key: bool, legacy: bool) -> None:
    bomb: Any = ()
    for _ in range(60):
        bomb = (bomb, bomb)
    state = Calls(OrderedDict, [(1, 2)], state=None) if as_key else {"args": bomb}
    if as_key:
        state = Calls(collections.Counter, bomb)
    assert "unfolds into more than" in refused(saved(state, legacy=legacy))


@FORMATS
def test_lists_filled_after_they_are_referred_to_are_counted(legacy: bool) -> None:
    lists: list[list[Any]] = [[] for _ in range(60)]
    for outer, inner in itertools.pairwise(lists):
        outer += [inner, inner]
    assert "unfolds into more than" in refused(saved({"a": lists[::-1], "b": lists}, legacy=legacy))


@FORMATS
def test_memory_asked_for_by_number_is_refused(legacy: bool) -> None:
    assert "bytearray" in refused(saved({"args": Calls(bytearray, 10**12)}, legacy=legacy))


def test_compressed_parts_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(1)}))) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch never does" in refused(file.getvalue())


@FORMATS
def test_references_in_a_circle_do_no_harm(legacy: bool) -> None:
    circle: dict[str, Any] = {"a": torch.zeros(2)}
    circle["self"] = circle
    assert restricted_load(saved(circle, legacy=legacy), "x.pth")["self"]["a"].shape == (2,)


# Remedies


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed_command(path: Path) -> str:
    """The command that the refusal of this file prints."""
    with pytest.raises(DataError) as caught:
        read_weights(path.read_bytes(), str(path))
    return str(caught.value)[str(caught.value).index("python -c ") :]


def follow(path: Path) -> Weights:
    """Run the printed program in this process, which has torch already, and read what it saves."""
    _, _, program = shlex.split(printed_command(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(program, {})
    return read_weights(Path("weights.pth").read_bytes(), "weights.pth")


def test_printed_command_runs_in_a_shell(tmp_path: Path) -> None:
    path = tmp_path / "a checkpoint.pth"
    path.write_bytes(saved(Run().train().state() | {"args": Fraction(1, 3)}))
    command = printed_command(path).removeprefix("python")
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert read_weights(Path("weights.pth").read_bytes(), "weights.pth").has_head


@FORMATS
def test_weights_saved_alone_by_the_printed_command_are_read(legacy: bool, tmp_path: Path) -> None:
    run = Run().train()
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(saved(run.state() | {"args": Fraction(1, 3)}, legacy=legacy))
    weights = follow(path)
    assert torch.equal(weights.teacher["backbone.cls_token"], run.networks[1].backbone.cls_token)
    assert weights.has_head


@pytest.mark.parametrize("form", ["module", "modules in a dict"])
def test_whole_modules_are_saved_as_weights_by_the_printed_command(form: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(3, 8, 3)))
    path = tmp_path / "model.pt"
    torch.save(module if form == "module" else {"model": module, "epoch": 3}, path)
    assert torch.equal(follow(path).teacher["backbone.conv1.weight"], module.conv1.weight)


def test_torchscript_is_saved_as_weights_by_the_printed_command(tmp_path: Path) -> None:
    module = torch.nn.Sequential(OrderedDict(conv1=torch.nn.Conv2d(3, 8, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch has a newer form for new programs
        torch.jit.save(torch.jit.script(module), tmp_path / "scripted.pt")
    weights = follow(tmp_path / "scripted.pt")
    assert torch.equal(weights.teacher["backbone.conv1.weight"], module.conv1.weight)
