"""Find the student's and the teacher's tensors in a file of any program.

Each tensor is named by its place in the file: `student.module.backbone.cls_token`,
`state_dict.momentum_backbone.conv1.weight`. Networks are found by names that only the stem of a backbone has.
The text before such a name is the network's prefix, and the words in the prefix identify the network.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STEM = re.compile(
    r"(?:^|(?<=\.))(?:cls_token$|class_token$|pos_embed$|patch_embed\.|blocks\.\d|embeddings\.|conv_proj\.|conv1\.weight"
    r"|conv_stem\.|layer1\.|stem\.|stem_0\.|stages\.0|stages_0|downsample_layers\.|features\.)"
)
"""Matches the start of the names inside a backbone."""
_EMA = {"ema", "averaged", "avg", "swa", "shadow"}
_TEACHER = {"teacher", "momentum", "target", "k"}
_STUDENT = {"student", "online", "q", "query"}
_OTHER_HEADS = re.compile(
    r"(?:^|[._])(?:ibot|patch)_?[a-z]*_head(?:$|[._])|(?:^|\.)head\.(?:last_layer2|mlp2)\."
)
_LAST_LAYER = re.compile(r"(?:^|(?<=\.))last_layer\.")
_CENTER = re.compile(r"(?:^|\.)center(?:\.center)?$")
_PASSED_OVER = re.compile(
    r"(?i)optim|scaler|^amp$|scheduler|^args$|config|^cfg$|callbacks|loops|hyper_parameters"
)
_MAX_DEPTH = 8


class Networks(NamedTuple):
    """The two networks in dinoray's names: `backbone.*`, and `head.*` if there is a DINO head."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    student_from: str
    """The student's place in the file, without a final dot; empty for a bare state dict."""
    teacher_from: str
    center: Tensor | None
    """[K]"""
    center_from: str
    skipped: list[str]
    """Places in the file with tensors of neither network."""
    notes: list[str]


def find_networks(state: Mapping[str, Any]) -> Networks | None:
    """Return the networks in `state`, or None. A single network becomes both student and teacher."""
    tensors = dict(_tensors(state))
    prefixes = _prefixes(tensors)
    heads = [] if not prefixes else _heads(tensors)
    if not prefixes:
        prefixes = _guessed_prefixes(tensors)
        heads = _heads(tensors)
    if not prefixes:
        return None
    student, teacher, notes = _choose(prefixes, tensors, heads)
    used: set[str] = set()

    def network(prefix: str) -> dict[str, Tensor]:
        head = next((h for h in heads if _role(h) == _role(prefix)), None)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if head is not None and name.startswith(head) and not _OTHER_HEADS.search(name):
                found |= _of_head(name.removeprefix(head), tensor)
            elif _is_of(name, prefix, prefixes, heads):
                found[f"backbone.{name.removeprefix(prefix)}"] = tensor
            else:
                continue
            used.add(name)
        return found

    student_state = network(student)
    teacher_state = student_state if teacher == student else network(teacher)
    center = next((name for name in tensors if _CENTER.search(name)), None)
    if center is not None:
        used.add(center)
    return Networks(
        student=student_state,
        teacher=teacher_state,
        student_from=student.rstrip("."),
        teacher_from=teacher.rstrip("."),
        center=None if center is None else tensors[center].reshape(-1),
        center_from=center or "",
        skipped=_skipped(tensors, used),
        notes=notes,
    )


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of the file that have values in memory, each with its place."""
    seen: set[int] = set()

    def walk(part: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
        seen.add(id(part))
        for key, value in part.items():
            if not isinstance(key, str) or not key.isprintable():
                continue
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
                yield f"{prefix}{key}", value.detach()
            is_new = isinstance(value, Mapping) and id(value) not in seen
            if is_new and depth < _MAX_DEPTH and not _PASSED_OVER.search(key):
                yield from walk(value, f"{prefix}{key}.", depth + 1)

    return walk(state, "", 0)


def _prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefix of each backbone's names in the file."""
    found: dict[str, None] = {}
    for name in tensors:
        if match := _STEM.search(name):
            found[name[: match.start()]] = None
    return [p for p in found if not any(p != other and p.startswith(other) for other in found)]


def _guessed_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefix of a backbone with an unknown stem: all that usual wrappers put before names."""
    wrapper = re.compile(r"(?:(?:module|_orig_mod|student|teacher|state_dict|model|backbone)\.)*")
    found: dict[str, None] = {}
    for name in tensors:
        if not _CENTER.search(name):
            found[wrapper.match(name)[0]] = None  # type: ignore[index]
    return [p for p in found if not any(p != other and p.startswith(other) for other in found)]


def _heads(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes of DINO heads: those with a `last_layer` and a perceptron before it."""
    found: dict[str, None] = {}
    for name in tensors:
        match = _LAST_LAYER.search(name)
        if match and not _OTHER_HEADS.search(name):
            found[name[: match.start()]] = None
    return [p for p in found if p and any(n.startswith((f"{p}mlp.", f"{p}layers.")) for n in tensors)]


def _words(prefix: str) -> set[str]:
    return set(re.split(r"[._]", prefix.lower()))


def _role(prefix: str) -> str:
    words = _words(prefix)
    return "ema" if words & _EMA else "teacher" if words & _TEACHER else "student"


def _choose(
    prefixes: list[str], tensors: Mapping[str, Tensor], heads: list[str]
) -> tuple[str, str, list[str]]:
    """Return the prefixes of student and teacher, and notes on the choice."""

    def shapes(prefix: str) -> dict[str, torch.Size]:
        names = (name for name in tensors if _is_of(name, prefix, prefixes, heads))
        return {name.removeprefix(prefix): tensors[name].shape for name in names}

    by_role: dict[str, list[str]] = {"ema": [], "teacher": [], "student": []}
    for prefix in sorted(prefixes, key=lambda p: (not _words(p) & _STUDENT, -len(shapes(p)))):
        by_role[_role(prefix)].append(prefix)
    students, teachers, averages = by_role["student"], by_role["teacher"], by_role["ema"]
    if students and teachers:
        student, teacher = students[0], teachers[0]
        if _are_alike(shapes(student), shapes(teacher)):
            return student, teacher, []
        note = f"{_place(teacher)} is another network than {_place(student)} and is left out"
        return student, student, [note]
    if averages:
        left = [*students, *teachers]
        note = f"{_place(averages[0])} is taken, an exponential moving average of the weights"
        note += f"; {_place(left[0])} is left out" if left else ""
        return averages[0], averages[0], [note]
    only = [*teachers, *students][0]
    return only, only, []


def _are_alike(a: Mapping[str, torch.Size], b: Mapping[str, torch.Size]) -> bool:
    both = a.keys() & b.keys()
    return len(both) >= 0.9 * max(len(a), len(b)) and all(a[name] == b[name] for name in both)


def _is_of(name: str, prefix: str, prefixes: list[str], heads: list[str]) -> bool:
    """Return True if the tensor belongs to the backbone with this prefix."""
    if not name.startswith(prefix) or _CENTER.search(name):
        return False
    others = [other for other in [*prefixes, *heads] if other != prefix and other.startswith(prefix)]
    return not name.startswith(tuple(others)) and not _OTHER_HEADS.search(name)


def _of_head(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a head's tensor in dinoray's names. Prototypes become `weight_g` [K, 1] and `weight_v`."""
    layer = "head.last_layer."
    match name:
        case "last_layer.weight_g" | "last_layer.parametrizations.weight.original0":
            return {f"{layer}weight_g": tensor}
        case "last_layer.weight_v" | "last_layer.parametrizations.weight.original1":
            return {f"{layer}weight_v": tensor}
        case "last_layer.weight":
            return {f"{layer}weight_g": tensor.norm(dim=1, keepdim=True), f"{layer}weight_v": tensor}
    return {f"head.{re.sub('^layers[.]', 'mlp.', name)}": tensor}


def _skipped(tensors: Mapping[str, Tensor], used: set[str]) -> list[str]:
    """Return the places of all unused tensors, each as short as possible."""
    taken = {name[: match.start()] for name in used for match in re.finditer(r"\.", name)}
    places: dict[str, None] = {}
    for name in tensors:
        if name not in used:
            ends = [match.start() for match in re.finditer(r"\.", name)] + [len(name)]
            places[next((name[:end] for end in ends if name[:end] not in taken), name)] = None
    return list(places)


def _place(prefix: str) -> str:
    return f"'{prefix.rstrip('.')}'" if prefix else "the state dict"
