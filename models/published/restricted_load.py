"""Read the bytes of a torch file without running any code that the file refers to.

torch's restricted unpickler (`weights_only=True`) reads both of torch's formats. It calls only functions on
its list. The stand-ins below join that list under the names of numpy, argparse, pathlib and of the libraries
in which training programs keep their settings. They return plain values or nothing; no function of these
libraries is ever called.
"""

import argparse
import io
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dinoray.models.errors import DataError, one_line
from dinoray.models.published.pickle_size import check_size
from dinoray.models.published.programs import writer_of_objects

_GLOBAL = re.compile(r"GLOBAL\s+`?([\w.]+)")
_NUMBER = re.compile(r"b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16)|[?bBhHiIlLqQefdgFD]")
_TEXT = re.compile(r"[SaU]\d{0,6}")
_PAGE = re.compile(
    rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b",
    re.S,
)
_LOCK = threading.Lock()
"""Only one file is read at a time, because torch's list of allowed names is per process."""


class _RefusedError(Exception):
    """The file requests something that a stand-in does not support."""


class _Opaque:
    """Stand-in for any object that is not weights; it stays empty."""

    def __new__(cls, *_: Any) -> "_Opaque":
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        return None


class _DictLike:
    """Stand-in for a class that derives from dict; creates a plain dict."""

    def __new__(cls, *_: Any) -> "OrderedDict[Any, Any]":  # type: ignore[misc]
        return OrderedDict()


class _Namespace:
    """Stand-in for argparse.Namespace, with the values in the file."""

    def __new__(cls, *_: Any) -> "_Namespace":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(type(key) is str for key in state):
            raise _RefusedError("an argparse.Namespace with other contents than named values")
        self.values = state


class _DType:
    """Stand-in for a numpy.dtype of numbers or text.

    Other dtypes are refused: an object dtype could hold anything.
    """

    code: str
    order: str

    def __new__(cls, code: Any = "f8", *_: Any) -> "_DType":
        if type(code) is not str or not (_NUMBER.fullmatch(code) or _TEXT.fullmatch(code)):
            raise _RefusedError(f"numpy.dtype({_shown(code)})")
        self = object.__new__(cls)
        self.code, self.order = code, "="
        return self

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags)
        if type(state) is not tuple or len(state) < 8 or state[1] not in ("<", ">", "=", "|"):
            raise _RefusedError("numpy.dtype with a strange state")
        if any(part is not None for part in state[2:5]):
            raise _RefusedError("numpy.dtype with fields")
        self.order = state[1]


class _Array:
    """Stand-in for numpy.ndarray; no array is created, because weights are tensors."""

    def __new__(cls, *_: Any) -> "_Array":
        return object.__new__(cls)

    def __setstate__(self, _: Any) -> None:
        return None


def _scalar(dtype: Any = None, data: Any = None, *more: Any) -> bool | int | float | complex | str | bytes:
    """Stand-in for numpy.core.multiarray.scalar; return the Python value of one numpy number or text."""
    if type(dtype) is not _DType or type(data) is not bytes or more:
        raise _RefusedError("a numpy scalar of strange parts")
    if _TEXT.fullmatch(dtype.code):
        if dtype.code[0] != "U":
            return data
        try:
            return data.decode("utf-32-be" if dtype.order == ">" else "utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise _RefusedError("a numpy text that is none") from error
    number = np.dtype(dtype.code).newbyteorder(">" if dtype.order == ">" else "<")
    if len(data) != number.itemsize:
        raise _RefusedError(f"a numpy scalar of {len(data)} bytes where {number.itemsize} belong")
    value = np.frombuffer(data, number)[0]
    kinds: dict[str, Callable[[Any], bool | int | float | complex]] = {"b": bool, "f": float, "c": complex}
    return kinds.get(number.kind, int)(value)


def _array(*_: Any) -> _Array:
    return _Array()


def _no_bytes(*parts: Any) -> bytes:
    """Stand-in for the class bytes, which pickles call only for bytes of length 0."""
    if parts:
        raise _RefusedError("bytes by number")
    return b""


def _path(*parts: Any) -> str:
    """Stand-in for the paths of pathlib; return the path as text."""
    if not all(type(part) is str for part in parts):
        raise _RefusedError("a path of other parts than text")
    return "/".join(parts).replace("//", "/")


def _stand_ins() -> list[tuple[Callable[..., Any], str]]:
    """Return each stand-in with its name in files."""
    table: dict[Callable[..., Any], list[str]] = {
        _Namespace: ["argparse.Namespace"],
        _DType: ["numpy.dtype"],
        _scalar: [],
        _array: [],
        _Array: ["numpy.ndarray"],
        _path: [],
        _no_bytes: ["builtins.bytes"],
        _DictLike: [
            *("collections.defaultdict", "yacs.config.CfgNode", "fvcore.common.config.CfgNode"),
            *("easydict.EasyDict", "addict.addict.Dict", "mmengine.config.config.ConfigDict"),
            "lightning_fabric.utilities.data.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "pytorch_lightning.utilities.parsing.AttributeDict",
        ],
        _Opaque: [
            *(
                "builtins.list",
                "builtins.dict",
                "builtins.int",
                "builtins.float",
                "builtins.str",
                "typing.Any",
            ),
            *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
            *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
            *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "Boolean", "String")),
        ],
    }
    for numpy in ("numpy.core", "numpy._core"):  # the old name, and the name in numpy 2
        table[_scalar].append(f"{numpy}.multiarray.scalar")
        table[_array].append(f"{numpy}.multiarray._reconstruct")
    kinds = [f"{sign}{bits}" for sign in ("Int", "UInt") for bits in (8, 16, 32, 64)]
    kinds += [
        "Float16",
        "Float32",
        "Float64",
        "LongDouble",
        "Complex64",
        "Complex128",
        "Bool",
        "Str",
        "Bytes",
    ]
    table[_DType] += [f"numpy.dtypes.{kind}DType" for kind in kinds]
    for pathlib in ("pathlib", "pathlib._local"):  # Python 3.13 has both
        kinds = ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"]
        table[_path] += [f"{pathlib}.{kind}" for kind in kinds]
    return [(stand_in, name) for stand_in, names in table.items() for name in names]


_STAND_INS = _stand_ins()


def restricted_load(data: bytes, name: str) -> Any:
    """Return the contents of a `.pth` or `.ckpt` file: CPU tensors and plain values. `name`: for errors.

    numpy numbers become Python numbers, paths become text, and an argparse.Namespace becomes the stand-in
    that `values_of` reads. Raises DataError for a damaged file and for a file that requires any other call.
    """
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        raise DataError(
            f"{name} is a Git LFS pointer, a text in place of the file; run git lfs pull in its repository"
        )
    if _PAGE.match(data[:1000]):
        raise DataError(
            f"{name} is a web page, not a file of weights; download the file itself from its direct address"
        )
    if not data:
        raise DataError(f"{name} is empty: it has 0 bytes; save or download it anew")
    try:
        check_size(data)
        with _LOCK, warnings.catch_warnings(), torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
            warnings.simplefilter("ignore")  # problems of a file are reported below
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, _RefusedError) as error:
        if writer := writer_of_objects(data):
            raise DataError(
                f"{name} is a training checkpoint of {writer.name} and holds its objects, for which code would have to "
                f"run; {writer.remedy.format(file=_file(name))}"
            ) from error
        found = _GLOBAL.search(str(error))
        if isinstance(error, _RefusedError):
            what = f"{name} holds {error}, which is not read"
        elif found:
            what = f"{name} wants {found[1].rstrip('.')} to be called while it is read, which could run any program"
        else:
            what = f"{name} is not a file of weights that can be read without running what is in it"
        raise DataError(f"{what}; {_anew(name)}") from error
    except Exception as error:  # a damaged file may raise anything
        if "TorchScript" in str(error):
            command = f"import torch; torch.save(torch.jit.load({_file(name)!r}).state_dict(), 'weights.pth')"
            raise DataError(
                f"{name} is a TorchScript program; where you trust it, save its weights and start from weights.pth: "
                f'python -c "{command}"'
            ) from error
        if not data.startswith((b"PK", b"\x80")):  # torch.load would tell of opcodes
            what = "was not written by torch.save"
        else:
            what = f"is not a file of weights, or damaged: {one_line(error)}"
        raise DataError(f"{name} {what}; save or download it anew") from error


def values_of(arguments: Any) -> dict[str, Any]:
    """Return the named values of a dict or an argparse.Namespace, as read here or by torch.load."""
    if isinstance(arguments, argparse.Namespace):
        return dict(vars(arguments))
    arguments = getattr(arguments, "values", None) if isinstance(arguments, _Namespace) else arguments
    return dict(arguments) if isinstance(arguments, Mapping) else {}


def holds_arrays(state: Mapping[Any, Any], depth: int = 0) -> bool:
    """Return True if a dict, or a dict inside it, has arrays of numpy for values."""
    return any(
        isinstance(v, _Array) or (isinstance(v, Mapping) and depth < 3 and holds_arrays(v, depth + 1))
        for v in state.values()
    )


def as_tensors(name: str) -> str:
    """Return the remedy for arrays: a command that saves them as tensors, run where the file is trusted."""
    command = (
        "import numpy, torch; f = lambda v: {k: f(x) for k, x in v.items()} if isinstance(v, dict) else "
        "torch.as_tensor(v) if isinstance(v, numpy.ndarray) else v; "
        f"torch.save(f(torch.load({_file(name)!r}, map_location='cpu', weights_only=False)), 'weights.pth')"
    )
    return f'where you trust it, save them as tensors and start from weights.pth: python -c "{command}"'


_KEYS = ("student", "teacher", "dino_loss", "state_dict", "state_dict_ema", "model", "model_ema", "ema")


def _anew(name: str) -> str:
    """Return the remedy: a command that saves only the weights, run where the file is trusted."""
    command = (
        f"import torch; s = torch.load({_file(name)!r}, map_location='cpu', weights_only=False); "
        "d = lambda v: v.state_dict() if hasattr(v, 'state_dict') else v; s = d(s); "
        f"torch.save({{k: d(v) for k, v in s.items() if k in {_KEYS} or torch.is_tensor(v)}}, 'weights.pth')"
    )
    return f'where you trust it, save its weights alone and start from weights.pth: python -c "{command}"'


def _file(name: str) -> str:
    """Return a local path unchanged; for an object in a bucket, the file name after its download."""
    return name.rpartition("/")[2] if "://" in name else name


def _shown(value: Any) -> str:
    return repr(value[:20]) if isinstance(value, str) else type(value).__name__
