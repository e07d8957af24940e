"""Refuse a small torch file that would need immense memory or time to read.

A pickle may refer to one object many times. Twenty tuples that each contain the next tuple a hundred times
are a few kilobytes, but hashing or printing them would never end. This module counts the objects, once per
reference, and builds nothing. torch never compresses its zip files, so a compressed part is also refused.
"""

import io
import pickletools
import zipfile

_LIMIT = 50_000_000
"""Largest number of objects, counted once per reference. A checkpoint of a large ViT has about 100,000."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number with which torch's older format begins; it consists of five pickles."""
_MARK = -1
_ALLOCATES = {"builtins bytearray", "__builtin__ bytearray"}
"""Functions that torch's restricted unpickler allows a file to call with a number of bytes."""


def check_size(data: bytes) -> None:
    """Raise ValueError if a torch file needs more memory or time than any checkpoint of its length."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                is_pickle = entry.filename.endswith(".pkl")
                if entry.compress_type != zipfile.ZIP_STORED and (is_pickle or "/data/" in entry.filename):
                    raise ValueError(
                        f"its part {entry.filename[-40:]!r} is compressed, which torch never does"
                    )
                if is_pickle:
                    _check(io.BytesIO(archive.read(entry)))
        return
    file = io.BytesIO(data)
    for _ in range(5 if data.startswith(_LEGACY) else 1):
        _check(file)


def _check(file: io.BytesIO) -> None:
    """Check one pickle in `file`."""
    children: list[list[int]] = []
    stack: list[int] = []
    memo: dict[int, int] = {}
    for op, arg, _ in pickletools.genops(file):
        if op.name == "GLOBAL" and arg in _ALLOCATES:
            raise ValueError(f"it wants a {str(arg).split()[1]}, which no weights need")
        if op.name == "MARK":
            stack.append(_MARK)
        elif op.name.endswith("GET"):
            stack.append(memo[int(str(arg))])
        elif op.name.endswith("PUT") or op.name == "MEMOIZE":
            memo[len(memo) if arg is None else int(str(arg))] = stack[-1]
        else:
            taken: list[int] = []
            if pickletools.markobject in op.stack_before:
                while (top := stack.pop()) != _MARK:
                    taken.append(top)
                num_below = op.stack_before.index(pickletools.markobject)
            else:
                num_below = len(op.stack_before)
            below = [stack.pop() for _ in range(num_below)][::-1]
            if op.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
                children[below[0]] += [*below[1:], *taken]
                stack.append(below[0])
            else:
                for _ in op.stack_after:
                    children.append([*below, *taken])
                    stack.append(len(children) - 1)
    _check_graph(children)


def _check_graph(children: list[list[int]]) -> None:
    """Sum sizes from the leaves up.

    A reference back to an object that contains the referrer counts as one.
    """
    sizes = [0] * len(children)
    for root in range(len(children)):
        waiting = [(root, False)]
        while waiting:
            node, is_done = waiting.pop()
            if is_done:
                sizes[node] = 1 + sum(max(1, sizes[child]) for child in children[node])
                if sizes[node] > _LIMIT:
                    raise ValueError(f"it unfolds into more than {_LIMIT} objects")
            elif not sizes[node]:
                sizes[node] = 1
                waiting.append((node, True))
                waiting += [(child, False) for child in children[node] if not sizes[child]]
