"""States as a pool stores them in two bytes: rounded up or down at random, or as 16-bit integers with a scale a row.

This is the definition; kernels give the same bits for the same fp32 state. "&", ">>" and the like are of 32-bit words.

The random number of an element: a state [HV, V, K] after token t of a call (counted from 0 in its sequence), of a
sequence that loads its state from slot s of the pool, is rounded by the same numbers wherever it is stored. Element
e = (hv V + v) K + k, however the state is laid out, has half a word of Philox-4x32 with `ROUNDS` rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011: the fewest that pass BigCrush), counter (e / 8, s, t, 0) and key
(seed & 0xffffffff, seed >> 32): with j = e % 8, word j / 2, its low half for an even j, its high half for an odd one.
That half is r, 0 <= r < 65536. Calls need seeds of their own: with one seed for all, an element would be rounded by
the same number each time, and its errors would add up.

bf16: the upper half of the word (bits of x) + r, whose sign is that of x. So x goes to the one or the other of its
neighbours with the probability of its distance to the other, exactly.

fp16: with z = |x|, or |x| + 2^-14 in fp32 where |x| < 2^-14 (so that the last bit of fp16 is bit 13 of z there, too),
y = (bits of z + (r & 0x1fff)) & 0xffffe000, minus the 2^-14 if it was added, with the sign of x: fp16 has y exactly,
or is infinite from 65536 on. Exact as well, down to the subnormals, but for what |x| + 2^-14 rounds off.

NaN stays NaN and infinities stay themselves, in both. What else is in a row of K channels that has NaN may be anything.

int16: of a row of K elements, m is the largest |x|, and c is 32767 - 2^-8. Its scale is m / c, rounded to nearest in
fp32, and w = c / m, rounded so, too. The product x w is not rounded: it is never over 32767, so that nothing has to be
limited. An element is the integer next to it, of two the even one; stochastically it is the largest integer not over
x w + r / 65536. A row whose m is under 2^-110, whose w could overflow, is zeros with the scale 0. A row with NaN or an
infinity has the scale NaN, whatever its integers are. What is stored means integer times scale, rounded to fp32.
"""

from typing import NamedTuple

import torch

from kda_kernels.dtypes import name_of
from kda_kernels.tensors import Inputs

ROUNDS = 7
LARGEST = 32767 - 2.0**-8  # that a row's largest number becomes
LEAST_ROW = 2.0**-110
_SUBNORMAL = 2.0**-14  # fp16's smallest normal number
_WORD = 0xFFFFFFFF


class Stored(NamedTuple):
    """A state [.., HV, V, K] in the dtype of its pool, and of one in int16 the scales [.., HV, V], fp32."""

    state: torch.Tensor
    scales: torch.Tensor | None = None

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers that it means, a new tensor in `dtype`."""
        if self.scales is None:
            return self.state.to(dtype, copy=True)
        return (self.state.float() * self.scales.unsqueeze(-1)).to(dtype)


def pool_values(inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that the state or pool of a call means, a new tensor in `dtype`, laid out as it is."""
    assert inputs.state is not None
    return Stored(inputs.state, inputs.state_scales).values(dtype)


def stored(x: torch.Tensor, dtype: torch.dtype, seed: int | None = None, slot: int = 0, token: int = 0) -> Stored:
    """`x` [HV, V, K], fp32 or fp64, as a pool of `dtype` holds it.

    Args:
        seed: 64 bits; None: to nearest, ties to even. slot, token: see above.
    """
    x = x.float()
    if seed is not None and dtype is not torch.float32:
        HV, V, K = x.shape
        numbers = random_numbers(seed, slot, token, HV * V * K, x.device).view(HV, V, K)
        return quantised(x, numbers) if dtype is torch.int16 else Stored(rounded_stochastically(x, numbers, dtype))
    return quantised(x) if dtype is torch.int16 else Stored(x.to(dtype))


def rounded_stochastically(x: torch.Tensor, numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `x` in bf16 or fp16; `numbers`: the random one of each element, int64 under 65536."""
    if dtype is torch.bfloat16:
        upper = (x.contiguous().view(torch.int32) + numbers.int()) & -0x10000
        y = upper.view(torch.float32)
    elif dtype is torch.float16:
        size = x.abs().contiguous()
        offset = torch.where(size < _SUBNORMAL, _SUBNORMAL, 0.0)
        bits = ((size + offset).view(torch.int32) + (numbers.int() & 0x1FFF)) & -0x2000
        y = torch.copysign(bits.view(torch.float32) - offset, x)
    else:
        raise ValueError(f"{name_of(dtype)} has no stochastic rounding")
    return torch.where(x.isfinite(), y, x).to(dtype)


def quantised(x: torch.Tensor, numbers: torch.Tensor | None = None) -> Stored:
    """fp32 `x` [.., V, K] in int16; `numbers`: as in `rounded_stochastically`, or None."""
    most = x.abs().amax(-1)
    kept = (most >= LEAST_ROW) & most.isfinite()
    largest = torch.full_like(most, LARGEST)  # a number instead of a tensor would be multiplied with a reciprocal
    w = torch.where(kept, largest / most, 0.0)
    x = torch.where(kept.unsqueeze(-1), x, 0.0)
    y = x.double() * w.double().unsqueeze(-1)
    q = y.round() if numbers is None else ((y * 65536).floor().long() + numbers) >> 16
    scales = torch.where(kept, most / largest, torch.where(most < LEAST_ROW, 0.0, torch.nan))
    return Stored(q.to(torch.int16), scales)


def random_numbers(seed: int, slot: int, token: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [count]: those of the elements of a state, in their order. `count` is a multiple of 8."""
    c0 = torch.arange(count // 8, dtype=torch.int64, device=device)
    words = _philox((c0, *(torch.full_like(c0, c & _WORD) for c in (slot, token, 0))), seed)
    return torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).flatten()


def _philox(counter: tuple[torch.Tensor, ...], seed: int) -> tuple[torch.Tensor, ...]:
    """Four words, each in an int64, as all of the counter are."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        (high0, low0), (high2, low2) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower word of x * factor, whose 64 bits an int64 has no sign for."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
