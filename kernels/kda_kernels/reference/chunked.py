"""The chunk form of the recurrence (WY representation), as the textbooks write it and as a chunk kernel computes it.

Within a chunk that meets the state S (V x K), with G the cumulative log decay of the chunk:

    kg = k exp(G)    qg = q exp(G)    kd = k exp(G_last - G)
    Akk_ij = sum_d k_i k_j exp(G_i - G_j), i > j        Aqk_ij = sum_d q_i k_j exp(G_i - G_j), i >= j
    A  = (I + diag(beta) Akk)^-1 diag(beta)
    v' = A v - (A kg) S^T         o = qg S^T + Aqk v'        S <- S diag(exp(G_last)) + v'^T kd

No exponent here is ever positive, so nothing overflows, whatever the gate.
"""

import torch

from kda_kernels.reference.batch import Batch, Sequence
from kda_kernels.reference.recurrent import After
from kda_kernels.reference.rounding import Rounding

SUBCHUNK = 16

# A token's log decay under this is a decay of exactly 0. Cutting there changes no result, keeps differences of
# cumulative sums finite when g is -inf, and keeps their digits when g is -1000.
_ZERO_DECAY = {torch.float64: -800.0, torch.float32: -120.0}


def chunk_recurrence(
    batch: Batch,
    states: torch.Tensor,
    chunk: int,
    rounded: Rounding,
    after: After = lambda tokens, running: None,
) -> torch.Tensor:
    """Runs every sequence chunk by chunk; the n-th chunks of all sequences go together.

    Args:
        batch: the call, in fp64 or fp32.
        states: [n, HV, V, K] in the dtype of the batch, updated in place.
        chunk: tokens per chunk.
        rounded: applied to every operand of a matmul.
        after: called with the number of tokens done, and the states of the sequences that have them all or end there.

    Returns:
        o [R, HV, V]; zero in rows that belong to no sequence of the batch.
    """
    o = torch.zeros_like(batch.v)
    decay = batch.g.clamp(min=_ZERO_DECAY[batch.g.dtype])
    for first in range(0, batch.sequences[0].length if batch.sequences else 0, chunk):
        running = [s for s in batch.sequences if s.length > first]
        rows, valid = _chunk_rows(batch, running, first, chunk)

        def tokens(x: torch.Tensor, rows: torch.Tensor = rows, valid: torch.Tensor = valid) -> torch.Tensor:
            """[n, HV, C, ...] of this chunk; the tokens that are not there are zeros, which leave the state alone."""
            x = x[rows.clamp(max=x.shape[0] - 1)]
            return x.masked_fill(~valid.view(*valid.shape, *[1] * (x.ndim - 2)), 0).transpose(1, 2)

        out = _one_chunk(
            tokens(batch.q),
            tokens(batch.k),
            tokens(batch.v),
            tokens(decay).cumsum(-2),
            tokens(batch.beta),
            states[: len(running)],
            rounded,
        )
        o[rows[valid]] = out.transpose(1, 2)[valid]
        after(first + chunk, states[: len(running)])
    return o


def _chunk_rows(batch: Batch, running: list[Sequence], first: int, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [n, C] of the chunk that starts at token `first` of each sequence, and which of them belong to it."""
    starts = batch.index([s.start for s in running]).unsqueeze(1)
    lengths = batch.index([s.length for s in running]).unsqueeze(1)
    position = first + torch.arange(min(chunk, running[0].length - first), device=starts.device)
    return starts + position, position < lengths


def _one_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    G: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
    rounded: Rounding,
) -> torch.Tensor:
    """o of one chunk of all sequences and heads; S [.., V, K] moves on in place. q, k, G [.., C, K], v [.., C, V]."""
    decay, last = G.exp(), G[..., -1:, :]
    kg, qg, kd = rounded(k * decay), rounded(q * decay), rounded(k * (last - G).exp())
    Akk, Aqk = pair_products((k, q), k, G, rounded)
    A = torch.linalg.solve_triangular(
        beta.unsqueeze(-1) * Akk.tril(-1), torch.diag_embed(beta), upper=False, unitriangular=True
    )
    A = rounded(A)
    state = rounded(S).mT
    W = rounded(A @ kg)
    v_new = rounded(A @ rounded(v) - W @ state)
    o = qg @ state + rounded(Aqk) @ v_new
    S *= last.exp()
    S += v_new.mT @ kd
    return o


def pair_products(
    xs: tuple[torch.Tensor, ...], k: torch.Tensor, G: torch.Tensor, rounded: Rounding
) -> list[torch.Tensor]:
    """Of each x sum_d x_id k_jd exp(G_id - G_jd) for i >= j, else 0: [.., C, C] from x, k, G [.., C, K].

    Between sub-chunks the decay is split at the token before the later one, so that both factors are at most 1 and a
    matmul does the work. Within a sub-chunk every pair gets its own decay: one factor takes it, as if split at j.
    """
    C = k.shape[-2]
    outs = [k.new_zeros(*k.shape[:-1], C) for _ in xs]
    for start in range(0, C, SUBCHUNK):
        rows = slice(start, min(start + SUBCHUNK, C))
        ki, Gi = rounded(k[..., rows, :]).unsqueeze(-3), G[..., rows, :]
        if start:
            before, split = slice(0, start), G[..., start - 1 : start, :]
            decay = (Gi - split).exp()
            right = rounded(k[..., before, :] * (split - G[..., before, :]).exp()).mT
            for x, out in zip(xs, outs, strict=True):
                out[..., rows, before] = rounded(x[..., rows, :] * decay) @ right
        n = Gi.shape[-2]
        later = torch.ones(n, n, dtype=torch.bool, device=k.device).triu(1)
        pairs = (Gi.unsqueeze(-2) - Gi.unsqueeze(-3)).masked_fill_(later.unsqueeze(-1), -torch.inf).exp_()
        for x, out in zip(xs, outs, strict=True):
            out[..., rows, rows] = (rounded(x[..., rows, :].unsqueeze(-2) * pairs) * ki).sum(-1)
    return outs
