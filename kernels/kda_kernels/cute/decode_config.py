"""What the CuTe decode kernel is compiled for, and its tuning choices. Neither needs the DSL, nor torch."""

import dataclasses
import functools
from typing import NamedTuple

from kda_kernels.problem import Gate

SUMS = 3  # over K: q.q, k.k, q.k
MOST_BLOCKS = 65535  # along the last axis of a grid: sequences of one launch
LANES = 8  # that share a row of the state: 16 bytes each are a line of 128


class DecodeConfig(NamedTuple):
    """Tuning choices. (A NamedTuple: it is part of a key that calls hash.)

    Every sum runs in the same order whatever is chosen here, as long as `threads` is K or more: a sequence's results do
    not depend on how many others there are.

    Attributes:
        rows: value channels of a state that a CTA owns: a multiple of threads / 8 that divides V.
        threads: of a CTA: a multiple of 32.
        ctas: how many of them shall fit on a multiprocessor, which bounds the registers.
        bulk: the state comes and goes by bulk copies through shared memory, instead of through registers.
    """

    rows: int = 16
    threads: int = 128
    ctas: int = 4
    bulk: bool = False

    @classmethod
    @functools.cache
    def choose(cls, heads: int, K: int, V: int, narrow: bool, one_token: bool, sms: int) -> "DecodeConfig":
        """For `heads` = N * HV states of V rows of K on a GPU of `sms` multiprocessors.

        Few states are split into many small CTAs that start at once. Many stream: fp32 through shared memory, or, with
        several tokens, where arithmetic counts, in larger CTAs; bf16 (`narrow`), with as much arithmetic for half the
        bytes, in still larger ones, so that a token's channels are prepared once for more rows.
        """
        if K > 128 or V % 32:
            return cls()
        ctas = heads * V / 32 / sms  # of 32 rows, for each multiprocessor
        if narrow and ctas >= 2:
            best = cls(rows=128, threads=256, ctas=2) if one_token else cls(rows=64, ctas=3)
        elif narrow:
            best = cls(rows=32)
        elif one_token:
            best = cls(rows=32, bulk=True) if ctas >= 16 else cls()
        else:
            best = cls(rows=32, ctas=3) if ctas >= 3 else cls()
        return best if V % best.rows == 0 else cls(rows=32)


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """All that the kernel is compiled for: batch, heads, pool and strides are runtime values. dtypes are torch's names.

    Attributes:
        group: value heads that share a query and key head. K, V: head sizes.
        gate, beta_is_logit, allow_neg_eigval, qk_l2norm: see `kda_kernels.problem.Options`.
        dtype, g, beta, A_log, dt_bias, index, offsets: dtypes of q, k, v and o, of the tensors so named, of
            state_indices and of cu_seqlens; None where there is no such tensor.
        h0, ht: dtypes of the state that comes in and of the one that goes out, or None; with a pool (`index` is not
            None) h0 is both. token_states: dtype of the states after each token, or None.
        one_token: a dense batch of one token a sequence: no loop.
        config: see `DecodeConfig`.
        accepted, token_rows: dtypes of num_accepted_tokens and of token_state_indices, or None.
        fresh: whether has_initial_state says which states begin with nothing.
        update: whether the pool is written.
        strided: whether state_indices of one dimension may have any stride.
        many: whether there are more sequences than a grid has room for along its last axis.
    """

    group: int
    K: int
    V: int
    gate: Gate
    beta_is_logit: bool
    allow_neg_eigval: bool
    qk_l2norm: bool
    dtype: str
    g: str
    beta: str
    A_log: str | None
    dt_bias: str | None
    h0: str | None
    ht: str | None
    index: str | None
    offsets: str | None
    token_states: str | None
    one_token: bool
    config: DecodeConfig
    accepted: str | None = None
    token_rows: str | None = None
    fresh: bool = False
    update: bool = True
    strided: bool = False
    many: bool = False

    @property
    def pooled(self) -> bool:
        return self.index is not None

    @property
    def packed(self) -> bool:
        return self.offsets is not None

    @property
    def vector(self) -> int:
        """Elements an access: 16 bytes, or 8 where a row of bf16 is no multiple of 128 bytes."""
        return 4 if self.K % 64 or "float32" in (self.h0, self.ht, self.token_states) else 8

    @property
    def steps(self) -> int:
        """Accesses a row."""
        return self.K // (LANES * self.vector)

    @property
    def exact(self) -> bool:
        """Whether anything that goes out is fp32, which shows what the hardware's approximations cost."""
        return "float32" in (self.dtype, self.h0, self.ht, self.token_states)

    @property
    def width(self) -> int:
        """Channels that a CTA prepares: K, or more where it has more threads, so that none of them has to branch."""
        return -(-self.K // self.config.threads) * self.config.threads

    @property
    def bulk(self) -> bool:
        """Whether the state goes through shared memory: as one, from where it is written back to."""
        plain = self.accepted is None and self.update and not self.fresh
        return self.config.bulk and self.h0 is not None and plain

    @property
    def shared_bytes(self) -> int:
        """Of a CTA: q, k, the decays and each warp's sums, for two tokens; with `bulk` a tile and its barrier."""
        channels = 3 * 2 * self.width * 4 + SUMS * 2 * (self.config.threads // 32) * 4
        tile = self.config.rows * self.K * (4 if self.h0 == "float32" else 2) + 16 if self.bulk else 0
        return tile + channels

    @property
    def slices(self) -> int:
        """CTAs a state."""
        return self.V // self.config.rows
