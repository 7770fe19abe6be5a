"""The fused prefill in CuTe DSL, for Hopper. Host half; `kernel` is the device half.

One CTA runs a value head of a sequence: chunk-local work and the chain over chunks meet in shared memory, and nothing
goes through a workspace. Where sequences are short and many, a CTA runs one after another (`items`): a launch has as
many as there are multiprocessors. Where there are too few, `plan` cuts sequences into segments: one launch runs
all of them, a second one makes the states between them and adds what these give to the output (`join`; in fp16
a scan and a sum of Triton's); then checkpoints inside of units are made from the states before these.

What it takes is in `CONTRACT` and `unsupported_tensors`; the rest is Triton's: fp32 activations, sizes other than
128, K-first pools. K-first states that are not in place are copied V-first before the kernel, and back behind it. Gates
with a bound of -5 or more are prepared in another way than those without; in fp16 all are prepared like those without.

Floor: q, k, v, g, beta and o moved once, 1.28 KB per token and value head: T=8192, H=96: 1.0 GB, 340 us at 3.0 TB/s.

Range: where gates have a bound, keys and queries are multiplied by decays of up to exp(80) before products take them,
and their norms divided out after that. They may be as long as 2^37 = 1.4e11, whether L2 norms are made here or not;
longer ones make o NaN. With fp16 activations they may have any length. Each value channel of the state is held in units
of a power of two, from 2^-60 to 2^60, in which its largest number is under 32 before a chunk; what fp16 does not hold
of 32 tokens then, with keys that are longer than 1 and not normalised here, makes o infinite or NaN.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from kda_kernels import ranges
from kda_kernels.checks import CAUSAL, check_inputs
from kda_kernels.contract import Contract
from kda_kernels.cute.prefill.config import ALIGNMENT, Part
from kda_kernels.cute.prefill.functions import (
    bounded,
    cut_into,
    function_of,
    k_first_options,
    kind_of,
    stays,
    unsupported_here,
)
from kda_kernels.cute.prefill.functions import variants as variants
from kda_kernels.cute.prefill.plan import Split, plan, plan_of
from kda_kernels.dtypes import FLOATS, name_of
from kda_kernels.errors import InputError, one_line
from kda_kernels.ints import cdiv
from kda_kernels.problem import Op, Options, Problem
from kda_kernels.ranges import stage
from kda_kernels.tensors import Checkpoints, Inputs, Outputs, hand_on
from kda_kernels.triton.runtime import multiprocessors, on_device
from kda_kernels.triton.widened import is_widened, widened
from kda_kernels.variant import H100

CAUSAL_IN_BITS = CAUSAL
WORKSPACE_ALIGNMENT = 16  # bytes
COUNTER_BYTES = 16  # of items that CTAs which stay have taken


CONTRACT = Contract(
    # of fp16 the scale of a row looks at all tokens of a chunk
    dtypes=("bfloat16",) if CAUSAL else ("bfloat16", "float16"),
    g_dtypes=tuple(FLOATS),
    beta_dtypes=tuple(FLOATS),
    param_dtypes=("float32", "bfloat16"),
    square=True,
    beta_values=True,
    neg_eigval=True,
    l2norm=(True, False),
    k_first=True,
    padding=True,
    state_dtypes=("float32", "bfloat16", "float16", "int16"),
    features=frozenset(
        (
            *("null_slot", "has_initial_state", "checkpoints", "batch_invariant", "workspace", "strided_indices"),
            *("tail", "rounding_seed", "state_scales"),
        )
    ),
    aligned=("q", "k", "v", "g", "state"),
)


_K_FIRST_IN_PLACE = "it takes V-first pools and checkpoints only"
_WIDE_NEEDS_MEMORY = "it does not support a workspace with states rounded stochastically or in int16"


@dataclasses.dataclass(frozen=True)
class _Last:
    """What the last call was like, and the functions that calls like it take.

    Attributes:
        key: see `_key`. kind: what all functions are compiled for, part aside: one that the first launch of a call does
            not refuse is not refused by the second. scale, bound: their arguments. sms: of the GPU. bounded: whether
            gates are. functions: by part.
    """

    key: tuple | None = None
    kind: tuple | None = None
    scale: float = 0.0
    bound: float = 0.0
    sms: int = 1
    bounded: bool = True
    functions: dict[Part, Callable[..., Any]] = dataclasses.field(default_factory=dict)


def _key(inputs: Inputs) -> tuple:
    """What compiled functions cannot see of their tensors, or are not compiled for: as `_launch` compares it."""
    (_, _, H, K), (_, _, HV, V) = inputs.q.shape, inputs.v.shape
    return inputs.options, inputs.batch_invariant, H, K, HV, V, inputs.q.device


_last = _Last()


def prefill(
    inputs: Inputs,
    out: torch.Tensor | None = None,
    *,
    final_state: torch.Tensor | None = None,
    return_intermediate_states: bool = False,
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """Runs a checked problem.

    Args:
        inputs: see `Inputs`; call `checks.check_inputs` on it first. q, k, v and g may have any strides that are
            multiples of 16 bytes, with a contiguous last dimension; nothing is copied. A pool is updated in place, and
            only in the slots of sequences with tokens.
        out: [B, T, HV, V] in the dtype of v, with strides as v; made here if not given.
        final_state: without a pool, where the final states go; made here if not given.
        return_intermediate_states: also return the state at the start of every 64 tokens, [B, NT, HV, K, V] in the
            dtype of k (NT over all sequences of a packed batch; this reads cu_seqlens on the host). Not with
            checkpoints. Nothing is written for padding.

    Returns:
        Outputs, with the pool itself as final_state when there is one. Products take the dtype of q, sums and the state
        between chunks are fp32; the state is rounded to its own dtype once, after the last token.

    Raises:
        InputError: this kernel does not take these tensors.
        UnavailableError: it cannot run on this machine.
    """
    if is_widened(inputs) and not return_intermediate_states:
        if (reason := unsupported_tensors(inputs, out)) is not None:
            raise InputError(f"cute-prefill: {reason}")
        return widened(inputs, lambda wide: _outputs(prefill(wide, out)))
    stateful = inputs.state is not None or inputs.output_final_state
    if stateful and not inputs.state_v_first and inputs.state_indices is None:
        return _turned(inputs, out, final_state, return_intermediate_states)
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
    ht = final_state
    if ht is None and inputs.state_indices is None and inputs.output_final_state:
        ht = inputs.new_final_state()
    on_the_way = _states_on_the_way(inputs) if return_intermediate_states else None
    if on_the_way is not None:
        inputs = dataclasses.replace(inputs, checkpoints=on_the_way)
    launch(inputs, o, ht)
    final = ht if inputs.state_indices is None else inputs.state
    outputs = Outputs(o, final if inputs.output_final_state else None)
    if on_the_way is None:
        return outputs
    from kda_kernels.triton.chunk_indices import in_order

    return outputs, in_order(on_the_way.states, inputs.cu_seqlens, inputs.q.shape[0]).mT.contiguous()


def _turned(
    inputs: Inputs, out: torch.Tensor | None, final_state: torch.Tensor | None, return_intermediate_states: bool
) -> Outputs | tuple[Outputs, torch.Tensor]:
    """`prefill` of plain states [.., K, V], by V-first copies of them; see `k_first_options`."""
    state, options = inputs.state, k_first_options(inputs.options)
    beta = inputs.beta if options is inputs.options else inputs.beta.float().sigmoid()
    v_first = inputs.changed(
        state=None if state is None else state.mT.contiguous(), state_v_first=True, options=options, beta=beta
    )
    made = prefill(v_first, out, return_intermediate_states=return_intermediate_states)
    outputs = made[0] if isinstance(made, tuple) else made
    if outputs.final_state is not None:
        k_first = outputs.final_state.mT
        outputs.final_state = k_first.contiguous() if final_state is None else final_state.copy_(k_first)
    return made


def _outputs(made: Outputs | tuple[Outputs, torch.Tensor]) -> Outputs:
    """Of a prefill that returns no intermediate states."""
    assert isinstance(made, Outputs)
    return made


def _states_on_the_way(inputs: Inputs) -> Checkpoints:
    """Room for the states at the start of every 64 tokens, those at the start of sequences written already.

    Packed sequences leave gaps, as in `chunk_indices.max_chunks`, so that their lengths need not be known.
    """
    from kda_kernels.triton.chunk_indices import max_chunks

    if inputs.checkpoints is not None:
        raise InputError("return_intermediate_states", "is given with checkpoints", "one of them should be left out")
    (B, T), N, device = inputs.q.shape[:2], inputs.N, inputs.q.device
    most = cdiv(T, ALIGNMENT)  # of a sequence
    numbers = torch.arange(N, device=device)
    if inputs.cu_seqlens is None:
        slots, first = B * most, numbers * most
    else:
        slots, first = max_chunks(T, N), inputs.cu_seqlens[:-1] // ALIGNMENT + numbers
    states = torch.empty(inputs.state_shape(slots), dtype=inputs.k.dtype, device=device)
    begin = inputs.state
    if begin is None:
        states[first] = 0
    else:
        if inputs.state_indices is not None:
            begin = begin[inputs.state_indices[:N].clamp(0, begin.shape[0] - 1).long()]
        if inputs.has_initial_state is not None:
            begin = begin.where(inputs.has_initial_state[:, None, None, None], 0)
        states[first] = begin.to(states.dtype)
    rows = first[:, None] + torch.arange(1, max(most, 2), device=device)
    return Checkpoints(states, rows, every=ALIGNMENT)


def launch(inputs: Inputs, o: torch.Tensor, ht: torch.Tensor | None = None) -> None:
    """`prefill` into tensors that are there already: `o`, and `ht` where there is no pool.

    Allocates up to `workspace_bytes` unless the call brings a workspace.
    """
    global _last
    call = inputs.fields()
    if again(call, o, ht):
        return
    if (reason := unsupported_tensors(inputs, o)) is not None:
        raise InputError(f"cute-prefill: {reason}")
    if not o.shape[0] * o.shape[1] or not inputs.N:  # no token of any sequence
        hand_on(inputs, o, ht)
        return
    options, kept, sms = inputs.options, inputs.checkpoints is not None, multiprocessors(inputs.q.device)
    key = _key(inputs)
    kind = kind_of(Part.WHOLE, inputs, ht)
    has_bound = bounded(options, inputs.q.dtype)
    last = _Last(key, kind, options.scale_for(inputs.q.shape[3]), options.lower_bound or 0.0, sms, has_bound)
    (B, T), HV, packed = inputs.q.shape[:2], inputs.v.shape[2], inputs.cu_seqlens is not None
    split = None
    if not inputs.batch_invariant:
        split = _split_of(inputs.N, B * T, HV, sms, packed, inputs.cu_seqlens_cpu, inputs.workspace)
    whole = _whole(last, inputs.N, B * T, HV, inputs.workspace)
    for part in (whole,) if split is None else cut_into(inputs.q.dtype is torch.bfloat16, kept):
        last.functions[part] = function_of(part, inputs, None if part is Part.KEPT else ht)
    try:
        _launch(last, call, o, ht)
    except _RefusedError as error:
        raise InputError(f"cute-prefill: {one_line(str(error))}") from None
    if (_last.key, _last.kind) == (key, kind):
        last.functions.update({part: f for part, f in _last.functions.items() if part not in last.functions})
    _last = last


def again(call: tuple, o: torch.Tensor, ht: torch.Tensor | None = None) -> bool:
    """`launch`, if this call is like the last one: lengths and batches may differ. False: it is not; nothing was done.

    Options, heads and device are compared; what is not compared the functions check themselves.

    Args:
        call: the fields of `Inputs` in their order, which are quicker to pass on than an object of them is to make.
    """
    try:
        _launch(_last, call, o, ht)
    except (_RefusedError, AttributeError, IndexError, KeyError):  # nothing was launched
        return False
    return True


class _RefusedError(Exception):
    """A function does not take these tensors; nothing was launched."""


def _launch(last: _Last, call: tuple, o: torch.Tensor, ht: torch.Tensor | None) -> None:
    """A call like `last`, on the way of every prefill of an engine: spelled out, since calls of functions take time.

    Raises `_RefusedError`, or what wrong tensors lead to, before anything was launched.
    """
    (q, k, v, g, beta, options, A_log, bias, h0, indices, offsets, v_first, _, null_slot, started, _, _, _, _, kept,
     invariant, given, ends, _, _, _, _) = call  # fmt: skip
    split = None
    try:
        (B, T, H, K), (_, _, HV, V) = q.shape, v.shape
        N = B if offsets is None else offsets.shape[0] - 1
        if last.key != (options, invariant, H, K, HV, V, q.device) or N < 1 or not T:
            raise _RefusedError("another kind of call")
        if not invariant:
            split = _split_of(N, B * T, HV, last.sms, offsets is not None, ends, given)
    except (TypeError, ValueError) as error:
        raise _RefusedError(error) from None
    # What the functions cannot see: which way round a square state lies, sizes that differ by one, slots that overlap,
    # rows that lie on each other.
    if not v_first and (h0 is not None or ht is not None):
        raise _RefusedError("the state is K-first")
    if indices is None or h0 is None or started is not None or kept is not None or given is not None:
        _check_unseen(last, N, (h0, ht, indices, offsets, started, kept, given))
    if indices is not None and (indices.shape[0] < N or not (h0.is_contiguous() or h0.stride()[0] >= HV * V * K)):
        raise _RefusedError("not one for each sequence, or slots overlap")
    if 0 in q.stride() or 0 in k.stride() or 0 in v.stride() or 0 in g.stride() or 0 in o.stride():
        raise _RefusedError("rows lie on each other")
    if A_log is not None and A_log.ndim != 1:
        A_log = _flat(A_log)
    if bias is not None:
        if bias.numel() != HV * K:
            raise _RefusedError("dt_bias is not one for each channel")
        if bias.ndim != 1:
            bias = _flat(bias)
    tensors = (q, k, v, g, beta, A_log, bias, o, h0, ht, indices, offsets, started)
    kept_there = _NOT_KEPT if null_slot is None and kept is None else _kept(kept, null_slot)
    if split is not None:
        sizes = _Sizes(N, B * T, T, HV, offsets is not None)
        return _launch_split(last, split, sizes, tensors, kept_there, given)
    part = _whole(last, N, B * T, HV, given)
    counter = _workspace(COUNTER_BYTES, o, given).zero_() if part is Part.STAYING else None
    _call(
        "prefill", last.functions[part], tensors, counter, kept_there, (0, last.scale, last.bound, 0, 0, 0, 0, last.sms)
    )


def _whole(last: _Last, N: int, tokens: int, HV: int, given: torch.Tensor | None) -> Part:
    """How whole sequences run. In the caller's workspace, if there is one, a counter needs room for CTAs to stay."""
    room = given is None or given.numel() >= COUNTER_BYTES + WORKSPACE_ALIGNMENT
    return Part.STAYING if room and stays(N, tokens, HV, last.sms, last.bounded) else Part.WHOLE


class _Sizes(NamedTuple):
    """Sequences, tokens of all, tokens of each where they are dense, value heads."""

    N: int
    tokens: int
    T: int
    HV: int
    packed: bool


def _launch_split(
    last: _Last, split: Split, sizes: _Sizes, tensors: tuple, kept: tuple, given: torch.Tensor | None
) -> None:
    """`_launch` of sequences that are cut, with arguments of `_call` that it has checked.

    Args:
        given: the caller's workspace.
    """
    join = last.functions.get(Part.JOIN)
    function = last.functions[Part.CUT if join is None else Part.SPLIT]
    to_kept = last.functions[Part.KEPT] if kept[0] is not None else None
    N, tokens, T, HV, packed = sizes
    units = split.units(N, tokens, packed)
    *_, o, pool, ht, indices, offsets, _ = tensors
    workspace = _workspace(_split_bytes(split, N, units, HV), o, given)
    for i in range(split.rounds(N, tokens, packed)):
        here = (split.lead, split.segment, i * split.limit, split.limit)
        numbers = (units, last.scale, last.bound, *here, last.sms)
        _call("segments", function, tensors, workspace, kept, numbers)
        if join is not None:
            _call("join", join, tensors, workspace, kept, numbers)
        else:
            scan, outputs = _segment_kernels()
            final = ht if indices is None else pool
            segments = scan.Segments(workspace, final, indices, offsets, N, units, kept[3], *here)
            with on_device(o):
                with stage("scan"):
                    scan.scan_segments(segments, T, HV)
                with stage("outputs"):
                    outputs.add_segment_outputs(segments, o)
        if to_kept is not None:
            without_ht = (*tensors[:9], None, *tensors[10:])
            _call("checkpoints", to_kept, without_ht, workspace, kept, numbers)


@functools.cache
def _segment_kernels() -> tuple[ModuleType, ModuleType]:
    """Their modules, which import Triton; an import takes 2 us even where it has been made."""
    from kda_kernels.triton import segment_outputs, segment_scan

    return segment_scan, segment_outputs


def _check_unseen(last: _Last, N: int, tensors: tuple) -> None:
    """As `_launch`, of what few calls have. Raises `_RefusedError`."""
    h0, ht, indices, offsets, started, kept, given = tensors
    assert last.key is not None
    if indices is not None and h0 is None:
        raise _RefusedError("no pool")
    if ht is not None and not ht.is_contiguous():
        raise _RefusedError("final states overlap, or lie apart")
    if offsets is not None:
        for x in (started, ht, None if kept is None else kept.rows, h0 if indices is None else None):
            if x is not None and x.shape[0] != N:
                raise _RefusedError("not one for each sequence")
    if given is not None and (given.dtype, given.ndim, given.device) != (torch.uint8, 1, last.key[-1]):
        raise _RefusedError("workspace is not bytes on the device")
    if kept is not None:
        every = ALIGNMENT if kept.every is None else kept.every
        if (kept.every is None) == (kept.offsets is None) or every < 1 or every % ALIGNMENT:
            raise _RefusedError("checkpoints have offsets, or a distance that is a multiple of 64")


_NOT_KEPT = (None, None, None, -1, 0)


def _kept(kept: Checkpoints | None, null_slot: int | None) -> tuple:
    """The arguments of `PrefillKernel.__call__` behind its workspace, as far as tensors say them."""
    slot = -1 if null_slot is None else null_slot
    if kept is None:
        return None, None, None, slot, 0
    rows, offsets = kept.rows, kept.offsets
    if rows.ndim == 1:
        rows, offsets = rows[:, None], None if offsets is None else offsets[:, None]
    return kept.states, rows, offsets, slot, kept.every or 0


def _call(
    name: str,
    function: Callable[..., Any],
    tensors: tuple,
    workspace: torch.Tensor | None,
    kept: tuple,
    numbers: tuple[float, ...],
) -> None:
    """One launch, in a stage of that name. Raises `_RefusedError`.

    Args:
        tensors, workspace, kept, numbers: the arguments of `PrefillKernel.__call__` in their order; see `_kept`.
    """
    arguments = tensors + (workspace,) + kept + numbers
    try:
        if ranges.enabled():
            with stage(name):
                function(*arguments)
        else:  # a context manager that does nothing costs a third of a microsecond
            function(*arguments)
    except (TypeError, ValueError) as error:
        raise _RefusedError(error) from None


def _flat(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Raises `_RefusedError`."""
    if parameter is None or parameter.ndim == 1:
        return parameter
    try:
        return parameter.view(-1)
    except RuntimeError as error:  # it lies in another order
        raise _RefusedError(error) from None


def launch_part(
    function: Callable[..., Any],
    inputs: Inputs,
    o: torch.Tensor,
    workspace: torch.Tensor,
    units: int,
    here: tuple[int, int, int, int],
) -> None:
    """One launch of tensors that this kernel takes, with the workspace of `PrefillKernel.__call__`.

    Args:
        function: of `function_of`. here: lead, segment, begin and limit, as in `PrefillKernel.__call__`.

    Raises:
        InputError: as `prefill`.
    """
    i = inputs
    numbers = (units, i.options.scale_for(i.q.shape[3]), i.options.lower_bound or 0.0, *here, 0)
    try:
        tensors = (
            i.q, i.k, i.v, i.g, i.beta, _flat(i.A_log), _flat(i.dt_bias), o, i.state, None, i.state_indices,
            i.cu_seqlens, i.has_initial_state,
        )  # fmt: skip
        function(*tensors, workspace, *_kept(i.checkpoints, i.null_slot), *numbers)
    except (TypeError, ValueError, _RefusedError) as error:
        raise InputError(f"cute-prefill: {one_line(str(error))}") from None


def summaries(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of checked tensors: see `kda_kernels.segments.kda_segment_summary`; q is not looked at.

    Raises:
        InputError, UnavailableError: as `prefill`.
    """
    v, N = inputs.v, inputs.N
    if (reason := unsupported_tensors(inputs, v)) is not None:
        raise InputError(f"cute-prefill: {reason}")
    both = torch.empty((2 * N, v.shape[2], v.shape[3], inputs.q.shape[3]), dtype=torch.float32, device=v.device)
    if not v.shape[0] * v.shape[1] or not N:
        both.view(N, 2, *both.shape[1:]).copy_(torch.stack((torch.zeros_like(both[0]), _identity(both[0]))))
    else:
        with stage("summaries"):
            launch_part(function_of(Part.SUMMARY, inputs), inputs, v, both.view(-1), 0, (0, 0, 0, 0))
    return both[0::2], both[1::2]


def _identity(like: torch.Tensor) -> torch.Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def workspace_bytes(N: int, T: int, HV: int, packed: bool = True, sms: int = H100.sms) -> int:
    """What a launch allocates at most for `N` sequences of `T` tokens together on a GPU of so many multiprocessors."""
    split = _split(N, T, HV, sms)
    if split is None:
        return COUNTER_BYTES if N * HV > sms else 0
    return _split_bytes(split, N, split.units(N, T, packed), HV)


def most_workspace_bytes(T: int, HV: int, N: int, device: torch.device) -> int:
    """Enough for launches of up to `T` tokens in up to `N` sequences to be split as if there were no limit.

    Found over lengths and counts in steps of a fifth, with a tenth to spare; one that needed more would run whole.
    """
    sms = multiprocessors(device) if torch.cuda.is_available() else H100.sms
    counts, lengths = ({max(1, int(most / 1.2**i)) for i in range(most.bit_length() * 4)} for most in (N, max(T, 1)))
    most = max(workspace_bytes(n, length, HV, True, sms) for n in counts for length in lengths)
    return int(1.1 * most) + WORKSPACE_ALIGNMENT


def _split_bytes(split: Split, N: int, units: int, HV: int) -> int:
    """See `PrefillKernel.__call__`: states before rounds and units, E and T of units, reads. K = V = 128."""
    return HV * (4 * 128 * 128 * (N + 3 * units) + 2 * 128 * units * split.segment)


def _workspace(size: int, o: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor:
    """fp32, of one dimension and `size` bytes: the caller's, if there is one."""
    if given is None:
        return torch.empty(size // 4, dtype=torch.float32, device=o.device)
    skipped = -given.data_ptr() % WORKSPACE_ALIGNMENT
    return given[skipped : skipped + size].view(torch.float32)


def _split_of(
    N: int, tokens: int, HV: int, sms: int, packed: bool, ends: torch.Tensor | None, given: torch.Tensor | None
) -> Split | None:
    """How the sequences of a call are cut. None: they stay whole, as they do where the caller's workspace is too small.

    Raises `_RefusedError`.

    Args:
        ends: cu_seqlens on the host, if they are known. given: the workspace, if there is one.
    """
    if ends is None:
        split = _split(N, tokens, HV, sms)
    else:
        at = ends.tolist() if packed and ends.is_cpu else []
        if len(at) != N + 1:
            raise _RefusedError("cu_seqlens_cpu is not cu_seqlens on the host")
        split = _split(1, at[1] - at[0], HV, sms) if N == 1 else _split_at(tuple(at), HV, sms)
    if split is not None and given is not None:
        size = _split_bytes(split, N, split.units(N, tokens, packed), HV)
        return split if size + WORKSPACE_ALIGNMENT <= given.numel() else None
    return split


@functools.lru_cache(maxsize=4096)
def _split_at(ends: tuple[int, ...], HV: int, sms: int) -> Split | None:
    """Remembered, as all layers of a model have the same sequences."""
    return plan_of(tuple(map(int.__sub__, ends[1:], ends)), HV, sms).split


def _split(N: int, T: int, HV: int, sms: int) -> Split | None:
    return plan(N, T, HV, sms).split


def unsupported(problem: Problem | None = None) -> str | None:
    """Why this machine cannot run `problem` with this kernel; None if it can."""
    if problem is not None and (reason := CONTRACT.refusal(problem)) is not None:
        return reason
    if problem is not None and not problem.state_v_first and _in_place(problem.pool_slots, problem.features):
        return _K_FIRST_IN_PLACE
    if problem is not None and "workspace" in problem.features and problem.features & {"rounding_seed", "state_scales"}:
        return _WIDE_NEEDS_MEMORY
    return unsupported_here()


def unsupported_tensors(inputs: Inputs, out: torch.Tensor | None = None) -> str | None:
    """Why this kernel cannot run these checked tensors, on whatever machine; None if it can."""
    q, v, wide = inputs.q, inputs.v, is_widened(inputs)
    state = None if wide else inputs.state  # which is then read and written by others
    has_state = inputs.state is not None or inputs.output_final_state
    reason = _unsupported_kind(
        inputs.options, q.shape[2], v.shape[2], q.shape[3], v.shape[3], q.dtype, inputs.g.dtype, inputs.beta.dtype,
        tuple(x.dtype for x in (inputs.A_log, inputs.dt_bias) if x is not None),
        torch.float32 if state is None else state.dtype, has_state, inputs.state_v_first,
    )  # fmt: skip
    if reason is not None:
        return reason
    if lacking := inputs.features() - CONTRACT.features:
        return f"it does not support {min(lacking)}"
    if not inputs.state_v_first and _in_place(inputs.state_indices, inputs.features()):
        return _K_FIRST_IN_PLACE
    if wide and inputs.workspace is not None:
        return _WIDE_NEEDS_MEMORY
    for name, x in (("q", q), ("k", inputs.k), ("v", v), ("g", inputs.g), ("out", out)):
        if x is not None and not _by_tma(x):
            return (
                f"{name} has strides {list(x.stride())} and begins {x.data_ptr() % 16} bytes behind a multiple of 16: "
                "all but the last stride should be multiples of 16 bytes, as the beginning, and none 0"
            )
    kept = None if inputs.checkpoints is None else inputs.checkpoints.states
    kept = None if wide and kept is not None and kept.dtype is not torch.float32 else kept
    for name, x in (("the state", state), ("checkpoints.states", kept)):
        if x is not None and (x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16):
            return f"a slot of {name} is not 16-byte aligned"
    return None


def _in_place(pool: object, features: frozenset[str]) -> bool:
    """Whether states are written where the caller has them."""
    return pool is not None or "checkpoints" in features


@functools.lru_cache(maxsize=256)
def _unsupported_kind(
    options: Options,
    H: int,
    HV: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    g: torch.dtype,
    beta: torch.dtype,
    params: tuple[torch.dtype, ...],
    state: torch.dtype,
    has_state: bool,
    v_first: bool,
) -> str | None:
    """What `CONTRACT` says of such tensors."""
    for param in params or (torch.float32,):
        problem = Problem(
            Op.PREFILL, (1,), H=H, HV=HV, K=K, V=V, dtype=name_of(dtype), g_dtype=name_of(g), beta_dtype=name_of(beta),
            param_dtype=name_of(param), state_dtype=name_of(state), initial_state=has_state, final_state=has_state,
            state_v_first=v_first, options=options,
        )  # fmt: skip
        if (reason := CONTRACT.refusal(problem)) is not None:
            return reason
    return None


def _by_tma(x: torch.Tensor) -> bool:
    """Whether tiles of it can be moved by TMA, and rows of it 16 bytes at a time."""
    step = 16 // x.element_size()
    b, t, h, _ = x.stride()
    return not x.numel() or not (b % step or t % step or h % step or x.data_ptr() % 16) and b * t * h != 0


def run(inputs: Inputs) -> Outputs:
    """Checks the inputs and runs them; a pool in `inputs.state` is updated in place.

    With KDA_CHECK_VALUES=1 in the environment what cu_seqlens and state_indices hold is checked, too.
    """
    check_inputs(inputs)
    outputs = prefill(inputs)
    assert isinstance(outputs, Outputs)  # no other states are asked for
    return outputs
