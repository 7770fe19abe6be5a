"""What the CuTe decode kernel is compiled for, and its tuning choices. Neither needs the DSL, nor torch."""

import dataclasses
import functools
from typing import NamedTuple

from kda_kernels.problem import Gate

SUMS = 3  # over K: q.q, k.k, q.k
MOST_BLOCKS = 65535  # along the last axis of a grid: sequences of one launch
LANES = 8  # that share a row of the state: 16 bytes each are a line of 128
HUGE = 1 << 26  # elements of all fp32 states, 256 MB: of more, see `DecodeConfig.huge`
MOST_CLUSTERED = 8  # CTAs of a cluster that every GPU of sm_90 and newer has room for


class DecodeConfig(NamedTuple):
    """Tuning choices. (A NamedTuple: it is part of a key that calls hash.)

    Every sum runs in the same order whatever is chosen here, as long as `threads` is K or more: a sequence's results do
    not depend on how many others there are.

    Attributes:
        rows: value channels of a state that a CTA owns: a multiple of threads / 8 that divides V.
        threads: of a CTA: a multiple of 32.
        ctas: how many of them shall fit on a multiprocessor, which bounds the registers.
        bulk: the state comes and goes by bulk copies through shared memory, instead of through registers.
        together: of the rows that a thread has, how many it takes from there at once.
        huge: with `bulk`, for more states than the L2 cache has room for. Stores are hinted to be evicted from it last,
            after what was only read, and a state is asked for behind the convolution, so that fewer are on their way.
    """

    rows: int = 16
    threads: int = 128
    ctas: int = 4
    bulk: bool = False
    together: int = 1
    huge: bool = False

    @classmethod
    @functools.cache
    def choose(cls, heads: int, K: int, V: int, narrow: bool, one_token: bool, sms: int) -> "DecodeConfig":
        """For `heads` = N * HV states of V rows of K on a GPU of `sms` multiprocessors.

        Few states are split into many small CTAs that start at once. Very many stream through shared memory, with
        several tokens, where arithmetic counts, from fewer states on and in larger CTAs. Those of two bytes (`narrow`),
        with as much arithmetic for half the bytes, take larger CTAs, so that a token's channels are prepared once for
        more rows.
        """
        if K > 128 or V % 32:
            return cls()
        ctas = heads * V / 32 / sms  # of 32 rows, for each multiprocessor
        if narrow and one_token and ctas >= 6:
            best = cls(rows=128 if ctas >= 10 else 64, bulk=True, together=2)
        elif narrow and ctas >= 2:
            best = cls(rows=128, threads=256, ctas=2) if one_token else cls(rows=64, ctas=3)
        elif narrow:
            best = cls(rows=32)
        elif one_token:
            best = cls(rows=32, bulk=ctas >= 48) if ctas >= 2 else cls()
        else:
            best = cls(rows=32, bulk=True) if ctas >= 12 else cls(rows=64, ctas=3, bulk=True, together=2)
            best = best if ctas >= 1 else cls()
        return best if V % best.rows == 0 else cls(rows=32)

    @staticmethod
    def fitting(K: int, V: int, group: int) -> list[int]:
        """Rows a CTA may have where the CTAs of `group` value heads are one cluster, the least first; maybe none.

        A CTA has room for 128 rows of 128 channels.
        """
        return [
            rows
            for rows in (16, 32, 64, 128)
            if V % rows == 0 and V // rows * group <= MOST_CLUSTERED and rows * K <= 128 * 128
        ]

    @classmethod
    @functools.cache
    def choose_clustered(
        cls, heads: int, K: int, V: int, narrow: bool, one_token: bool, sms: int, group: int
    ) -> "DecodeConfig":
        """As `choose`, where the CTAs of `group` value heads share a convolution, or those of one a norm.

        Every CTA of a head prepares the same channels, so CTAs are larger than without either, and clusters smaller. In
        fp32, with one token, a CTA has a whole state from two states per multiprocessor on, half of one from half a
        state on; else a whole one, or half of one in registers, from one state on. States of that size come in pieces
        through shared memory. One of two bytes is not rounded between two tokens, so it cannot lie there: with several
        tokens it stays in registers.
        """
        streamed = one_token or not narrow
        if narrow or not one_token:
            wanted = 32 if heads < sms else 128 if streamed else 64
        else:
            wanted = 32 if heads < sms / 2 else 64 if heads < 2 * sms else 128
        fitting = cls.fitting(K, V, group)
        rows = next((rows for rows in fitting if rows >= wanted), fitting[-1])
        if rows <= 32:
            return cls(rows, ctas=4 if one_token else 3)
        if streamed:
            huge = not narrow and heads * K * V > HUGE
            return cls(rows, ctas=4 if narrow or rows < 128 else 3, bulk=True, together=2, huge=huge)
        return cls(rows, threads=256, ctas=2)


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
        one_token: a dense batch of one token per sequence: no loop.
        config: see `DecodeConfig`.
        accepted, token_rows: dtypes of num_accepted_tokens and of token_state_indices, or None.
        fresh: whether has_initial_state says which states begin with nothing.
        update: whether the pool is written.
        strided: whether state_indices of one dimension may have any stride.
        many: whether there are more sequences than a grid has room for along its last axis.
        taps: width of the convolution ahead of the step; 0: there is none.
        taps_dtype, taps_bias, past, past_index: dtypes of its weight, bias, states and indices, or None.
        tokens_first: whether its states are [P, L, channels], instead of [P, channels, L].
        wide: whether a channel's taps are read at once, so that they have to be aligned.
        norm, norm_gate: dtypes of the weight and the gate of the norm behind the step; None: there is none.
        stochastic: whether states of two bytes are rounded stochastically.
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
    taps: int = 0
    taps_dtype: str | None = None
    taps_bias: str | None = None
    past: str | None = None
    past_index: str | None = None
    tokens_first: bool = False
    wide: bool = False
    norm: str | None = None
    norm_gate: str | None = None
    stochastic: bool = False

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
    def block(self) -> int:
        """Tokens whose channels are prepared at once: fewer where the state lies in the registers beside them."""
        return 1 if self.one_token else 4 if self.bulk else 2

    @property
    def bulk(self) -> bool:
        """Whether the state goes through shared memory, taken from there and written back a few rows at a time."""
        # a sequence without tokens takes nothing from there, what goes out is what lies there, and between blocks of
        # tokens nothing is rounded there
        whole = (self.pooled or not self.packed) and self.ht in (None, self.h0)
        return self.config.bulk and self.h0 is not None and whole and (self.one_token or self.h0 == "float32")

    @property
    def passes(self) -> int:
        """Rows of a thread."""
        return self.config.rows * LANES // self.config.threads

    @property
    def pieces(self) -> int:
        """In which a state is taken."""
        return self.passes // self.config.together if self.bulk else 1

    @property
    def shared_bytes(self) -> int:
        """Of a CTA: what `DecodeKernel.shared` has, and outputs under a norm; with `bulk` a tile and its barriers."""
        words = [self.width] * 3 + [SUMS * (self.config.threads // 32), self.config.threads, 4]
        tile = [self.config.rows * self.K * (4 if self.h0 == "float32" else 2), 8 * self.pieces] if self.bulk else []
        halves = 2 if self.slices > 1 and not self.one_token else 1
        outputs = [4 * self.V * self.block * halves, 16] if self.norm else []
        return sum(-(-size // 16) * 16 for size in (*tile, *(4 * n * self.block for n in words), *outputs))

    @property
    def slices(self) -> int:
        """CTAs a state."""
        return self.V // self.config.rows

    @property
    def apart(self) -> bool:
        """Whether the slot of the convolution's state is another than that of the state."""
        return self.past_index is not None or (self.taps > 0 and self.accepted is not None)

    @property
    def heads_of_cluster(self) -> int:
        """Value heads that read the same channels of q and k, if they have windows."""
        return self.group if self.taps else 1

    @property
    def cluster(self) -> tuple[int, int] | None:
        """CTAs a cluster, slices of a state by value heads: those that read the same channels or share a norm."""
        if not (self.taps or self.norm):
            return None
        shape = self.slices, self.heads_of_cluster
        return None if shape == (1, 1) else shape
