"""The inner loops of the crop kernel, written in LLVM's portable vectors.

LLVM alone does not vectorise a loop that sums in 16 bits over an unknown number of taps. Two such loops make
up most of a crop's cost. LLVM compiles this code to AVX2, AVX-512 or NEON. Each function takes addresses and
reads and writes whole vectors, also past the end of a row: the kernel leaves room for that. Needs numba.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
"""Side of a tile for one transpose."""
STRIP = 32
"""Number of crop rows that are filtered together."""
ROW_BYTES = 64
"""Bytes of a picture's row that `weigh_rows` processes at once."""
BOX_BYTES = 32
"""Bytes that `box` processes at once."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _constant(element: ir.Type, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _mask(indices: Iterable[int]) -> ir.Constant:
    order = list(indices)
    return ir.Constant(ir.VectorType(_I32, len(order)), order)


class _Code:
    """Shorthands for an IR builder: addresses are 64-bit integers, offsets are in bytes."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def at(self, address: Any, offset: Any = 0) -> Any:
        return self.b.add(address, ir.Constant(_I64, offset) if isinstance(offset, int) else offset)

    def times(self, value: Any, factor: int) -> Any:
        return self.b.mul(value, ir.Constant(_I64, factor))

    def load(self, kind: ir.Type, address: Any) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value: Any, address: Any) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def splat(self, value: Any, lanes: int) -> Any:
        one = self.b.insert_element(
            ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_I32, 0)
        )
        return self.b.shuffle_vector(one, one, _mask([0] * lanes))

    def multiply_high(self, a: Any, b: Any) -> Any:
        """Return the upper half of the 32-bit products of int16 vectors: one CPU instruction if available."""
        lanes = a.type.count
        wide = ir.VectorType(_I32, lanes)
        product = self.b.mul(self.b.sext(a, wide), self.b.sext(b, wide))
        return self.b.trunc(self.b.ashr(product, _constant(_I32, lanes, 16)), a.type)

    def clamp(self, value: Any, low: int, high: int) -> Any:
        for sign, bound in ((">", low), ("<", high)):
            limit = _constant(value.type.element, value.type.count, bound)
            value = self.b.select(self.b.icmp_signed(sign, value, limit), value, limit)
        return value

    def accumulators(self, start: Any, number: int) -> list[Any]:
        """Return registers for sums, all initialised to the vector `start`."""
        registers = [cgutils.alloca_once(self.b, start.type) for _ in range(number)]
        for register in registers:
            self.b.store(start, register)
        return registers

    def transpose(self, rows: list[Any], lane: int) -> list[Any]:
        """Transpose `lane` vectors within each group of `lane` of their elements, by interleaving."""
        lanes, half = rows[0].type.count, lane // 2
        # Interleave the lower halves of all groups, then the upper halves; lanes + i is in vector 2.
        masks = [
            _mask(
                [
                    i + side
                    for g in range(0, lanes, lane)
                    for i in range(g + f, g + f + half)
                    for side in (0, lanes)
                ]
            )
            for f in (0, half)
        ]
        for _ in range(lane.bit_length() - 1):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [self.b.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        return rows


def _void(write: Callable[..., None], num_arguments: int) -> Any:
    """Return signature and generator of a function of addresses and integers that returns nothing."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        write(_Code(builder), *arguments)
        return context.get_dummy_value()

    return types.void(*[types.intp] * num_arguments), emit


@intrinsic
def weigh_rows(
    typingctx: Any,
    source: Any,
    stride: Any,
    weights: Any,
    weights_stride: Any,
    taps: Any,
    bias: Any,
    out: Any,
) -> Any:
    """Sum `taps` weighted rows of 64 uint8, `stride` bytes apart: out int16 [64] = 128 * the sum.

    Weights are int16 in 1/16384, since a weight at an edge may exceed 1; they sum to 1. Each product loses
    less than one unit to truncation; `bias` compensates. Results are clamped to 0..255, as in PIL.
    """

    def write(
        c: _Code, source: Any, stride: Any, weights: Any, weights_stride: Any, taps: Any, bias: Any, out: Any
    ) -> None:
        half = ROW_BYTES // 2
        # 128 less, so that a byte fits the upper half of a signed word; the start value adds 64 * 128.
        start = c.splat(c.b.add(c.b.trunc(bias, _I16), ir.Constant(_I16, 64 * 128)), half)
        totals = c.accumulators(start, 2)
        lower, upper = (
            [i for lane in range(0, ROW_BYTES, LANES) for i in range(lane + first, lane + first + LANES // 2)]
            for first in (0, LANES // 2)
        )
        with cgutils.for_range(c.b, taps) as loop:
            row = c.load(ir.VectorType(_I8, ROW_BYTES), c.at(source, c.b.mul(loop.index, stride)))
            row = c.b.xor(row, _constant(_I8, ROW_BYTES, 128))
            weight = c.splat(c.load(_I16, c.at(weights, c.b.mul(loop.index, weights_stride))), half)
            for total, bytes_ in zip(totals, (lower, upper), strict=True):
                order = _mask(i for byte in bytes_ for i in (ROW_BYTES, byte))  # a zero below each byte
                woven = c.b.shuffle_vector(row, _constant(_I8, ROW_BYTES, 0), order)
                words = c.b.bitcast(woven, ir.VectorType(_I16, half))
                c.b.store(c.b.add(c.b.load(total), c.multiply_high(words, weight)), total)
        places = {byte: i for i, byte in enumerate(lower + upper)}
        words = c.b.shuffle_vector(*map(c.b.load, totals), _mask(places[i] for i in range(ROW_BYTES)))
        c.store(c.b.shl(c.clamp(words, 0, 64 * 255), _constant(_I16, ROW_BYTES, 1)), out)

    return _void(write, 7)


@intrinsic
def weigh_columns(
    typingctx: Any,
    source: Any,
    weights: Any,
    weights_stride: Any,
    taps: Any,
    bias: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """Sum `taps` weighted pixels, each int16 [3, 32] as written by `weigh_rows`, to three uint8 [32].

    The result is rounded if `bias` holds 16, half of the truncated unit, and clamped to 0 to 255.
    """
    return _void(partial(_weigh_columns, STRIP), 7)


@intrinsic
def weigh_half_columns(
    typingctx: Any,
    source: Any,
    weights: Any,
    weights_stride: Any,
    taps: Any,
    bias: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """Do the same as `weigh_columns`, for the first half of the strip only."""
    return _void(partial(_weigh_columns, STRIP // 2), 7)


def _weigh_columns(
    lanes: int,
    c: _Code,
    source: Any,
    weights: Any,
    stride: Any,
    taps: Any,
    bias: Any,
    out: Any,
    out_stride: Any,
) -> None:
    totals = c.accumulators(c.splat(c.b.trunc(bias, _I16), lanes), 3)
    with cgutils.for_range(c.b, taps) as loop:
        weight = c.splat(c.load(_I16, c.at(weights, c.b.mul(loop.index, stride))), lanes)
        pixel = c.at(source, c.times(loop.index, 3 * 2 * STRIP))
        for channel, total in enumerate(totals):
            values = c.load(ir.VectorType(_I16, lanes), c.at(pixel, 2 * STRIP * channel))
            c.b.store(c.b.add(c.b.load(total), c.multiply_high(values, weight)), total)
    for channel, total in enumerate(totals):
        value = c.clamp(c.b.ashr(c.b.load(total), _constant(_I16, lanes, 5)), 0, 255)
        c.store(c.b.trunc(value, ir.VectorType(_I8, lanes)), c.at(out, c.times(out_stride, channel)))


@intrinsic
def transpose_words(typingctx: Any, source: Any, source_stride: Any, out: Any, out_stride: Any) -> Any:
    """Transpose int16 [16, 16]; strides in bytes."""

    def write(c: _Code, source: Any, source_stride: Any, out: Any, out_stride: Any) -> None:
        half = LANES // 2
        for left in (0, half):
            # Rows i and i + 8 side by side: CPUs shuffle cheaply within 128 bits only.
            rows = [
                c.b.shuffle_vector(
                    *(
                        c.load(
                            ir.VectorType(_I16, half),
                            c.at(c.at(source, c.times(source_stride, row)), 2 * left),
                        )
                        for row in (i, i + half)
                    ),
                    _mask(range(LANES)),
                )
                for i in range(half)
            ]
            for i, row in enumerate(c.transpose(rows, half)):
                c.store(row, c.at(out, c.times(out_stride, left + i)))

    return _void(write, 4)


@intrinsic
def transpose_bytes(typingctx: Any, source: Any, source_stride: Any, out: Any, out_stride: Any) -> Any:
    """Transpose uint8 [16, 16]; strides in bytes."""

    def write(c: _Code, source: Any, source_stride: Any, out: Any, out_stride: Any) -> None:
        kind = ir.VectorType(_I8, LANES)
        rows = [c.load(kind, c.at(source, c.times(source_stride, i))) for i in range(LANES)]
        for i, row in enumerate(c.transpose(rows, LANES)):
            c.store(row, c.at(out, c.times(out_stride, i)))

    return _void(write, 4)


@intrinsic
def weave(typingctx: Any, red: Any, green: Any, blue: Any, out: Any) -> Any:
    """Interleave three uint8 [16] to uint8 [16, 3]."""

    def write(c: _Code, red: Any, green: Any, blue: Any, out: Any) -> None:
        r, g, b = (c.load(ir.VectorType(_I8, LANES), address) for address in (red, green, blue))
        pairs = (c.b.shuffle_vector(x, y, _mask(range(2 * LANES))) for x, y in ((r, g), (b, b)))
        order = [LANES * channel + i for i in range(LANES) for channel in range(3)]
        c.store(c.b.shuffle_vector(*pairs, _mask(order)), out)

    return _void(write, 4)


@intrinsic
def box(
    typingctx: Any,
    first: Any,
    stride: Any,
    count: Any,
    left: Any,
    right: Any,
    inner: Any,
    outer: Any,
    out: Any,
) -> Any:
    """Filter uint8 [32]: (inner * sum of `count` rows + outer * (left + right)) / 2^24, rounded."""

    def write(
        c: _Code, first: Any, stride: Any, count: Any, left: Any, right: Any, inner: Any, outer: Any, out: Any
    ) -> None:
        kind, words, wide = (ir.VectorType(element, BOX_BYTES) for element in (_I8, _I16, _I32))

        def load(address: Any) -> Any:
            return c.b.zext(c.load(kind, address), words)

        def scaled(total: Any, weight: Any) -> Any:
            return c.b.mul(c.b.zext(total, wide), c.splat(c.b.trunc(weight, _I32), BOX_BYTES))

        (total,) = c.accumulators(load(first), 1)
        with cgutils.for_range(c.b, c.b.sub(count, ir.Constant(_I64, 1))) as loop:
            row = load(c.at(c.at(first, stride), c.b.mul(loop.index, stride)))
            c.b.store(c.b.add(c.b.load(total), row), total)
        mixed = c.b.add(scaled(c.b.load(total), inner), scaled(c.b.add(load(left), load(right)), outer))
        rounded = c.b.add(mixed, _constant(_I32, BOX_BYTES, 1 << 23))
        c.store(c.b.trunc(c.b.lshr(rounded, _constant(_I32, BOX_BYTES, 24)), kind), out)

    return _void(write, 8)
