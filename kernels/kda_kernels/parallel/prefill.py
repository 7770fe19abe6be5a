"""Prefill of a packed batch over ranks, exact: one exchange a call, or states from rank to rank.

The recurrence is affine in the state (`kda_kernels.segments`): a rank's tokens of a sequence that began on a former
rank turn the state S [V, K] before them into S T + E. Each rank runs its tokens from no state, which gives E and
outputs o', and the identity along with them, which gives T and what each token reads of S, r [K]. E and T are gathered
from all ranks; then S is known everywhere, and o = o' + S r. Only two sequences of a rank can be cut, its first and its
last; the others run while summaries are on their way. What states before segments add to outputs comes after the
exchange on every rank, also where it could come before: it fills a GPU, and NCCL's kernel would wait for it.

Chained (`ContextParallel.chained`), a rank instead receives the state before its part, runs as one GPU would, and sends
the state behind it. No token is run twice; but a call ends on one rank after the other.

Bits depend on where a sequence is cut, as sums are rounded in another order; not on how many ranks there are beside
those that have its tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from kda_kernels import registry
from kda_kernels.boundary import check, check_out
from kda_kernels.checks import is_traced, values_checked
from kda_kernels.errors import InputError
from kda_kernels.parallel.context import ContextParallel, LastCall
from kda_kernels.parallel.exchange import start_gather, start_receive, wait
from kda_kernels.parallel.plain import PlainBegun, PlainCarried
from kda_kernels.problem import CHUNK, Op, Options
from kda_kernels.ranges import stage
from kda_kernels.tensors import Checkpoints, Inputs, picker
from kda_kernels.triton.runtime import multiprocessors


class Carried(Protocol):
    """This rank's tokens of a sequence that began on a former rank.

    Attributes:
        summary: [HV, V + K, K], fp32, contiguous: E above T.
    """

    summary: torch.Tensor

    def finish(self, summaries: torch.Tensor, ends: bool) -> None:
        """Completes outputs and checkpoints, and the final state if the sequence ends here.

        Args:
            summaries: [R, HV, V + K, K], of the former ranks that have tokens of the sequence.
        """


class Begun(Protocol):
    """This rank's tokens of a sequence that begins here and goes on elsewhere.

    Attributes:
        summary: as of `Carried`: E is the state where it ends here, and nobody reads T, as nothing came before.
    """

    summary: torch.Tensor

    def finish(self) -> None:
        """Completes outputs and checkpoints."""


def prefill(
    inputs: Inputs, context: ContextParallel, out: torch.Tensor | None = None, kernel: str | None = None
) -> torch.Tensor:
    """Runs this rank's part; every rank of the group calls it.

    Args:
        inputs: q, k, v, g and beta [1, T, ..] are this rank's tokens; state_indices, has_initial_state and the tables
            of checkpoints are the whole batch's; cu_seqlens is not looked at. No state, or a pool, which each rank has.
        out: [1, T, HV, V].
        kernel: as in `kda_prefill`.

    Returns:
        o of this rank's tokens. Final states are in the pool, see `ContextParallel.final_states`.

    Raises:
        InputError, UnavailableError: as `ContextParallel.require_same`.
    """
    likeness, last = _likeness(inputs, out, kernel), context.last_call
    if last is None or likeness is None or likeness != last.likeness:
        last = context.last_call = LastCall(likeness, _checked(inputs, context, out, kernel))
    o = torch.empty_like(inputs.v, memory_format=torch.contiguous_format) if out is None else out
    call = Call(inputs, context, o, kernel, last)
    if context.chained:
        call.run_chained()
    else:
        _exchange(call, context)
    if context.final_states == "all" and inputs.state_indices is not None:
        _to_all_ranks(inputs, context)
    return o


def _exchange(call: "Call", context: ContextParallel) -> None:
    """Runs it; summaries of all ranks are gathered on the way."""
    summary = call.start()
    if context.exchanges:
        everyone = summary.new_empty((context.ranks, *summary.shape))
        work = start_gather(everyone, summary, context.group)
    call.run_others()
    if context.exchanges:
        wait(work)
        call.finish(everyone)


def _checked(inputs: Inputs, context: ContextParallel, out: torch.Tensor | None, kernel: str | None) -> bool:
    """Whether the kernel for Hopper runs the call, once all ranks make one like it. Raises as `prefill`."""
    on_hopper, error = False, None
    try:
        local = _local(inputs, context)
        check(local)
        check_out(out, inputs.v)
        on_hopper = _on_hopper(local, out, kernel)
    except InputError as refused:
        error = refused
    if context.exchanges or context.final_states == "all":
        context.require_same(_said(inputs, kernel), error)
    elif error is not None:
        raise error
    return on_hopper


# Tensors of a call, and what else it says that is compared as it is.
_TENSORS = picker(
    *("q", "k", "v", "g", "beta", "A_log", "dt_bias", "state", "state_indices", "cu_seqlens", "has_initial_state"),
    "cu_seqlens_cpu",
)
_OTHERS = picker(
    "options", "state_v_first", "output_final_state", "null_slot", "num_accepted_tokens", "update_state",
    "token_states", "token_state_indices", "checkpoints", "batch_invariant", "workspace", "conv", "norm",
    "state_scales", "rounding_seed",
)  # fmt: skip


def _likeness(inputs: Inputs, out: torch.Tensor | None, kernel: str | None) -> tuple | None:
    """All that the checks of a call look at, which layers have in common; None where they look at more."""
    call = inputs.fields()
    tensors, others = (*_TENSORS(call), out), _OTHERS(call)
    try:
        if is_traced(inputs.q) or values_checked(inputs.q):
            return None
        seen = [
            None if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() & 15) for x in tensors
        ]  # fmt: skip
    except AttributeError:  # no tensor, as the check says
        return None
    if not all(x is None or isinstance(x, int | Options) for x in others):
        return None
    return kernel, others, seen


class Call:
    """A rank's share of one call: `start`, `run_others` and `finish`, among which ranks exchange; or `run_chained`."""

    def __init__(
        self, inputs: Inputs, context: ContextParallel, o: torch.Tensor, kernel: str | None, alike: LastCall
    ) -> None:
        """Args: checked inputs, with the whole batch's tables; what this call shares with the last one."""
        self.inputs, self.context, self.o, self.kernel, self.alike = inputs, context, o, kernel, alike
        self.carried: Carried | None = None
        self.begun: Begun | None = None

    def start(self) -> torch.Tensor:
        """Runs what is cut from what is known; returns the summary of what goes on, [HV, V + K, K]."""
        context, lens = self.context, self.context.lens
        (HV, V), K = self.inputs.v.shape[2:], self.inputs.q.shape[3]
        summary = None
        if context.carried:
            with stage("carried sequence"):
                self.carried = self._carried(*self._one(0))
            if context.goes_on and len(lens) == 1:
                summary = self.carried.summary
        if context.goes_on and summary is None:
            with stage("begun sequence"):
                self.begun = self._begun(*self._one(len(lens) - 1))
            summary = self.begun.summary
        # what nobody asks for has no values
        return self.inputs.q.new_empty((HV, V + K, K), dtype=torch.float32) if summary is None else summary

    def run_others(self) -> None:
        """The sequences that lie on this rank as a whole."""
        context, lens = self.context, self.context.lens
        first, last = int(context.carried), len(lens) - int(context.goes_on)
        if first >= last:
            return
        begin = sum(lens[:first])
        tokens = slice(begin, begin + sum(lens[first:last]))
        inputs = _sequences(self.inputs, tokens, context.first + first, context.first + last)
        cu_seqlens = context.offsets(first, last, inputs.q.device)
        on_host = context.offsets(first, last, torch.device("cpu"))
        inputs = dataclasses.replace(inputs, cu_seqlens=cu_seqlens, cu_seqlens_cpu=on_host)
        with stage("whole sequences"):
            _run(inputs, self.o[:, tokens], self.kernel)

    def finish(self, everyone: torch.Tensor) -> None:
        """With all ranks' summaries [ranks, HV, V + K, K]."""
        if self.carried is not None:
            self._finish_carried(self.carried, everyone)
            self.carried = None
        if self.begun is not None:
            self.begun.finish()
            self.begun = None

    def run_chained(self) -> None:
        """All of it, where states go from rank to rank."""
        context, last = self.context, len(self.context.lens) - 1
        if context.carried:
            (HV, V), K = self.inputs.v.shape[2:], self.inputs.q.shape[3]
            before = self.inputs.q.new_empty((1, HV, V, K), dtype=torch.float32)
            work = start_receive(before, context.sources[-1], context.group)
        if context.goes_on and (last or not context.carried):  # the next rank waits for it
            with stage("begun sequence"):
                self._hand_on(self._run_apart(*self._one(last)))
        self.run_others()
        if context.carried:
            wait(work)
            inputs, o = self._one(0)
            with stage("carried sequence"):
                state = self._run_apart(self._continued(inputs), o, before)
            if context.goes_on and not last:
                self._hand_on(state)
            elif inputs.state_indices is not None:
                _store(inputs, state)

    def _hand_on(self, state: torch.Tensor) -> None:
        self.context.to_send.append(state)
        self.context.send()

    def _run_apart(self, inputs: Inputs, o: torch.Tensor, state: torch.Tensor | None = None) -> torch.Tensor:
        """One sequence, from `state` or else its own, which stays as it is; the state behind it [1, HV, V, K], fp32."""
        if inputs.state_indices is not None:
            own, indices = _apart(inputs)
            state = own if state is None else state
            inputs = inputs.changed(state=state, state_indices=indices, null_slot=None)
            _run(inputs, o, self.kernel)
            return state
        end = _run(inputs.changed(state=state, output_final_state=True), o, self.kernel)
        assert end is not None  # as it was asked for
        return end

    def _finish_carried(self, carried: Carried, everyone: torch.Tensor) -> None:
        sources = self.context.sources
        if sources[-1] - sources[0] + 1 == len(sources):
            summaries = everyone[sources[0] : sources[-1] + 1]
        else:
            summaries = everyone[list(sources)]
        with stage("states between ranks"):
            carried.finish(summaries, not (self.context.goes_on and len(self.context.lens) == 1))

    def _begun(self, inputs: Inputs, o: torch.Tensor) -> Begun:
        """From its initial state, which stays as it is; its state ends in fp32."""
        if self.alike.on_hopper:
            hopper = _hopper()
            if (split := hopper.begun_split(o.shape[1], o.shape[2], multiprocessors(o.device))) is not None:
                return hopper.HopperBegun(inputs, o, split, self.alike.begun)
        return PlainBegun(self._run_apart(inputs, o))

    def _continued(self, inputs: Inputs) -> Inputs:
        """A sequence that began on a former rank, as one that begins here."""
        kept = inputs.checkpoints
        if kept is not None:
            kept = _counted_from(kept, self.context.before)
        if kept is not None or inputs.has_initial_state is not None:
            inputs = inputs.changed(has_initial_state=None, checkpoints=kept)
        return inputs

    def _carried(self, inputs: Inputs, o: torch.Tensor) -> Carried:
        inputs = self._continued(inputs)
        if self.alike.on_hopper:
            return _hopper().HopperCarried(inputs, o, self.alike.carried)
        return PlainCarried(inputs, o, lambda one, out: _run(one, out, self.kernel))

    def _one(self, n: int) -> tuple[Inputs, torch.Tensor]:
        """A sequence of this rank, dense, and where its outputs go."""
        context, o, tokens = self.context, self.o, slice(0, self.context.tokens)
        if len(context.lens) > 1:
            begin = sum(context.lens[:n])
            tokens = slice(begin, begin + context.lens[n])
            o = o[:, tokens]
        one = _sequences(self.inputs, tokens, context.first + n, context.first + n + 1)
        return one.changed(cu_seqlens=None, cu_seqlens_cpu=None), o


@functools.cache
def _hopper() -> ModuleType:
    """The module that needs the compiler for Hopper; an import takes 2 us even where it has been made."""
    from kda_kernels.cute.prefill import carried

    return carried


def _apart(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of a call of one sequence in a pool of its own, fp32, and its index there: padding stays padding, and a
    slot that is not there stays one."""
    pool, indices = inputs.pool
    slot = indices[:1].long()
    state = pool[slot.clamp(0, pool.shape[0] - 1)].float()
    index = (slot >= pool.shape[0]).int()
    padding = slot < 0 if inputs.null_slot is None else (slot < 0) | (slot == inputs.null_slot)
    return state, index.masked_fill_(padding, -1)


def _store(inputs: Inputs, state: torch.Tensor) -> None:
    """The final state of a call of one sequence, fp32 [1, HV, V, K], into its slot of the pool, if it has one."""
    pool, indices = inputs.pool
    slot = indices[:1].long()
    live = (slot >= 0) & (slot < pool.shape[0])
    if inputs.null_slot is not None:
        live &= slot != inputs.null_slot
    slot = slot.clamp(0, pool.shape[0] - 1)
    pool[slot] = torch.where(live[:, None, None, None], state.to(pool.dtype), pool[slot])


def _on_hopper(inputs: Inputs, out: torch.Tensor | None, kernel: str | None) -> bool:
    """Whether cute-prefill runs a checked call. Raises `InputError`: it should, and does not take these tensors."""
    if kernel is None:
        return registry.kernel_for(Op.PREFILL, inputs, out).backend == "cute"
    chosen = registry.ours(Op.PREFILL, kernel, inputs)
    if chosen.backend == "cute" and (reason := chosen.code.unsupported_tensors(inputs, out)) is not None:
        raise InputError(f"{kernel}: {reason}")
    return chosen.backend == "cute"


def _counted_from(kept: Checkpoints, before: int) -> Checkpoints:
    """Checkpoints of a sequence of which so many tokens lie on former ranks."""
    if before % CHUNK:
        wanted = f"it should be a multiple of {CHUNK} where there are checkpoints"
        raise InputError("cuts", f"leave {before} tokens of a sequence on former ranks", wanted)
    offsets = kept.offsets
    if offsets is None:
        assert kept.every is not None  # as there are no offsets
        columns = kept.rows.shape[1] if kept.rows.ndim == 2 else 1
        offsets = torch.arange(1, columns + 1, device=kept.rows.device).expand_as(kept.rows) * kept.every
    return Checkpoints(kept.states, kept.rows, (offsets - before).to(kept.rows.dtype))


def _run(inputs: Inputs, o: torch.Tensor, kernel: str | None) -> torch.Tensor | None:
    return registry.prefill(inputs, o, kernel=kernel).final_state


def _local(inputs: Inputs, context: ContextParallel) -> Inputs:
    """The call with this rank's rows of the whole batch's tables. Raises `InputError`."""
    if inputs.q.ndim != 4 or tuple(inputs.q.shape[:2]) != (1, context.tokens):
        wanted = f"it should be [1, {context.tokens}, H, K], this rank's tokens"
        raise InputError("q", f"has shape {list(inputs.q.shape)}", wanted)
    for name in ("workspace", "batch_invariant", "state_scales", "rounding_seed"):
        if name in inputs.features():
            raise InputError(name, "is given", "it is not supported over several ranks; leave it out")
    tables = {"state_indices": inputs.state_indices, "has_initial_state": inputs.has_initial_state}
    if inputs.checkpoints is not None:
        tables["checkpoints.rows"] = inputs.checkpoints.rows
        if context.carried:
            _counted_from(inputs.checkpoints, context.before)
    for name, table in tables.items():
        if table is not None and (table.ndim < 1 or table.shape[0] < context.batch):
            wanted = f"it should have a row for each of the batch's {context.batch} sequences"
            raise InputError(name, f"has shape {list(table.shape)}", wanted)
    local = _sequences(inputs, slice(0, context.tokens), context.first, context.first + len(context.lens))
    return local.changed(cu_seqlens=context.offsets(0, len(context.lens), inputs.q.device))


def _sequences(inputs: Inputs, tokens: slice, first: int, last: int) -> Inputs:
    """These tokens, and the rows of these sequences of all tables."""

    changed: dict[str, Any] = {}
    if (tokens.start, tokens.stop) != (0, inputs.q.shape[1]):
        changed = {name: getattr(inputs, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}
    for name in ("state_indices", "has_initial_state"):
        if (table := getattr(inputs, name)) is not None and (first, last) != (0, table.shape[0]):
            changed[name] = table[first:last]
    if (kept := inputs.checkpoints) is not None:
        offsets = None if kept.offsets is None else kept.offsets[first:last]
        changed["checkpoints"] = dataclasses.replace(kept, rows=kept.rows[first:last], offsets=offsets)
    return inputs.changed(**changed)


def _said(inputs: Inputs, kernel: str | None) -> dict[str, Any]:
    """What must not differ between ranks."""

    def shown(x: Any, of: Callable[[torch.Tensor], Any]) -> str:
        return f"{x.dtype} {list(of(x))}" if isinstance(x, torch.Tensor) else str(type(x).__name__)

    return {
        "q": shown(inputs.q, lambda x: x.shape[2:]),
        "v": shown(inputs.v, lambda x: x.shape[2:]),
        "state": "none" if inputs.state is None else shown(inputs.state, lambda x: x.shape[1:]),
        "options": inputs.options,
        "kernel": kernel,
    }


def _to_all_ranks(inputs: Inputs, context: ContextParallel) -> None:
    """Final states from the rank that has each sequence's last token into every rank's pool; the host waits."""
    pool, indices = inputs.pool
    last = context.first + len(context.lens) - int(context.goes_on)
    slots = indices[: context.batch].long()
    live = (slots >= 0) & (slots < pool.shape[0])
    if inputs.null_slot is not None:
        live &= slots != inputs.null_slot
    ours = torch.zeros_like(live)
    ours[context.first : last] = live[context.first : last]
    states = pool.new_zeros((context.batch, *pool.shape[1:]))
    states[ours] = pool[slots[ours]]
    # each of them is a number on one rank, and zero on the others
    wait(dist.all_reduce(states, group=context.group, async_op=True))
    pool[slots[live]] = states[live]
