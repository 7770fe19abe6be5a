"""Decode traces: recorded calls that carry the same sequences on, one token per call, and kernels that run all of them.

A kernel that is right from each recorded state may still drift: it never starts from what it made itself. So it also
runs the whole trace by itself, from the first recorded state on, beside the fp64 recurrence that does the same.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch

from kda_kernels.checks import loaded_slots, problem_of
from kda_kernels.errors import KdaError, one_line
from kda_kernels.problem import Op
from kda_kernels.reference.batch import load_states, prepare
from kda_kernels.reference.fused import gated_norm
from kda_kernels.reference.recurrent import token_recurrence
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs
from kdacli.dumps import Dump
from kdacli.dumps.strides import copy_of
from kdacli.judge import CallJudge, Reference, Verdict
from kdacli.judge.reference import pool_as_final_state


@dataclasses.dataclass(frozen=True)
class Trace:
    """Calls of one layer in their order, each from the states that the one before left.

    `name` says of what.
    """

    name: str
    dumps: list[Dump]

    @property
    def whole(self) -> Inputs:
        """All steps as one dense call, on the CPU: [N, steps, ..]; a sequence starts from its first recorded state."""
        steps = [dump.inputs for dump in self.dumps]
        first, N = steps[0], steps[0].N

        def joined(each: Iterable[torch.Tensor]) -> torch.Tensor:
            return torch.cat([_dense(tokens, N) for tokens in each], dim=1).contiguous()

        q, k, v, g, beta = (joined(getattr(x, name) for x in steps) for name in ("q", "k", "v", "g", "beta"))
        norm = first.norm
        if norm is not None:
            norm = dataclasses.replace(norm, gate=joined(x.norm.gate for x in steps if x.norm is not None))
        return dataclasses.replace(
            first, q=q, k=k, v=v, g=g, beta=beta, norm=norm, cu_seqlens=None, cu_seqlens_cpu=None
        )


@dataclasses.dataclass
class Drift:
    """One kernel by itself over a trace.

    Attributes:
        verdicts: of all outputs and of the last states, beside a plain implementation that rounds states each step.
        o, states: relative errors after each step, of all sequences together. refused: why it did not run; "".
    """

    kernel: str
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)
    o: list[float] = dataclasses.field(default_factory=list)
    states: list[float] = dataclasses.field(default_factory=list)
    refused: str = ""

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def curve(self, tensor: str) -> list[float]:
        """The errors of the tensor of a verdict after each step; of the states of a convolution, copies, none."""
        return {"o": self.o, "final_state": self.states}.get(tensor, [])


def find(dumps: Sequence[Dump]) -> tuple[list[Trace], list[str]]:
    """The traces of two steps and more, and notes: where a trace ends although calls follow, and why."""
    layers: dict[str, list[Dump]] = {}
    for dump in dumps:
        if _is_step(dump):
            layers.setdefault(_layer(dump), []).append(dump)
    traces: list[Trace] = []
    gaps: dict[tuple[str, str], list[str]] = {}
    for name, calls in layers.items():
        calls.sort(key=_order)
        runs = [[calls[0]]]
        for before, after in zip(calls, calls[1:], strict=False):
            if (gap := _gap(before, after)) is None:
                runs[-1].append(after)
            else:
                runs.append([after])
                gaps.setdefault((name, gap), []).append(f"between {before.call} and {after.call}")
        traces += [Trace(f"{name}, from {run[0].call}", run) for run in runs if len(run) > 1]
    return traces, [
        f"{name}: {gap} {where[0]}" + (f" (and at {len(where) - 1} more)" if len(where) > 1 else "")
        for (name, gap), where in gaps.items()
    ]


def _is_step(dump: Dump) -> bool:
    """Whether a call is one token of each sequence over a pool, with nothing that a later call has to undo."""
    if dump.op not in (Op.DECODE, Op.STEP) or dump.outputs is None or dump.inputs.state_indices is None:
        return False
    if dump.inputs.conv is not None and dump.inputs.conv.indices is not None:
        return False
    problem = problem_of(dump.inputs, dump.op)
    return set(problem.seq_lens) == {1} and not problem.features - {"null_slot", "strided_indices", "conv", "norm"}


def _layer(dump: Dump) -> str:
    said = {name: dump.meta.get(name) for name in ("target", "rank", "layer", "graph")}
    words = [str(said["target"] or dump.call).rpartition(":")[2]]
    return ", ".join(words + [f"{k} {v}" for k, v in said.items() if k != "target" and v is not None])


def _order(dump: Dump) -> tuple[int, int]:
    return int(dump.meta.get("replay") or 0), int(dump.meta.get("call_number") or 0)


def _gap(before: Dump, after: Dump) -> str | None:
    """Why the second call does not carry on where the first ended; None if it does."""
    a, b = before.inputs, after.inputs
    if problem_of(a, before.op) != problem_of(b, after.op) or before.meta.get("slots") != after.meta.get("slots"):
        return "the batch changes"
    if not torch.equal(a.pool[1], b.pool[1]):
        return "the slots change"
    assert before.outputs is not None
    carried = [(before.outputs.final_state, b.pool[0])]
    if b.conv is not None:
        carried.append((before.outputs.conv_states, b.conv.states))
    slots = [slot for slot in loaded_slots(a) if slot >= 0]
    for left, found in carried:
        if left is None:
            return "no states were recorded"
        if not torch.equal(*(x[slots].contiguous().view(torch.uint8) for x in (left, found))):
            return "the states change, by calls that were not recorded,"
    return None


def _dense(tokens: torch.Tensor, N: int) -> torch.Tensor:
    return tokens.flatten(0, 1)[:N].unsqueeze(1)


def drift(trace: Trace, kernels: Sequence[Kernel], device: str) -> Iterator[Drift]:
    """Runs each kernel over the trace, all of them step by step beside the one fp64 recurrence."""
    whole = copy_of(trace.whole, device)
    batch = prepare(whole, torch.float64)
    slots = batch.index([sequence.slot for sequence in batch.sequences])
    rows = batch.index([sequence.number for sequence in batch.sequences])
    alone = [_Alone(kernel, whole) for kernel in kernels]

    def after(step: int, states: torch.Tensor) -> None:
        exact = states if whole.state_v_first else states.mT
        inputs = copy_of(trace.dumps[step - 1].inputs, device)
        for one in alone:
            if not one.found.refused:
                one.step(inputs, exact, slots)

    exact = token_recurrence(batch, load_states(whole, batch), after).view(whole.v.shape)
    if whole.norm is not None:
        exact = gated_norm(exact, whole.norm, whole.norm.gate)
    reference = Reference(whole, trace.dumps[0].op, device, stepwise=True)
    for one in alone:
        yield one.end(reference, exact[rows], rows)


class _Alone:
    """A kernel with pools of its own."""

    def __init__(self, kernel: Kernel, whole: Inputs) -> None:
        assert whole.state is not None
        self.kernel, self.pool, self.found = kernel, whole.state.clone(), Drift(kernel.name)
        self.windows = None if whole.conv is None else whole.conv.states.clone()
        self.o: list[torch.Tensor] = []

    def _over(self, inputs: Inputs) -> Inputs:
        """A call over these pools."""
        conv = inputs.conv
        if conv is not None and self.windows is not None:
            conv = dataclasses.replace(conv, states=self.windows)
        return dataclasses.replace(inputs, state=self.pool, conv=conv)

    def step(self, inputs: Inputs, exact: torch.Tensor, slots: torch.Tensor) -> None:
        """One call from the states of its own; `exact`: the fp64 states behind it, of the pool's `slots`."""
        mine = self._over(inputs)
        try:
            outputs = self.kernel.run(mine)
        except KdaError as refusal:
            self.found.refused = str(refusal)
            return
        except Exception as error:
            self.found.refused = f"raised {one_line(error, 300)}"
            self.found.verdicts.append(Verdict.failed("o", f"step {len(self.o) + 1}: {self.found.refused}"))
            return
        self.o.append(_dense(outputs.o, mine.N).clone())
        self.found.states.append(_relative(self.pool[slots], exact))

    def end(self, reference: Reference, exact: torch.Tensor, rows: torch.Tensor) -> Drift:
        if self.found.refused:
            return self.found
        o = torch.cat(self.o, dim=1)
        self.found.o = [_relative(o[rows, t], exact[:, t]) for t in range(o.shape[1])]
        outputs = pool_as_final_state(Outputs(o), self._over(reference.inputs))
        reference = reference.granted(self.kernel.rounded_convolution)
        call = CallJudge(reference, outputs, carried_state=self.kernel.carried_state)
        for piece in reference:
            call.add(piece)
        self.found.verdicts = call.verdicts(reference.usual)
        return self.found


def _relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm()
    return ((found.double() - exact).norm() / norm).item() if norm else float(found.double().norm())


def draw(found: Sequence[tuple[str, Drift]], path: str) -> None:
    """Writes the curves of (trace, drift) under their bounds: a row for each trace, its outputs beside its states."""
    import matplotlib.figure

    traces = list(dict.fromkeys(name for name, _ in found))
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "kda"}):
        figure = matplotlib.figure.Figure((11, 3.2 * len(traces)), layout="constrained")
        grid = figure.subplots(len(traces), 2, squeeze=False)
        for name, axes in zip(traces, grid, strict=True):
            for tensor, axis in zip(("o", "final_state"), axes, strict=True):
                mine = [drifted for trace, drifted in found if trace == name]
                for drifted in mine:
                    errors = drifted.curve(tensor)
                    axis.plot(range(1, len(errors) + 1), errors, label=drifted.kernel, linewidth=1)
                for bound in {
                    v.bound for drifted in mine for v in drifted.verdicts if v.tensor == tensor and v.bound > 0
                }:
                    axis.axhline(bound, label="bound", color="gray", linestyle="--", linewidth=1)
                axis.set(title=f"{tensor}: {name}", xlabel="step", ylabel="relative error", yscale="log")
                axis.legend()
        figure.savefig(path, dpi=150)
