"""The token recurrence: the definition of the operation, one step a token, all sequences and heads at once."""

from collections.abc import Callable

import torch

from kda_kernels.reference.batch import Batch

After = Callable[[int, torch.Tensor], None]


def token_recurrence(batch: Batch, states: torch.Tensor, after: After = lambda tokens, running: None) -> torch.Tensor:
    """Runs every sequence through

        S <- S diag(exp(g_t));  u <- beta_t (v_t - S k_t);  S <- S + u k_t^T;  o_t = S q_t      (S is V x K)

    Args:
        batch: the call; its sequences are sorted by length, so those still running are always the first ones.
        states: [n, HV, V, K], updated in place.
        after: called with the number of tokens done, and the states of the sequences that have so many.

    Returns:
        o [R, HV, V]; zero in rows that belong to no sequence of the batch.
    """
    o = torch.zeros_like(batch.v)
    decay = batch.g.exp()
    starts = batch.index([s.start for s in batch.sequences])
    running = len(batch.sequences)
    for t in range(batch.sequences[0].length if batch.sequences else 0):
        while batch.sequences[running - 1].length <= t:
            running -= 1
        rows = starts[:running] + t
        S = states[:running]
        k = batch.k[rows]
        S *= decay[rows].unsqueeze(-2)
        u = batch.beta[rows].unsqueeze(-1) * (batch.v[rows] - (S @ k.unsqueeze(-1)).squeeze(-1))
        S.addcmul_(u.unsqueeze(-1), k.unsqueeze(-2))
        o[rows] = (S @ batch.q[rows].unsqueeze(-1)).squeeze(-1)
        after(t + 1, S)
    return o
