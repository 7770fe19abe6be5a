"""The table of instructions that each lane does by itself, from registers to a register."""

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx.memory import bf16_bits, bf16_values, f16_bits, halves, packed

# How a register holds a type, and how numpy calculates with it.
RAW = {"pred": bool, "b8": np.uint16, "u8": np.uint16} | {
    f"{letter}{bits}": np.dtype(f"u{bits // 8}").type for letter in "busf" for bits in (16, 32, 64)
}
RAW |= {"bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32}
_VIEW = RAW | {"s32": np.int32, "s64": np.int64, "f32": np.float32}
_TINY = np.float32(2.0**-126)


@dataclasses.dataclass(frozen=True)
class Operation:
    """Types of what is taken and of what is given, and the function between."""

    taken: tuple[str, ...]
    given: str
    function: Callable[..., np.ndarray]

    def __call__(self, *raw: np.ndarray) -> np.ndarray:
        values = (x.view(_VIEW[kind]) for x, kind in zip(raw, self.taken, strict=True))
        result = self.function(*values)
        return result.astype(_VIEW[self.given], copy=False).view(RAW[self.given])


def _flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x).astype(np.float32)


def _shifted_left(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(b < a.itemsize * 8, a << np.minimum(b, a.itemsize * 8 - 1).astype(a.dtype), a.dtype.type(0))


def _shifted_right(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shifted = a >> np.minimum(b, a.itemsize * 8 - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b < a.itemsize * 8, shifted, a.dtype.type(0))


def _high(wide: type) -> Callable[..., np.ndarray]:
    """The upper half of a product of 32 bits each."""
    return lambda a, b: (a.astype(wide) * b.astype(wide)) >> wide(32)


def _in_pairs(kind: str, function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """For words of two numbers: in fp64, rounded to fp32 and then to `kind`."""

    def on_words(*words):
        lows, highs = zip(*(halves(word, kind) for word in words), strict=True)
        with_wide = (function(*(x.astype(np.float64) for x in part)).astype(np.float32) for part in (lows, highs))
        return packed(*with_wide, kind)

    return on_words


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) * b + c


def _picked(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: of eight bytes the four that the selector's nibbles number. No signs are spread."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    numbers = [(selector >> np.uint32(4 * i) & np.uint32(7)).astype(np.uint64) for i in range(4)]
    if (selector & np.uint32(0x8888)).any():
        raise NotImplementedError("the simulator's prmt spreads no signs")
    picked = [both >> np.uint64(8) * n & np.uint64(255) for n in numbers]
    return sum(x << np.uint64(8 * i) for i, x in enumerate(picked)).astype(np.uint32)


def _approximate(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: _flushed(function(_flushed(a).astype(np.float64)).astype(np.float32))


# name, types as the opcode ends, how many of that type are taken, function
_OF_ONE_TYPE = [
    ("mov", "pred b16 b32 u32 f32 b64 u64", 1, lambda a: a),
    ("cvta.param", "u64", 1, lambda a: a),
    ("add", "s32 u32 s64 u64 f32 rn.f32", 2, np.add),
    ("sub", "s32 u32 s64 u64 f32 rn.f32", 2, np.subtract),
    ("mul", "f32 rn.f32", 2, np.multiply),
    ("mul.lo", "s32 u32 s64 u64", 2, np.multiply),
    ("mad.lo", "s32 u32 s64 u64", 3, lambda a, b, c: a * b + c),
    ("mul.hi", "s32", 2, _high(np.int64)),
    ("mul.hi", "u32", 2, _high(np.uint64)),
    ("div", "s32", 2, lambda a, b: np.trunc(a / b.astype(np.float64))),
    ("fma.rn", "f32", 3, _fma),
    ("mul.rn", "bf16x2", 2, _in_pairs("bf16", np.multiply)),
    ("mul.rn", "f16x2", 2, _in_pairs("f16", np.multiply)),
    ("fma.rn", "bf16x2", 3, _in_pairs("bf16", _fma)),
    ("and", "pred b32 b64", 2, np.bitwise_and),
    ("or", "pred b32 b64", 2, np.bitwise_or),
    ("xor", "pred b32 b64", 2, np.bitwise_xor),
    ("not", "pred b32 b64", 1, np.invert),
    ("popc", "b32", 1, np.bitwise_count),
    ("prmt", "b32", 3, _picked),
    ("neg", "s32 f32", 1, np.negative),
    ("abs", "s32 f32", 1, np.abs),
    ("min", "s32 u32", 2, np.minimum),
    ("max", "s32 u32", 2, np.maximum),
    ("min", "f32", 2, np.fmin),
    ("max", "f32", 2, np.fmax),
    ("min.NaN", "f32", 2, np.minimum),
    ("max.NaN", "f32", 2, np.maximum),
    ("ex2.approx.ftz", "f32", 1, _approximate(np.exp2)),
    ("rcp.approx.ftz", "f32", 1, _approximate(np.reciprocal)),
    ("rsqrt.approx.ftz", "f32", 1, _approximate(lambda a: 1 / np.sqrt(a))),
]
_COMPARED = [
    ("eq", "s32 u32 b32 s64 u64 b64 f32", np.equal),
    ("ne", "s32 u32 b32 s64 u64 b64 f32", np.not_equal),
    ("lt", "s32 u32 s64 u64 f32", np.less),
    ("le", "s32 u32 s64 u64 f32", np.less_equal),
    ("gt", "s32 u32 s64 u64 f32", np.greater),
    ("ge", "s32 u32 s64 u64 f32", np.greater_equal),
]
OPERATIONS = {
    "shl.b32": Operation(("b32", "u32"), "b32", _shifted_left),
    "shl.b64": Operation(("b64", "u32"), "b64", _shifted_left),
    "shr.u32": Operation(("u32", "u32"), "u32", _shifted_right),
    "shr.s32": Operation(("s32", "u32"), "s32", _shifted_right),
    "shr.u64": Operation(("u64", "u32"), "u64", _shifted_right),
    "mul.wide.u32": Operation(("u32", "u32"), "u64", lambda a, b: a.astype(np.uint64) * b),
    "mul.wide.s32": Operation(("s32", "s32"), "s64", lambda a, b: a.astype(np.int64) * b),
    "cvt.u32.u16": Operation(("u16",), "u32", lambda a: a),
    "cvt.u64.u32": Operation(("u32",), "u64", lambda a: a),
    "cvt.s64.s32": Operation(("s32",), "s64", lambda a: a),
    "cvt.u32.u64": Operation(("u64",), "u32", lambda a: a),
    "cvt.f32.bf16": Operation(("bf16",), "f32", bf16_values),
    "cvt.f32.f16": Operation(("u16",), "f32", lambda a: a.view(np.float16)),
    "cvt.rn.f16.f32": Operation(("f32",), "u16", f16_bits),
    "cvt.rn.bf16.f32": Operation(("f32",), "u16", bf16_bits),
    "cvt.rn.bf16x2.f32": Operation(("f32", "f32"), "b32", lambda high, low: packed(low, high, "bf16")),
    "cvt.rn.f16x2.f32": Operation(("f32", "f32"), "b32", lambda high, low: packed(low, high, "f16")),
}
for _name, _types, _count, _function in _OF_ONE_TYPE:
    for _type in _types.split():
        _kind = _type.split(".")[-1]
        OPERATIONS[f"{_name}.{_type}"] = Operation((_kind,) * _count, _kind, _function)
for _name, _types, _function in _COMPARED:
    OPERATIONS |= {f"setp.{_name}.{kind}": Operation((kind, kind), "pred", _function) for kind in _types.split()}
for _kind in ("b16", "b32", "f32", "b64"):
    OPERATIONS[f"selp.{_kind}"] = Operation((_kind, _kind, "pred"), _kind, lambda a, b, first: np.where(first, a, b))
