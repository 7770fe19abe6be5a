"""Correct kernels in plain torch, in steps that a mutant can override one at a time.

They are written from the definition of the operation, apart from `kda_kernels.reference`, and plainly: a loop over
sequences, tokens or chunks, all heads at once.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator

import torch

from kda_kernels.checks import check_inputs
from kda_kernels.problem import CHUNK, FEATURES, Gate, Op, Problem
from kda_kernels.reference.stored import Stored, stored
from kda_kernels.registry import Kernel
from kda_kernels.tensors import Inputs, Outputs


class Victim:
    """What all kernels share: the activations, and where sequences and states lie. Everything is fp32."""

    op: Op

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Outputs:
        raise NotImplementedError

    def unsupported(self, problem: Problem | None) -> str | None:
        return None

    # --- activations

    def log_decay(self, inputs: Inputs) -> torch.Tensor:
        """[B, T, HV, K]."""
        options, g = inputs.options, inputs.g.float()
        if options.gate is Gate.NONE:
            return g
        x, rate = g + self.bias(inputs), self.rate(inputs)
        if options.gate is Gate.SAFE:
            return options.lower_bound * torch.sigmoid(rate * x)
        return -rate * self.softplus(x)

    def bias(self, inputs: Inputs) -> torch.Tensor:
        HV, K = inputs.g.shape[2:]
        return torch.zeros(HV, K) if inputs.dt_bias is None else inputs.dt_bias.float().view(HV, K)

    def rate(self, inputs: Inputs) -> torch.Tensor:
        """exp(A_log), [HV, 1]."""
        HV = inputs.g.shape[2]
        return torch.ones(HV, 1) if inputs.A_log is None else inputs.A_log.float().view(HV, 1).exp()

    def softplus(self, x: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(x, torch.zeros(()))

    def beta(self, inputs: Inputs) -> torch.Tensor:
        beta, options = inputs.beta.float(), inputs.options
        if not options.beta_is_logit:
            return beta
        return torch.sigmoid(beta) * (2 if options.allow_neg_eigval else 1)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def q(self, inputs: Inputs) -> torch.Tensor:
        q = inputs.q.float()
        return self.heads(inputs, (self.norm(q) if inputs.options.qk_l2norm else q) * self.scale(inputs))

    def k(self, inputs: Inputs) -> torch.Tensor:
        k = inputs.k.float()
        return self.heads(inputs, self.norm(k) if inputs.options.qk_l2norm else k)

    def scale(self, inputs: Inputs) -> float:
        scale = inputs.options.scale
        return inputs.q.shape[-1] ** -0.5 if scale is None else scale

    def heads(self, inputs: Inputs, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H, K] -> [B, T, HV, K]."""
        return x.repeat_interleave(inputs.v.shape[2] // x.shape[2], dim=2)

    # --- sequences

    def spans(self, inputs: Inputs) -> list[tuple[int, int]]:
        """Start and end of each sequence in [B * T] rows."""
        if inputs.cu_seqlens is None:
            B, T = inputs.q.shape[:2]
            return [(n * T, (n + 1) * T) for n in range(B)]
        ends = inputs.cu_seqlens.tolist()
        return list(zip(ends[:-1], ends[1:], strict=True))

    def slots(self, inputs: Inputs, n: int) -> list[int]:
        """Where each sequence's state is loaded from; -1: it is padding."""
        if inputs.state_indices is None:
            return list(range(n))
        slots = self.indices(inputs)[:n].tolist()
        if inputs.num_accepted_tokens is not None:
            slots = [row[self.column(a)] for row, a in zip(slots, inputs.num_accepted_tokens.tolist(), strict=True)]
        return [-1 if self.is_padding(inputs, slot) else slot for slot in slots]

    def indices(self, inputs: Inputs) -> torch.Tensor:
        return inputs.state_indices

    def column(self, accepted: int) -> int:
        """Of state_indices, from which a state is loaded."""
        return accepted - 1

    def is_padding(self, inputs: Inputs, slot: int) -> bool:
        return slot < 0 or slot == inputs.null_slot

    def starts_empty(self, inputs: Inputs, n: int) -> bool:
        return inputs.has_initial_state is not None and not inputs.has_initial_state[n]


class Recurrent(Victim):
    """The token recurrence, over states. `Chunked` overrides how a sequence is run."""

    op = Op.DECODE
    now = threading.local()  # what to do with the state after each token or chunk

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Outputs:
        check_inputs(inputs)
        rows = self.rows(inputs)
        spans = self.spans(inputs)
        o = self.allocate_o(inputs)
        flat = o.view(-1, *o.shape[2:])
        final = self.allocate_states(inputs, len(spans))
        for n, ((start, end), slot) in enumerate(zip(spans, self.slots(inputs, len(spans)), strict=True)):
            if slot < 0:
                self.padding(inputs, flat, final, start, end)
                continue
            S = self.load(inputs, slot)
            if self.starts_empty(inputs, n):
                self.empty(S)
            self.now.keep = functools.partial(self.keep, inputs, n, start, end - start)
            self.now.key = slot, end - start - 1
            flat[start:end] = self.sequence(S, *(x[start:end] for x in rows)).to(o.dtype)
            if final is not None and (inputs.state_indices is None or end > start) and self.updates(inputs):
                self.store(inputs, final, slot, S)
        return self.result(inputs, o, final)

    def empty(self, S: torch.Tensor) -> None:
        S.zero_()

    def updates(self, inputs: Inputs) -> bool:
        """Whether final states are stored."""
        return inputs.update_state and inputs.num_accepted_tokens is None

    def keep(self, inputs: Inputs, n: int, start: int, length: int, done: int, S: torch.Tensor) -> None:
        """The state of sequence n after `done` of its tokens goes where it is asked for."""
        final, self.now.key = self.now.key, (self.now.key[0], done - 1)
        if inputs.num_accepted_tokens is not None and inputs.update_state:
            self.keep_draft(inputs, int(self.indices(inputs)[n, done - 1]), S)
        if inputs.token_states is not None:
            self.keep_token(inputs, n, start, done, S)
        if inputs.checkpoints is not None:
            self.keep_checkpoints(inputs, n, length, done, S)
        self.now.key = final

    def keep_draft(self, inputs: Inputs, slot: int, S: torch.Tensor) -> None:
        if not self.is_padding(inputs, slot):
            self.store(inputs, inputs.state, slot, S)

    def keep_token(self, inputs: Inputs, n: int, start: int, done: int, S: torch.Tensor) -> None:
        if inputs.token_state_indices is None:
            T = inputs.q.shape[1]
            self.store(inputs, inputs.token_states[(start + done - 1) // T], (start + done - 1) % T, S)
        elif (row := self.token_row(inputs, n)) >= 0:
            self.store(inputs, inputs.token_states[row], done - 1, S)

    def token_row(self, inputs: Inputs, n: int) -> int:
        return int(inputs.token_state_indices[n])

    def keep_checkpoints(self, inputs: Inputs, n: int, length: int, done: int, S: torch.Tensor) -> None:
        kept = inputs.checkpoints
        for j, row in enumerate(kept.rows.view(len(kept.rows), -1)[n].tolist()):
            at = (j + 1) * kept.every if kept.offsets is None else int(kept.offsets.view(len(kept.rows), -1)[n, j])
            if row >= 0 and self.is_checkpoint(at, length, done):
                self.store(inputs, kept.states, row, S)

    def is_checkpoint(self, at: int, length: int, done: int) -> bool:
        return at == done

    def rows(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """q, k, v, g, beta as [B * T, HV, ...] in fp32."""
        parts = (self.q(inputs), self.k(inputs), inputs.v.float(), self.log_decay(inputs), self.beta(inputs))
        return tuple(x.reshape(-1, *x.shape[2:]) for x in parts)

    def allocate_o(self, inputs: Inputs) -> torch.Tensor:
        return torch.zeros(inputs.v.shape, dtype=inputs.v.dtype)

    def allocate_states(self, inputs: Inputs, n: int) -> torch.Tensor | None:
        """Where final states go; None: nowhere."""
        if inputs.state_indices is not None:
            return inputs.state
        if not inputs.output_final_state:
            return None
        HV, V, K = inputs.v.shape[2], inputs.v.shape[3], inputs.q.shape[3]
        dtype = torch.float32 if inputs.state is None else inputs.state.dtype
        return torch.zeros(n, HV, *((V, K) if inputs.state_v_first else (K, V)), dtype=dtype)

    def padding(self, inputs: Inputs, o: torch.Tensor, final: torch.Tensor | None, start: int, end: int) -> None:
        """What happens to a row with state index -1: nothing."""

    def load(self, inputs: Inputs, slot: int) -> torch.Tensor:
        """The incoming state, fp32 [HV, V, K]."""
        if inputs.state is None:
            return torch.zeros(inputs.v.shape[2], inputs.v.shape[3], inputs.q.shape[3])
        S = inputs.state[slot].float()
        if inputs.state_scales is not None:
            S = S * self.scales(inputs, slot).unsqueeze(-1)
        return (S if inputs.state_v_first else S.mT).clone(memory_format=torch.contiguous_format)

    def scales(self, inputs: Inputs, slot: int) -> torch.Tensor:
        """Of a state that is loaded, [HV, V]."""
        return inputs.state_scales[slot]

    def store(self, inputs: Inputs, final: torch.Tensor, slot: int, S: torch.Tensor) -> None:
        seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
        S, scales = self.rounded(S, final.dtype, seed, *self.now.key)
        if scales is not None:
            inputs.state_scales[slot] = scales
        final[slot] = S if inputs.state_v_first else S.mT

    def rounded(self, S: torch.Tensor, dtype: torch.dtype, seed: int | None, slot: int, token: int) -> Stored:
        return stored(S, dtype, seed, slot, token)

    def result(self, inputs: Inputs, o: torch.Tensor, final: torch.Tensor | None) -> Outputs:
        return Outputs(o, final if inputs.output_final_state else None)

    def sequence(self, S: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        """o [T, HV, V] of one sequence; S [HV, V, K] moves on in place."""
        o = torch.zeros_like(rows[2])
        for t in range(len(o)):
            o[t] = self.step(S, *(x[t] for x in rows))
            self.now.keep(t + 1, S)
        return o

    def step(
        self, S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        """One token: o [HV, V]."""
        S *= g.exp().unsqueeze(-2)
        u = beta.unsqueeze(-1) * (v - times(S, k))
        S += u.unsqueeze(-1) * k.unsqueeze(-2)
        return times(S, q)


class Chunked(Recurrent):
    """The chunk form. Operands are fp32, so it is more exact than it need be, and mutants must stand out."""

    op = Op.PREFILL

    def sequence(self, S: torch.Tensor, *rows: torch.Tensor) -> torch.Tensor:
        pieces = []
        for span in self.chunks(len(rows[0])):
            pieces.append(self.chunk(S, *(x[span].transpose(0, 1) for x in rows)))
            self.now.keep(span.stop, S)
        return torch.cat([piece.transpose(0, 1) for piece in pieces]) if pieces else rows[2]

    def chunks(self, length: int) -> Iterator[slice]:
        for first in range(0, length, CHUNK):
            yield slice(first, min(first + CHUNK, length))

    def chunk(
        self, S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        """One chunk of all heads, [HV, C, ...]: o [HV, C, V]; S moves on in place."""
        G = self.cumulative(g.clamp(min=-120.0))
        inverse = self.inverse(beta.unsqueeze(-1) * self.pairs(k, k, G).tril(-1))
        new = self.product(inverse, beta.unsqueeze(-1) * (v - self.product(k * G.exp(), S.mT)))
        o = self.product(q * G.exp(), S.mT) + self.product(self.pairs(q, k, G).tril(self.diagonal), new)
        last = G[:, -1:]
        S.copy_(self.carried(S, last) + self.product(new.mT, k * (last - G).exp()))
        return o

    diagonal = 0

    def cumulative(self, g: torch.Tensor) -> torch.Tensor:
        return g.cumsum(1)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, which a kernel gives to tensor cores."""
        return a @ b

    def carried(self, S: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """What is left of the incoming state after the chunk."""
        return S * last.exp()

    def pairs(self, x: torch.Tensor, k: torch.Tensor, G: torch.Tensor) -> torch.Tensor:
        """sum_d x_i k_j exp(G_i - G_j), [HV, C, C]; the upper triangle means nothing."""
        decay = (G.unsqueeze(2) - G.unsqueeze(1)).clamp(max=0).exp()
        return (x.unsqueeze(2) * decay * k.unsqueeze(1)).sum(-1)

    def inverse(self, L: torch.Tensor) -> torch.Tensor:
        """(I + L)^-1 of a strictly lower triangular L."""
        eye = torch.eye(L.shape[-1]).expand_as(L)
        return torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)


class GateStage(Victim):
    """The op `gate`: the log decay summed within each chunk."""

    op = Op.GATE

    @torch.no_grad()
    def run(self, inputs: Inputs) -> Outputs:
        check_inputs(inputs)
        decay = self.log_decay(inputs)
        sums = torch.zeros(decay.shape)
        flat, rows = sums.view(-1, *sums.shape[2:]), decay.reshape(-1, *decay.shape[2:])
        for start, end in self.spans(inputs):
            for first in range(start, end, self.size):
                flat[first : min(first + self.size, end)] = rows[first : min(first + self.size, end)].cumsum(0)
        return Outputs(sums)

    size = CHUNK


def times(S: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """S [.., V, K] times x [.., K]."""
    return (S * x.unsqueeze(-2)).sum(-1)


@dataclasses.dataclass(frozen=True)
class VictimKernel(Kernel):
    """A victim as a kernel. Prefill victims hand over to torch-decode, whence the backend."""

    victim: Victim = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, name: str, victim: Victim, summary: str) -> "VictimKernel":
        return cls(name, victim.op, "torch", "", summary, ours=False, victim=victim)

    @property
    def causal_in_bits(self) -> bool:
        return True

    def unsupported(self, problem: Problem | None = None) -> str | None:
        if problem is not None and (lacking := problem.features - self.features):
            return f"it does not support {', '.join(lacking)}"
        return self.victim.unsupported(problem)

    @property
    def features(self) -> frozenset[str]:
        has = FEATURES if self.op.decodes else FEATURES - {"batch_invariant"}
        parts = {"conv", "norm"} if self.op is Op.STEP else {"conv"} if hasattr(self.victim, "convolve") else set()
        return has - {"conv", "norm"} | parts

    def run(self, inputs: Inputs) -> Outputs:
        # For what the victim allocates. On the CPU it costs more than the victim's own work.
        with inputs.q.device if inputs.q.is_cuda else contextlib.nullcontext():
            return self.victim.run(inputs)
