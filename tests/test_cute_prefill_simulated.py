"""What the CuTe prefill compiles to, run by the simulator of PTX in `ptx`, against the fp64 oracle, without a GPU."""

import dataclasses
import functools
import itertools
import math
import re
import struct

import pytest
import torch
from decode_inputs import tokens_of
from prefill_inputs import SAFE, SOFTPLUS, plain
from ptx import GlobalMemory, Kernel, PtxError, TensorMap

from kda_kernels.cute.prefill import functions as prefill_functions
from kda_kernels.cute.prefill.config import ALIGNMENT, CHUNK, LEAST_LEFT, THREADS, Part, PrefillSpec
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.ints import cdiv
from kda_kernels.problem import Op, Options
from kda_kernels.reference.oracle import recurrence
from kda_kernels.tensors import Checkpoints, Inputs, Outputs
from kdacli.judge import Reference, judge
from kdacli.verify.transforms import TRANSFORMS

pytestmark = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
SIZE = 128  # of a head
OUTPUT_ERROR, STATE_ERROR, TRANSITION_ERROR = 6e-3, 2.5e-3, 1e-2  # relative, of norms
EAGER, LATE = 0.0, 0.97  # of `Kernel.launch`


def inputs_of(lens: list[int], options: Options = SAFE) -> Inputs:
    return plain(lens, options=options, HV=1, device="cpu")


def kept_by(lens: list[int]) -> Checkpoints:
    """Rows for the state after every 64 tokens."""
    rows = torch.full((len(lens), max(lens) // ALIGNMENT + 1), -1, dtype=torch.int32)
    counts = [length // ALIGNMENT for length in lens]
    for n, count in enumerate(counts):
        rows[n, :count] = torch.arange(count) + sum(counts[:n])
    states = torch.full((sum(counts) + 1, 1, SIZE, SIZE), torch.nan, dtype=torch.bfloat16)
    return Checkpoints(states, rows, every=ALIGNMENT)


def kept_at(positions: list[int], dtype: torch.dtype) -> Checkpoints:
    """Rows for the state after so many tokens of the one sequence, in any order; a last row for none."""
    states = torch.full((len(positions) + 1, 1, SIZE, SIZE), torch.nan, dtype=dtype)
    rows = torch.arange(len(positions), dtype=torch.int32)[None]
    return Checkpoints(states, rows, torch.tensor([positions], dtype=torch.int32))


def ptx_of(part: Part, options: Options, kept: Checkpoints | None = None, batch_invariant: bool = False) -> str:
    inputs = dataclasses.replace(inputs_of([1], options), checkpoints=kept, batch_invariant=batch_invariant)
    return compiled(prefill_functions.spec_of(part, inputs, None if part is Part.SUMMARY else inputs.new_final_state()))


@functools.cache
def compiled(spec: PrefillSpec) -> str:
    return prefill_functions._variant("simulated", spec).build("sm_90a").ptx


class Call:
    """A launch for one head: its tensors in simulated memory, and its arguments as the compiled host half passes them.

    Attributes: o, ht: results. summaries: E and T of units, where sequences are split in segments of a chunk, or of
    sequences; starts: states before units. kept: checkpoints.
    """

    def __init__(self, inputs: Inputs, part: Part = Part.WHOLE, workers: int = 0):
        self.inputs, self.part, self.memory = inputs, part, GlobalMemory()
        self.T, self.N = inputs.q.shape[1], len(inputs.cu_seqlens) - 1
        lens = inputs.cu_seqlens.diff().tolist()
        self.units = sum(cdiv(max(0, length - CHUNK), CHUNK) for length in lens) if part is Part.SPLIT else 0
        self.ctas = workers or (2 * self.N if part is Part.SUMMARY else self.N + 2 * self.units)
        self.o = self._nan(1, self.T, 1, SIZE, dtype=inputs.v.dtype)
        self.ht = self._nan(self.N, 1, SIZE, SIZE)
        self.parameters: list[bytes | TensorMap] = []
        self._pass()

    def run(self, kernel: Kernel, seed: int = 0, late: float = 0.5) -> "Call":
        kernel.launch(self.memory, self.parameters, ctas=self.ctas, threads=THREADS, seed=seed, late=late)
        return self

    def _nan(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.memory.place(torch.full(shape, torch.nan, dtype=dtype))

    def _pass(self) -> None:
        x, place = self.inputs, self.memory.place
        q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens = (
            place(one) for one in (x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.state, x.cu_seqlens)
        )
        maps = [self._rows(one) for one in (q, k, v, g, self.o)]
        tensors = [
            self._tensor(beta, (self.T, 1), (self.T, 1, 1)),
            self._tensor(A_log, (1,)),
            self._tensor(dt_bias, (SIZE,)),
            self._tensor(self.o, (self.T, 1), (self.T * SIZE, SIZE, SIZE)),
        ]
        if self.part is not Part.SUMMARY:
            tensors += [self._tensor(states, (self.N, 1), (SIZE * SIZE,)) for states in (state, self.ht)]
        tensors.append(self._tensor(cu_seqlens, (self.N + 1,)))
        if self.part is Part.SUMMARY:
            self.summaries = self._nan(2 * self.N, 1, SIZE, SIZE)
            tensors.append(self._tensor(self.summaries, (2 * self.N, 1), (SIZE * SIZE,)))
        if self.part is Part.SPLIT:
            reads = self._nan(1, self.units * CHUNK, 1, SIZE, dtype=v.dtype)
            self.summaries, self.starts = (self._nan(n, 1, SIZE, SIZE) for n in (2 * self.units, self.N + self.units))
            maps.append(self._rows(reads))
            tensors += [self._tensor(one, (len(one), 1), (SIZE * SIZE,)) for one in (self.summaries, self.starts)]
        if x.checkpoints is not None:
            self.kept, rows = place(x.checkpoints.states), place(x.checkpoints.rows)
            strides = [n * self.kept.itemsize for n in (1, SIZE, SIZE * SIZE, SIZE * SIZE)]
            maps.append(TensorMap(self.memory.address(self.kept), tuple(strides), SIZE, rows=16))
            tensors.append(self._tensor(self.kept, (len(self.kept), 1), (SIZE * SIZE,)))
            places = [rows] if x.checkpoints.offsets is None else [rows, place(x.checkpoints.offsets)]
            tensors += [self._tensor(one, one.shape, (one.shape[1],)) for one in places]
        behind_maps = [bytes(8)] * len(maps)  # extents and strides, which only the descriptors are made of
        self.parameters = [*maps, *behind_maps, *tensors, *self._numbers()]

    def _numbers(self) -> list[bytes]:
        cut = (CHUNK, CHUNK, 0, 1 << 30) if self.part is Part.SPLIT else (0, 0, 0, 0)  # lead, segment, begin, limit
        floats = struct.pack("<f", SIZE**-0.5), struct.pack("<f", -5.0)
        numbers = [struct.pack("<i", one) for one in (-1, ALIGNMENT, self.units, *cut, self.N)]  # null slot, every, ...
        numbers[3:3] = floats
        if self.part is Part.STAYING:
            counter = self.memory.place(torch.zeros(4, dtype=torch.int32))
            numbers.append(struct.pack("<Q", self.memory.address(counter)))
        return [*numbers, struct.pack("<IIBBBB", 1, *[0] * 5)]  # a divisor: of one head

    def _rows(self, tensor: torch.Tensor) -> TensorMap:
        size = tensor.itemsize
        return TensorMap(self.memory.address(tensor), (size, SIZE * size, SIZE * size), tensor.shape[1])

    def _tensor(self, tensor: torch.Tensor, extents, strides=()) -> bytes:
        """Its address, and what of its extents and strides is not known when it is compiled; aligned to 8 bytes."""
        gap = "4x" * (len(extents) % 2)
        return struct.pack(f"<Q{len(extents)}I{gap}{len(strides)}Q", self.memory.address(tensor), *extents, *strides)


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the norm, relative; NaN where a number is missing."""
    return float((actual.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def check(call: Call) -> None:
    """Results of whole sequences: as `kda verify` judges them, and by norms more closely."""
    inputs = dataclasses.replace(call.inputs, checkpoints=None)
    for verdict in judge(Reference(inputs, Op.PREFILL), Outputs(call.o, call.ht)):
        assert verdict.passed, verdict
    wanted = recurrence(inputs)
    ends = call.inputs.cu_seqlens.tolist()
    for n, (first, end) in enumerate(itertools.pairwise(ends)):
        if first < end:
            assert error(call.o[0, first:end], wanted.o[0, first:end]) <= OUTPUT_ERROR, f"o of sequence {n}"
        assert error(call.ht[n], wanted.final_state[n]) <= STATE_ERROR, f"the state of sequence {n}"


both_gates = pytest.mark.parametrize("options", [SAFE, SOFTPLUS], ids=["safe", "softplus"])


@both_gates
@pytest.mark.parametrize("late", [EAGER, LATE])
def test_packed_sequences(options, late):
    check(Call(inputs_of([70, 0, 5], options)).run(Kernel(ptx_of(Part.WHOLE, options)), late=late))


@both_gates
def test_fp16(options):
    inputs = inputs_of([70, 0, 5], options)
    inputs = dataclasses.replace(inputs, q=inputs.q.half(), k=inputs.k.half(), v=inputs.v.half())
    spec = prefill_functions.spec_of(Part.WHOLE, inputs, inputs.new_final_state())
    call = Call(inputs).run(Kernel(compiled(spec)))
    wanted = recurrence(inputs)
    assert error(call.o, wanted.o) <= OUTPUT_ERROR / 6
    assert max(error(call.ht[n], wanted.final_state[n]) for n in range(3)) <= STATE_ERROR / 4


def test_what_gates_leave_of_a_state():
    """Keys of zero: each channel decays alone, by gates from open to shut; log decays are right to 2e-6."""
    inputs = inputs_of([40], SOFTPLUS)
    inputs.k.zero_()
    inputs.A_log.fill_(3.0)
    inputs.g.copy_(torch.linspace(-14.0, 0.0, SIZE).expand_as(inputs.g))
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, SOFTPLUS)))
    wanted = recurrence(inputs).final_state[0, 0]
    decay = wanted / inputs.state[0, 0].double()
    seen = decay > 1e-30
    assert seen.sum() > SIZE * SIZE // 2
    off = (call.ht[0, 0].double() / wanted - 1).abs()
    assert (off <= 1e-6 - 2e-6 * decay.log())[seen].all()


@both_gates
@pytest.mark.parametrize("rate", [1e-3, 0.45, 200.0])
def test_gates_from_shut_to_open(options, rate):
    """States only decay, so that every digit of a decay shows in them."""
    inputs = TRANSFORMS["gate-range"](inputs_of([2, 64], options))
    inputs.A_log.fill_(math.log(rate))
    check(Call(inputs).run(Kernel(ptx_of(Part.WHOLE, options))))


def test_what_bounded_gates_leave_of_a_state():
    """As above, of one chunk, whose second half leaves 2^LEAST_LEFT of a channel at least."""
    inputs = inputs_of([CHUNK])
    inputs.k.zero_()
    inputs.g.copy_(torch.linspace(-14.0, 14.0, SIZE).expand_as(inputs.g))
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, SAFE)))
    state = inputs.state[0, 0].double()
    decay = recurrence(inputs).final_state[0, 0] / state
    half = decay.sqrt()
    assert 0.2 < (half < 2.0**LEAST_LEFT).double().mean() < 0.8
    wanted = half * half.clamp(min=2.0**LEAST_LEFT)
    off = (call.ht[0, 0].double() / state / wanted - 1).abs()
    normal = (state * wanted).abs() > torch.finfo(torch.float32).tiny
    assert (off <= 1e-6 - 1e-6 * decay.log())[normal].all()


@both_gates
def test_a_state_of_little_but_the_last_key(options):
    """A key has no bits that a product of tf32 cuts off, so all of the state that is cut is what is written to it."""
    inputs = inputs_of([64], options)
    inputs.g.add_(4.0)
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, options)))
    assert error(call.ht[0], recurrence(inputs).final_state[0]) <= 3.2e-4


def test_what_shut_gates_leave_of_a_chunks_last_token():
    """exp(-5) a token, of which the factor over both halves that lie between two middles has to hold enough."""
    inputs = inputs_of([2 * CHUNK])
    inputs.g.fill_(14.0)
    inputs.state.zero_()
    inputs.v[:, : CHUNK - 1] = inputs.v[:, CHUNK:] = 0.0
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, SAFE)))
    wanted = recurrence(inputs).o[0]
    for token in range(CHUNK - 1, CHUNK + 4):
        assert error(call.o[0, token], wanted[token]) <= 2 * OUTPUT_ERROR, f"token {token}"


def test_gates_that_close_and_open():
    """Each channel forgets within 1 to 40 tokens, at its own time, a state larger than what is written after."""
    inputs = inputs_of([161])
    token, channel = torch.arange(161)[:, None], torch.arange(SIZE)
    shut = (token + 7 * channel) % 80 < 1 + channel % 40
    inputs.g.copy_(torch.where(shut, 30.0, -30.0).view_as(inputs.g))
    inputs.state.mul_(100)
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, SAFE)))
    check(call)
    wanted = recurrence(inputs).o[0]
    assert max(error(call.o[0, n : n + 8], wanted[n : n + 8]) for n in range(0, 161, 8)) <= 1.5 * OUTPUT_ERROR


@both_gates
def test_bits_of_later_tokens(options):
    """Without a bound no bit of o depends on later tokens; with one some do (`KDA_CAUSAL`)."""
    kernel = Kernel(ptx_of(Part.WHOLE, options))
    inputs, others = inputs_of([40], options), inputs_of([40], options)
    o = Call(inputs).run(kernel).o
    same = []
    for first in (1, 6, 11, 16, 23, 31, 35):
        changed = {
            name: torch.cat([getattr(inputs, name)[:, :first], 3 * getattr(others, name)[:, first:].flip(1)], 1)
            for name in ("q", "k", "v", "g", "beta")
        }
        later = Call(dataclasses.replace(inputs, **changed)).run(kernel).o
        assert not later[:, first:].equal(o[:, first:])
        same.append(later[:, :first].equal(o[:, :first]))
    assert all(same) == (options is SOFTPLUS), same


@both_gates
def test_ctas_that_stay(options):
    kernel = Kernel(ptx_of(Part.STAYING, options))
    check(Call(inputs_of([40, 0, 33], options), Part.STAYING, workers=2).run(kernel))


@both_gates
def test_checkpoints(options):
    inputs = dataclasses.replace(inputs_of([130], options), checkpoints=kept_by([130]))
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, options, inputs.checkpoints)))
    check(call)
    for n in range(2):
        first = alone(inputs, slice(0, (n + 1) * ALIGNMENT), inputs.state)
        assert error(call.kept[n], first.final_state[0]) <= STATE_ERROR, f"checkpoint {n}"


@both_gates
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_checkpoints_at_given_positions(options, dtype):
    positions = [128, 64, 65, 128, 0, 192]
    inputs = dataclasses.replace(inputs_of([130], options), checkpoints=kept_at(positions, dtype))
    call = Call(inputs).run(Kernel(ptx_of(Part.WHOLE, options, inputs.checkpoints)))
    check(call)
    for row, position in enumerate(positions[:2] + positions[3:4]):
        first = alone(inputs, slice(0, position), inputs.state)
        assert error(call.kept[row + (row == 2)], first.final_state[0]) <= STATE_ERROR, f"checkpoint at {position}"
    assert call.kept[[2, 4, 5, 6]].isnan().all(), "no chunk ends there; before and behind the tokens; nobody's"


@pytest.mark.parametrize(
    "options", [SAFE, dataclasses.replace(SAFE, allow_neg_eigval=True), SOFTPLUS], ids=["safe", "2 sigmoid", "softplus"]
)
@pytest.mark.parametrize(
    ("part", "dtype", "invariant"),
    [
        (Part.WHOLE, torch.float32, False), (Part.WHOLE, torch.bfloat16, False),
        (Part.WHOLE, torch.float32, True), (Part.STAYING, torch.bfloat16, False),
    ],
    ids=str,
)  # fmt: skip
def test_checkpoints_change_no_bit(options, part, dtype, invariant):
    lens, workers = ([130], 0) if part is Part.WHOLE else ([64, 40, 0, 128, 70], 1)
    inputs = inputs_of(lens, options)
    kept = kept_by(lens).map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    calls = []
    for one in (None, kept):
        kernel = Kernel(ptx_of(part, options, one, invariant))
        calls.append(Call(dataclasses.replace(inputs, checkpoints=one), part, workers).run(kernel))
    check(calls[0])
    assert calls[0].o.equal(calls[1].o) and calls[0].ht.equal(calls[1].ht)
    assert not calls[1].kept[: len(kept.states) - 1].isnan().any()


def alone(inputs: Inputs, at: slice, state: torch.Tensor, **changes):
    """What the oracle makes of some tokens of the one sequence, from this state."""
    one = tokens_of(inputs, slice(None), at)
    return recurrence(dataclasses.replace(one, state=state, cu_seqlens=None, checkpoints=None, **changes))


def lasting(lens: list[int], options: Options) -> Inputs:
    """Whose gates leave something of a state: transitions are no zeros."""
    inputs = inputs_of(lens, options)
    inputs.g.sub_(4.0)
    return inputs


@both_gates
def test_segments(options):
    """The first segment hands its state on; of the others o and the state E are made from nothing, and T from one."""
    inputs = lasting([100], options)
    call = Call(inputs, Part.SPLIT).run(Kernel(ptx_of(Part.SPLIT, options)), late=LATE)
    lead = alone(inputs, slice(0, CHUNK), inputs.state)
    assert error(call.o[:, :CHUNK], lead.o) <= OUTPUT_ERROR
    assert error(call.starts[1], lead.final_state[0]) <= STATE_ERROR
    one = torch.eye(SIZE).view(1, 1, SIZE, SIZE)
    assert call.units == 3
    for unit in range(call.units):
        at = slice((unit + 1) * CHUNK, min((unit + 2) * CHUNK, 100))
        wanted = alone(inputs, at, torch.zeros_like(one))
        assert error(call.o[:, at], wanted.o) <= OUTPUT_ERROR, f"o of unit {unit}"
        assert error(call.summaries[2 * unit], wanted.final_state[0]) <= STATE_ERROR, f"E of unit {unit}"
        T = alone(inputs, at, one, v=torch.zeros_like(inputs.v[:, at])).final_state[0, 0]
        assert error(transition(call.summaries[2 * unit + 1]), T) <= TRANSITION_ERROR, f"T of unit {unit}"


@both_gates
def test_summaries(options):
    """Of a sequence the state that it makes of nothing, and what it makes of the identity without values."""
    inputs = lasting([70], options)
    call = Call(inputs, Part.SUMMARY).run(Kernel(ptx_of(Part.SUMMARY, options)), late=LATE)
    one = torch.eye(SIZE).view(1, 1, SIZE, SIZE)
    E = alone(inputs, slice(None), torch.zeros_like(one)).final_state[0]
    T = alone(inputs, slice(None), one, v=torch.zeros_like(inputs.v)).final_state[0]
    assert error(call.summaries[0], E) <= STATE_ERROR
    assert error(call.summaries[1], T) <= TRANSITION_ERROR


@pytest.mark.parametrize(
    "options", [dataclasses.replace(one, allow_neg_eigval=True) for one in (SAFE, SOFTPLUS)], ids=["safe", "softplus"]
)
def test_an_inverse_in_two_parts(options):
    check(Call(inputs_of([70], options)).run(Kernel(ptx_of(Part.WHOLE, options)), late=LATE))


def transition(held: torch.Tensor) -> torch.Tensor:
    """T of a unit [K, K]: fp16 numbers, and behind them what all of them are multiplied by."""
    numbers = held.flatten()
    return (
        numbers[: SIZE * SIZE // 2].view(torch.float16).view(SIZE, SIZE).double() * numbers[SIZE * SIZE // 2].double()
    )


@pytest.mark.parametrize("which", [0, 2], ids=["for a chunk", "for inputs"])
def test_a_missing_wait_is_found(which):
    """In at least one of a few orders the numbers are wrong, or the kernel does what no GPU allows."""
    text = ptx_of(Part.WHOLE, SAFE)
    wait = list(re.finditer(r"mbarrier\.try_wait\.parity[^;]*;", text))[which]
    broken = Kernel(text[: wait.start()] + "setp.eq.s32 P1, 0, 0;" + text[wait.end() :])
    with pytest.raises((AssertionError, PtxError)):
        for seed in range(6):
            check(Call(inputs_of([130])).run(broken, seed=seed, late=LATE))
