"""Instructions of a warp: operands, loads and stores, and how its lanes and warps exchange values and wait.

`prepare` turns a statement into a function of the warp that runs it. Such a function gives False where the warp has to
wait, and is then called again. `matrices` and `asynchronous` add theirs to the table.
"""

import re
from collections.abc import Callable

import numpy as np

from ptx.arithmetic import OPERATIONS, RAW
from ptx.asynchronous import Mbarrier
from ptx.memory import LANE
from ptx.parsing import Statement, elements

Run = Callable[..., bool | None]  # of a `simulation.Warp`
_TABLE: dict[str, Callable[[Statement], Run]] = {}
_SPECIAL = {
    "%laneid": lambda warp: LANE,
    "%tid.x": lambda warp: LANE + np.uint32(32 * warp.index),
    "%ctaid.x": lambda warp: np.full(32, warp.cta.index, np.uint32),
    "%nctaid.x": lambda warp: np.full(32, warp.cta.of, np.uint32),
}
_WITHOUT_EFFECT = (
    "fence", "setmaxnreg", "griddepcontrol", "wgmma.fence", "cp.async.bulk.prefetch",
)  # fmt: skip


def instruction(*names: str) -> Callable:
    """Adds a function to the table: of all opcodes that begin with one of these names, the longest counts."""

    def add(prepares: Callable[[Statement], Run]) -> Callable[[Statement], Run]:
        _TABLE.update(dict.fromkeys(names, prepares))
        return prepares

    return add


def prepare(statement: Statement) -> Run:
    """Raises `NotImplementedError`, which names the instruction, if there is none like it."""
    parts = statement.opcode.rstrip(".").split(".")
    for n in range(len(parts), 0, -1):
        if (prepares := _TABLE.get(".".join(parts[:n]))) is not None:
            return prepares(statement)
    if statement.opcode not in OPERATIONS:
        raise NotImplementedError(f"the simulator has no instruction `{statement}`")
    return _calculate(statement)


# --- operands


def value(operand: str, kind: str = "u32") -> Callable:
    """A function of the warp that gives the raw bits: of a register, or of a number of this type."""
    if operand in _SPECIAL:
        return _SPECIAL[operand]
    if operand.startswith("%"):
        return lambda warp: warp.registers[operand]
    if operand.startswith("0f"):
        number = int(operand[2:], 16)
    else:
        number = int(operand, 0)
    raw = np.dtype(RAW[kind])
    constant = np.full(32, number & ((1 << 8 * raw.itemsize) - 1) if raw.kind == "u" else number != 0, raw)
    constant.flags.writeable = False
    return lambda warp: constant


def address(operand: str) -> Callable:
    """A function of the warp that gives what `[base+offset]` points to, int64."""
    base, offset = re.match(r"\[?([%\w]+)(?:\+(-?\d+))?\]?$", operand).groups()
    first, further = value(base, "u64"), int(offset or 0)
    return lambda warp: first(warp).astype(np.int64) + further


# --- lanes by themselves


def _calculate(statement: Statement) -> Run:
    operation = OPERATIONS[statement.opcode]
    given, *taken = statement.operands
    sources = [value(one, kind) for one, kind in zip(taken, operation.taken, strict=True)]
    return lambda warp: warp.write(given, operation(*(source(warp) for source in sources)))


@instruction("mov")
def _move(statement: Statement) -> Run:
    given, taken = statement.operands
    kind = statement.opcode.split(".")[-1]
    if given.startswith("{"):
        names, source = elements(given), value(taken, kind)
        part = np.dtype(f"u{np.dtype(RAW[kind]).itemsize // len(names)}")

        def unpack(warp):
            parts = source(warp).view(part).reshape(32, -1)
            for n, name in enumerate(names):
                warp.write(name, parts[:, n].copy())

        return unpack
    if taken.startswith("{"):
        parts = [value(one) for one in elements(taken)]
        part = np.dtype(f"u{np.dtype(RAW[kind]).itemsize // len(parts)}")
        return lambda warp: warp.write(
            given, np.stack([one(warp).astype(part) for one in parts], 1).view(RAW[kind]).ravel()
        )
    return _calculate(statement)


@instruction("ld")
def _load(statement: Statement) -> Run:
    names, where = elements(statement.operands[0]), address(statement.operands[1])
    _, space, *_, kind = statement.opcode.replace("::", ".").replace(".volatile", "").split(".")
    dtype, raw = np.dtype(f"u{int(kind[1:]) // 8}"), RAW[kind]

    def load(warp):
        addresses = where(warp)
        addresses = np.where(warp.lanes, addresses, addresses[warp.active()[0]])
        memory, first = warp.cta.spaces[space].elements(addresses, dtype, len(names))
        for n, name in enumerate(names):
            values = memory[first + n]
            if kind == "s32" and name.startswith("%rd"):  # a register of 64 bits takes the sign
                values = values.view(np.int32).astype(np.int64).view(np.uint64)
            warp.write(name, values if values.dtype.itemsize == 8 else values.astype(raw))

    return load


@instruction("st")
def _store(statement: Statement) -> Run:
    _, space, *_, kind = statement.opcode.replace("::", ".").split(".")
    where, dtype = address(statement.operands[0]), np.dtype(f"u{int(kind[1:]) // 8}")
    sources = [value(one, kind) for one in elements(statement.operands[1])]

    def store(warp):
        memory, first = warp.cta.spaces[space].elements(where(warp)[warp.lanes], dtype, len(sources))
        for n, source in enumerate(sources):
            memory[first + n] = source(warp)[warp.lanes]

    return store


@instruction("atom.global.add.u32")
def _add_atomically(statement: Statement) -> Run:
    given, where, source = statement.operands[0], address(statement.operands[1]), value(statement.operands[2])

    def add(warp):
        old = np.zeros(32, np.uint32)
        for lane in warp.active():
            memory, (at,) = warp.cta.spaces["global"].elements(where(warp)[lane : lane + 1], np.uint32)
            old[lane] = memory[at]
            memory[at] += source(warp)[lane]
        warp.write(given, old)

    return add


@instruction(*_WITHOUT_EFFECT)
def _nothing(statement: Statement) -> Run:
    return lambda warp: None


# --- lanes of a warp


@instruction("shfl.sync.bfly", "shfl.sync.idx")
def _shuffle(statement: Statement) -> Run:
    given, source, lane = statement.operands[0], value(statement.operands[1]), value(statement.operands[2])
    by_index = ".idx." in statement.opcode

    def shuffle(warp):
        warp.must_be_whole(statement)
        other = lane(warp) & 31 if by_index else LANE ^ lane(warp)
        warp.write(given, source(warp)[other])

    return shuffle


@instruction("vote.sync.ballot", "vote.sync.any")
def _vote(statement: Statement) -> Run:
    given, source = statement.operands[0], value(statement.operands[1], "pred")
    ballot = ".ballot." in statement.opcode

    def vote(warp):
        warp.must_be_whole(statement)
        yes = source(warp)
        warp.write(given, np.full(32, np.packbits(yes, bitorder="little").view(np.uint32)[0] if ballot else yes.any()))

    return vote


@instruction("elect.sync")
def _elect(statement: Statement) -> Run:
    leader, elected = statement.operands[0].split("|")

    def elect(warp):
        warp.must_be_whole(statement)
        warp.write(leader, np.zeros(32, np.uint32))
        warp.write(elected, LANE == 0)

    return elect


@instruction("bar.warp.sync")
def _meet_in_warp(statement: Statement) -> Run:
    return lambda warp: warp.must_be_whole(statement)


# --- warps of a CTA


@instruction("bar.sync", "barrier.sync", "bar.arrive")
def _meet(statement: Statement) -> Run:
    name, *count = (value(one) for one in statement.operands)
    waits = not statement.opcode.endswith("arrive")

    def meet(warp):
        warp.must_be_whole(statement)
        barrier = warp.cta.barriers[int(name(warp)[0])]
        if warp.waits_for is None:
            warp.waits_for = barrier.round
            barrier.arrive(int(count[0](warp)[0]) if count else 32 * len(warp.cta.warps))
        if waits and barrier.round == warp.waits_for:
            return False
        warp.waits_for = None
        return None

    return meet


@instruction("mbarrier.init")
def _init_mbarrier(statement: Statement) -> Run:
    where, count = address(statement.operands[0]), value(statement.operands[1])

    def init(warp):
        for lane in warp.active():
            warp.cta.mbarriers[int(where(warp)[lane])] = Mbarrier(int(count(warp)[lane]))

    return init


@instruction("mbarrier.arrive")
def _arrive(statement: Statement) -> Run:
    _, where, *further = statement.operands
    at, amount = address(where), value(further[0] if further else "1")
    with_bytes = ".expect_tx." in statement.opcode

    def arrive(warp):
        for lane in warp.active():
            barrier, n = warp.cta.mbarrier(int(at(warp)[lane])), int(amount(warp)[lane])
            if with_bytes:
                barrier.bytes += n
            barrier.arrive(1 if with_bytes else n)

    return arrive


@instruction("mbarrier.try_wait.parity")
def _wait(statement: Statement) -> Run:
    """Never gives up, so that loops around it run once."""
    done, where, parity = statement.operands[0], address(statement.operands[1]), value(statement.operands[2])

    def wait(warp):
        barrier, phase = warp.cta.mbarrier(warp.same(where(warp))), warp.same(parity(warp)) & 1
        if barrier.phase == phase:
            return False
        warp.write(done, np.ones(32, bool))
        return None

    return wait
