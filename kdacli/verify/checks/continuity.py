"""Prefill, then decode from the same pool, run as if it were one kernel: together they are one long recurrence."""

import dataclasses
import functools

import torch

from kda_kernels.checks import check_inputs, seq_lens
from kda_kernels.problem import Op, Problem
from kda_kernels.registry import Kernel, kernels
from kda_kernels.tensors import Inputs, Outputs
from kda_kernels.triton.runtime import interpreted

INTERPRETED = 64  # calls of one case


@dataclasses.dataclass(frozen=True)
class PrefillThenDecode:
    """A prefill kernel, and the decode kernel that goes on from the pool it leaves.

    Attributes:
        prefill, decode: the two; `decode` None if there is none of that backend.
        steps: the last so many tokens of each sequence are decoded, one by one.
    """

    prefill: Kernel
    decode: Kernel | None
    steps: int

    @classmethod
    def of(cls, prefill: Kernel, steps: int) -> "PrefillThenDecode":
        """With the first decode kernel of the same backend."""
        return cls(prefill, next((k for k in kernels(Op.DECODE) if k.backend == prefill.backend), None), steps)

    @property
    def name(self) -> str:
        """triton-prefill, then triton-decode: "triton-prefill+decode"."""
        return f"{self.prefill.name}+decode"

    @property
    def carried_state(self) -> str | None:
        return self.prefill.carried_state

    @property
    def rounded_convolution(self) -> bool:
        return self.prefill.rounded_convolution

    def unsupported(self, problem: Problem) -> str | None:
        """Why not, as `Kernel.unsupported`."""
        if self.decode is None:
            return f"there is no decode kernel of the backend {self.prefill.backend} to go on with"
        decoding = dataclasses.replace(problem, op=Op.DECODE, seq_lens=(1,) * problem.N)
        return self.prefill.unsupported(problem) or self.decode.unsupported(decoding)

    def run(self, inputs: Inputs) -> Outputs:
        """All of `inputs` (packed, with a pool) in steps + 1 calls. o is put together in the order of the tokens."""
        lens = torch.tensor(seq_lens(inputs, check_inputs(inputs, values=True)), device=inputs.q.device)
        ends = lens.cumsum(0)
        starts_ends = zip((ends - lens).tolist(), ends.tolist(), strict=True)
        rows = torch.cat([torch.arange(start, end - self.steps) for start, end in starts_ends]).to(lens.device)
        o, call = torch.full_like(inputs.v, torch.nan), self.prefill
        for step in range(self.steps + 1):
            part = tokens_of(inputs, rows, lens - self.steps if step == 0 else torch.ones_like(lens))
            o[:, rows] = call.run(with_seed(part, step)).o
            rows, call = ends - self.steps + step, self.decode or call
        return Outputs(o, inputs.state, state_scales=inputs.state_scales)


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """A decode kernel that is called for each token of packed sequences, with their pool."""

    decode: Kernel

    @property
    def name(self) -> str:
        return self.decode.name

    @property
    def carried_state(self) -> str | None:
        return self.decode.carried_state

    @property
    def rounded_convolution(self) -> bool:
        return self.decode.rounded_convolution

    def unsupported(self, problem: Problem) -> str | None:
        """Why not, as `Kernel.unsupported`."""
        if max(problem.seq_lens) > INTERPRETED and self.decode.backend == "triton" and interpreted():
            return f"{max(problem.seq_lens)} calls would take minutes in Triton's interpreter"
        return self.decode.unsupported(dataclasses.replace(problem, seq_lens=(1,) * problem.N))

    def run(self, inputs: Inputs) -> Outputs:
        """All sequences are of one length."""
        lens = torch.tensor(seq_lens(inputs, check_inputs(inputs, values=True)), device=inputs.q.device)
        N, steps = len(lens), int(lens.max())
        # tokens in the order of the calls, so that each call has a view: thousands of steps then take seconds
        rows = (lens.cumsum(0) - lens + torch.arange(steps, device=lens.device)[:, None]).flatten()
        in_order, parts, o = tokens_of(inputs, rows, torch.ones_like(lens)), [], torch.full_like(inputs.v, torch.nan)
        for t in range(steps):
            part = in_order.map_tokens(functools.partial(torch.narrow, dim=1, start=t * N, length=N))
            parts.append(self.decode.run(with_seed(part, t)).o)
        o[:, rows] = torch.cat(parts, 1)
        return Outputs(o, inputs.state, state_scales=inputs.state_scales)


def with_seed(inputs: Inputs, step: int) -> Inputs:
    """The same call with the seed of the `step`-th one after it: each has its own."""
    seed = inputs.rounding_seed
    return inputs if seed is None else dataclasses.replace(inputs, rounding_seed=seed + step)


def tokens_of(inputs: Inputs, rows: torch.Tensor, lens: torch.Tensor) -> Inputs:
    """The call for some tokens of a packed batch only; the pool is the same memory."""
    assert inputs.cu_seqlens is not None
    cu_seqlens = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).to(inputs.cu_seqlens.dtype)
    return dataclasses.replace(inputs.map_tokens(lambda t: t[:, rows]), cu_seqlens=cu_seqlens)
