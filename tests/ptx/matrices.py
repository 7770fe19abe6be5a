"""Instructions on matrices: fragments in the registers of a warp, and operands in shared memory."""

import re
from collections.abc import Callable

import numpy as np

from ptx.instructions import Run, address, instruction, value
from ptx.memory import LANE, bf16_values, f16_values, halves, tf32_values
from ptx.parsing import Statement, elements

ROW, COLUMN = LANE >> 2, LANE & 3  # of a lane's first element in a fragment, in columns of 32 bits
_PLACES = ((0, 0), (8, 0), (0, 8), (8, 8))  # of the registers of A in 16 rows, in columns of 32 bytes


def _left(words: list[np.ndarray], kind: str) -> np.ndarray:
    """A, float64 [16, 16] from four registers, or [16, 8] from two; of tf32 [16, 8] from four."""
    a = np.zeros((16, 8 if kind == "tf32" else 4 * len(words)))
    for word, (row, column) in zip(words, _PLACES[: len(words)], strict=True):
        if kind == "tf32":
            a[ROW + row, COLUMN + column // 2] = tf32_values(word)
        else:
            a[ROW + row, 2 * COLUMN + column], a[ROW + row, 2 * COLUMN + column + 1] = halves(word, kind)
    return a


def _right(words: list[np.ndarray], kind: str) -> np.ndarray:
    """B, float64 [16, 8] from two registers, or [8, 8] from one; of tf32 [8, 8] from two."""
    b = np.zeros((8 if kind == "tf32" else 8 * len(words), 8))
    for n, word in enumerate(words):
        if kind == "tf32":
            b[COLUMN + 4 * n, ROW] = tf32_values(word)
        else:
            b[2 * COLUMN + 8 * n, ROW], b[2 * COLUMN + 8 * n + 1, ROW] = halves(word, kind)
    return b


def _sums(d: np.ndarray, n: int) -> np.ndarray:
    """Register n of an accumulator [16, N]."""
    return d[ROW + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * COLUMN + n % 2]


@instruction("mma.sync.aligned")
def _multiply(statement: Statement) -> Run:
    shape, *_, kind = statement.opcode.split(".")[3:8]
    sizes = {"m16n8k16": (4, 2), "m16n8k8": (4, 2) if kind == "tf32" else (2, 1)}
    if shape not in sizes or kind not in ("bf16", "f16", "tf32"):
        raise NotImplementedError(f"the simulator has no instruction `{statement}`")
    given = elements(statement.operands[0])
    a, b, c = ([value(one) for one in elements(operand)] for operand in statement.operands[1:])
    if (len(a), len(b)) != sizes[shape]:
        raise ValueError(f"so many registers are none of its: `{statement}`")

    def multiply(warp):
        warp.must_be_whole(statement)
        d = _left([one(warp) for one in a], kind) @ _right([one(warp) for one in b], kind)
        sums = [_sums(d, n) + one(warp).view(np.float32) for n, one in enumerate(c)]
        for name, total in zip(given, sums, strict=True):
            warp.write(name, total.astype(np.float32).view(np.uint32))

    return multiply


@instruction("ldmatrix.sync.aligned.m8n8.x4", "stmatrix.sync.aligned.m8n8.x4")
def _move_matrices(statement: Statement) -> Run:
    stores, transposed = statement.opcode.startswith("st"), ".trans." in statement.opcode
    where, registers = statement.operands if stores else reversed(statement.operands)
    rows_of, names = address(where), elements(registers)
    places = [(ROW, 2 * COLUMN + n) for n in range(2)]
    if transposed:
        places = [place[::-1] for place in places]

    def move(warp):
        warp.must_be_whole(statement)
        shared = warp.cta.spaces["shared"]
        shared.elements(rows_of(warp), np.uint64, 2)  # aligned to 16 bytes
        memory, first = shared.elements(rows_of(warp), np.uint16)
        at = first.reshape(4, 8, 1) + np.arange(8)
        for name, matrix in zip(names, at, strict=True):
            if stores:
                for n, place in enumerate(places):
                    memory[matrix[place]] = warp.registers[name].view(np.uint16)[n::2]
            else:
                pairs = np.stack([memory[matrix[place]] for place in places], 1)
                warp.write(name, pairs.view(np.uint32).ravel())

    return move


def _shared_operand(cta, descriptor: int, rows: int, depth: int, kind: str, transposed: bool) -> np.ndarray:
    """A matrix of wgmma, float64 [rows, depth]: what its descriptor says of shared memory.

    transposed: the rows, not the depth, lie one after another.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = descriptor >> 62
    if swizzle not in (1, 2):
        raise NotImplementedError(f"the simulator has no swizzle {swizzle} of wgmma")
    size, line = 4 if kind == "tf32" else 2, {1: 128, 2: 64}[swizzle]
    i, j = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if transposed:
        per = line // size
        at = start + i // per * leading + j // 8 * stride + j % 8 * line + i % per * size
    else:
        at = start + i // 8 * stride + i % 8 * line + j * size
    at = at ^ (at >> 7 & (7 if swizzle == 1 else 3)) << 4
    memory, index = cta.spaces["shared"].elements(at, np.uint32 if size == 4 else np.uint16)
    return {"tf32": tf32_values, "bf16": bf16_values, "f16": f16_values}[kind](memory[index]).astype(np.float64)


@instruction("wgmma.mma_async.sync.aligned")
def _multiply_later(statement: Statement) -> Run:
    shape = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.", statement.opcode)
    if shape is None:
        raise NotImplementedError(f"the simulator has no instruction `{statement}`")
    columns, depth, kind = int(shape[1]), int(shape[2]), shape[3]
    accumulator, a, b, adds, *flags = statement.operands
    if flags[:2] != ["1", "1"]:
        raise NotImplementedError(f"the simulator has no signs of operands: {statement}")
    *transposed_a, transposed_b = (flag == "1" for flag in flags[2:] or ["0"])
    names, right, accumulates = elements(accumulator), value(b, "u64"), value(adds, "pred")
    left = _left_operand(a, depth, kind, any(transposed_a))

    def issue(warp):
        warp.must_be_whole(statement)
        descriptor, keep, get_left = int(right(warp)[0]), bool(accumulates(warp)[0]), left(warp)

        def multiply():
            d = get_left() @ _shared_operand(warp.cta, descriptor, columns, depth, kind, transposed_b).T
            for n, name in enumerate(names):
                before = warp.registers[name].view(np.float32) if keep else 0
                warp.registers[name] = (_sums(d, n) + before).astype(np.float32).view(np.uint32)

        warp.products.issue(multiply)

    return issue


def _left_operand(a: str, depth: int, kind: str, transposed: bool) -> Callable:
    """A function of the warp, for when it issues, that gives one for when the product is made.

    Registers are read when it is issued; shared memory is read later.
    """
    if a.startswith("{"):
        words = [value(one) for one in elements(a)]

        def from_registers(warp):
            matrix = _left([one(warp) for one in words], kind)
            return lambda: matrix

        return from_registers
    source = value(a, "u64")

    def from_shared(warp):
        descriptor, first = int(source(warp)[0]), 16 * (warp.index % 4)
        return lambda: _shared_operand(warp.cta, descriptor, 64, depth, kind, transposed)[first : first + 16]

    return from_shared
