"""Which tokens of a packed batch lie on which rank, and what that makes of this rank's sequences."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from kda_kernels.errors import InputError
from kda_kernels.ints import cdiv
from kda_kernels.parallel.exchange import agree, start_gather, start_receive, start_send, wait
from kda_kernels.problem import CHUNK

TIMEOUT = 60.0  # seconds


def even_cuts(tokens: int, ranks: int) -> tuple[int, ...]:
    """The first token of each rank's part, and `tokens`: parts as equal as multiples of 64 tokens allow."""
    chunks = cdiv(tokens, CHUNK)
    return tuple(min(tokens, CHUNK * (chunks * rank // ranks)) for rank in range(ranks)) + (tokens,)


@dataclasses.dataclass(frozen=True)
class LastCall:
    """What calls that are alike share.

    Attributes:
        likeness: what they have in common; None: nothing is like it.
        on_hopper: whether the kernel for Hopper runs them.
        begun, carried: its compiled functions, by part, for sequences that begin here and that began on former ranks.
    """

    likeness: tuple | None
    on_hopper: bool
    begun: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    carried: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class ContextParallel:
    """A packed batch whose tokens are spread over the ranks of a group, seen from one. Made once per batch by `of`.

    Each rank holds a contiguous part of the tokens, which may begin and end anywhere and may be empty. An empty
    sequence belongs to the rank in whose part it lies.

    Attributes:
        group: the process group; None is the default one. rank, ranks: this rank in it, and how many there are.
        lens: tokens on this rank of each sequence that is here. first: the first of them, counted in the whole batch.
        batch: sequences of the whole batch.
        sources: the former ranks that have tokens of the first sequence here, in order.
        source_tokens: how many each of them has.
        target: the next rank that has tokens of the last sequence here; None: it ends here.
        exchanges: whether any sequence of the batch is cut, so that summaries are exchanged.
        final_states: "last": a final state goes to the pool of the rank that has the sequence's last token; "all": to
            that of every rank, for which the host waits.
        timeout: seconds that the host waits for other ranks where it compares their calls.
        chained: each rank hands the state of a cut sequence to the next, which waits for it; no token is run twice.
            Ranks then work side by side where layers follow each other, and nothing else in a layer makes them wait.
        last_call: what need not be found again for a call like the last one.
        to_send: what the next rank gets, oldest first.
    """

    group: dist.ProcessGroup | None
    rank: int
    ranks: int
    lens: tuple[int, ...]
    first: int
    batch: int
    sources: tuple[int, ...]
    source_tokens: tuple[int, ...]
    target: int | None
    exchanges: bool
    final_states: str = "last"
    timeout: float = TIMEOUT
    chained: bool = False
    last_call: "LastCall | None" = None
    to_send: list[torch.Tensor] = dataclasses.field(default_factory=list)
    _agreed: Any = None
    _offsets: dict[Any, torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        cu_seqlens: torch.Tensor | Sequence[int],
        group: dist.ProcessGroup | None = None,
        *,
        cuts: Sequence[int] | None = None,
        tokens: int | None = None,
        final_states: str = "last",
        timeout: float = TIMEOUT,
        chained: bool = False,
    ) -> "ContextParallel":
        """For a batch; every rank of `group` calls it, and the host waits for all of them.

        Args:
            cu_seqlens: [N + 1] of the whole batch, the same on every rank; best on the host, as it is read here.
            cuts: the first token of each rank's part, and the number of all tokens; `even_cuts` if not given.
            tokens: instead of `cuts`, those of this rank.
            final_states, timeout, chained: see the attributes.

        Raises:
            InputError: an argument is wrong or differs between ranks; all ranks raise it.
            UnavailableError: a rank ended, or did not answer within `timeout` seconds.
        """
        ends = tuple(int(n) for n in (cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens))
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        error = _wrong(ends, cuts, tokens, ranks, final_states)
        listed = hashlib.sha256(repr(ends).encode()).hexdigest()[:12]
        said: dict[str, Any] = {
            "cu_seqlens": f"{len(ends) - 1} sequences, {ends[-1] if ends else 0} tokens, {listed}",
            "cuts": list(cuts or ()) if tokens is None else "by tokens",
            "final_states": final_states,
            "chained": chained,
            "tokens": tokens,
        }
        if error is not None:
            said["error"] = str(error)
        rows = agree(group, said, ("cu_seqlens", "cuts", "final_states", "chained"), timeout)
        if tokens is not None:
            cuts = (0, *itertools.accumulate(row["tokens"] for row in rows))
            if cuts[-1] != ends[-1]:
                raise InputError("tokens", f"of all ranks are {cuts[-1]}", f"cu_seqlens ends at {ends[-1]}")
        elif cuts is None:
            cuts = even_cuts(ends[-1], ranks)
        part = part_of_batch(ends, cuts, rank)
        return cls(group, rank, ranks, **part, final_states=final_states, timeout=timeout, chained=chained)

    @classmethod
    def of_fla(cls, context: Any) -> "ContextParallel":
        """What an `FLACPContext` of `fla.ops.cp` says; made once, and kept on it.

        Raises:
            InputError: it has no group or no cu_seqlens, or a rank's tokens are not contiguous.
        """
        if isinstance(context, cls):
            return context
        if (known := getattr(context, "_kda_context", None)) is not None:
            return known
        for name in ("group", "cu_seqlens"):
            if getattr(context, name, None) is None:
                raise InputError("cp_context", f"has no {name}", "fla.ops.cp.build_cp_context makes one that has")
        if (layout := getattr(context, "layout", "contiguous")) != "contiguous":
            raise InputError("cp_context", f"has layout {layout!r}", "only 'contiguous' is supported")
        local = context.cu_seqlens if context.cu_seqlens_cpu is None else context.cu_seqlens_cpu
        ends = local.tolist()
        part = ends[-1]  # of every rank, as FLA cuts
        rank = dist.get_rank(context.group)
        sources = tuple(range(rank - context.pre_num_ranks, rank))
        made = cls(
            context.group, rank, dist.get_world_size(context.group), tuple(b - a for a, b in itertools.pairwise(ends)),
            first=0, batch=len(ends) - 1, sources=sources,
            source_tokens=tuple(min(part, context.pre_num_conv_tokens - i * part) for i in range(len(sources)))[::-1],
            target=rank + 1 if context.post_num_ranks > 0 else None, exchanges=True,
        )  # fmt: skip
        context._kda_context = made
        return made

    @property
    def tokens(self) -> int:
        """On this rank."""
        return sum(self.lens)

    @property
    def before(self) -> int:
        """Tokens of the first sequence here that lie on former ranks."""
        return sum(self.source_tokens)

    @property
    def carried(self) -> bool:
        """Whether the first sequence here began on a former rank."""
        return bool(self.sources)

    @property
    def goes_on(self) -> bool:
        """Whether the last sequence here has tokens on later ranks."""
        return self.target is not None

    def offsets(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """cu_seqlens, int32, of this rank's sequences from `first` to before `last`, counted from their first token."""
        key = first, last, device
        if key not in self._offsets:
            ends = [0, *itertools.accumulate(self.lens[first:last])]
            self._offsets[key] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._offsets[key]

    @property
    def compared(self) -> bool:
        """Whether ranks know that their calls are alike."""
        return self._agreed is not None

    def send(self) -> None:
        """What there is `to_send`, in order. Raises `UnavailableError`: a rank ended."""
        assert self.target is not None  # as there would be nothing to send
        for tensor in self.to_send:
            wait(start_send(tensor, self.target, self.group))
        self.to_send.clear()

    def require_same(self, said: dict[str, Any], error: InputError | None) -> None:
        """That all ranks make the same call; compared by the first call of a batch, as its other layers are alike.

        Args:
            said: what must not differ between ranks, each with a `str`. error: why this rank refuses the call.

        Raises:
            InputError: this rank refuses it; ranks differ; or it differs from this rank's first call of the batch.
            UnavailableError: a rank ended, or did not answer within `timeout` seconds.
        """
        if self._agreed is None:
            extra = {} if error is None else {"error": str(error)}
            agree(self.group, {name: str(value) for name, value in said.items()} | extra, list(said), self.timeout)
            self._agreed = said
        if error is not None:
            raise error
        for name, value in said.items():
            if self._agreed[name] != value:
                found = f"is {value}, and was {self._agreed[name]} in the first call of this batch"
                raise InputError(name, found, "a ContextParallel serves calls that are alike")


def _wrong(
    ends: tuple[int, ...], cuts: Sequence[int] | None, tokens: int | None, ranks: int, final_states: str
) -> InputError | None:
    if not ends or ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)):
        return InputError("cu_seqlens", "is no list of offsets", "it should start at 0 and never decrease")
    if cuts is not None and tokens is not None:
        return InputError("cuts", "are given with tokens", "one of them should be left out")
    if cuts is not None and (
        len(cuts) != ranks + 1 or cuts[0] != 0 or cuts[-1] != ends[-1] or list(cuts) != sorted(cuts)
    ):
        return InputError("cuts", f"are {list(cuts)}", f"they should be {ranks + 1}, from 0 up to {ends[-1]}")
    if final_states not in ("last", "all"):
        return InputError("final_states", f"is {final_states!r}", "it should be 'last' or 'all'")
    return None


def part_of_batch(ends: tuple[int, ...], cuts: Sequence[int], rank: int) -> dict[str, Any]:
    """The fields of `ContextParallel` that say what a rank has of the sequences that end at ends[1:]."""
    begin, end, total = cuts[rank], cuts[rank + 1], ends[-1]
    sequences = list(itertools.pairwise(ends))
    full = [r for r in range(len(cuts) - 1) if cuts[r] < cuts[r + 1]]

    def here(first: int, last: int) -> bool:
        if first < last:
            return max(first, begin) < min(last, end)
        return begin <= first < end or (first == total and rank == len(cuts) - 2)

    mine = [n for n, (first, last) in enumerate(sequences) if here(first, last)]
    lens = tuple(max(0, min(end, sequences[n][1]) - max(begin, sequences[n][0])) for n in mine)
    start = sequences[mine[0]][0] if mine else begin
    sources = tuple(r for r in full if cuts[r] < begin and start < cuts[r + 1]) if start < begin else ()
    return {
        "lens": lens,
        "first": mine[0] if mine else 0,
        "batch": len(sequences),
        "sources": sources,
        "source_tokens": tuple(min(begin, cuts[r + 1]) - max(start, cuts[r]) for r in sources),
        "target": next((r for r in full if r > rank), None) if mine and sequences[mine[-1]][1] > end else None,
        "exchanges": any(cuts[r] not in ends for r in full),
    }


def convolution_halo(x: torch.Tensor, context: "ContextParallel | Any", width: int) -> torch.Tensor:
    """The tokens before this rank's part that a causal convolution of `width` taps reads: as its initial state.

    Args:
        x: [1, T, D] or [T, D], this rank's tokens, any dtype.
        context: `ContextParallel`, or FLA's object; every rank of the group calls this.
        width: of the convolution; 1 needs nothing.

    Returns:
        [width - 1, D] in the dtype of x: the last tokens of the first sequence here that lie on former ranks; zeros
        where there are fewer. Ranks whose parts are shorter than that are seen through.

    Raises:
        InputError: x does not have as many tokens as the part.
        UnavailableError: a rank ended.
    """
    context = ContextParallel.of_fla(context)
    x = x[0] if x.ndim == 3 else x
    if x.ndim != 2 or x.shape[0] != context.tokens:
        raise InputError("x", f"has shape {list(x.shape)}", f"it should be [1, T, D] or [T, D] with T={context.tokens}")
    taps = width - 1
    halo = x.new_zeros((taps, x.shape[1]))
    if taps < 1 or not context.exchanges:
        return halo
    if context.chained:
        return _chained_halo(x, context, halo)
    mine = _last_tokens(x, context, halo)
    everyone = mine.new_empty((context.ranks, *mine.shape))
    wait(start_gather(everyone, mine, context.group))
    pieces = [
        everyone[rank].view(x.dtype)[max(0, taps - tokens) :]
        for rank, tokens in zip(context.sources, context.source_tokens, strict=True)
    ]
    return torch.cat((halo, *pieces))[-taps:]


def _last_tokens(x: torch.Tensor, context: ContextParallel, before: torch.Tensor) -> torch.Tensor:
    """As many as `before` has: the last of `before` and of the sequence that goes on; bytes."""
    last = min(before.shape[0], context.lens[-1]) if context.goes_on else 0
    return torch.cat((before, x[x.shape[0] - last :]))[-before.shape[0] :].contiguous().view(torch.uint8)


def _chained_halo(x: torch.Tensor, context: ContextParallel, halo: torch.Tensor) -> torch.Tensor:
    """What the former rank sends, if the first sequence here began there; else `halo`, zeros.

    What the next rank gets goes with the state of this layer, so that nobody waits for it here; but at once where calls
    are still to be compared, since all ranks wait there.
    """
    zeros = halo
    if context.carried:
        received = torch.empty_like(halo).view(torch.uint8)
        wait(start_receive(received, context.sources[-1], context.group))
        halo = received.view(x.dtype)
    if context.goes_on:
        only = context.carried and len(context.lens) == 1
        context.to_send.append(_last_tokens(x, context, halo if only else zeros))
        if not context.compared:
            context.send()
    return halo
