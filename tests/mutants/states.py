"""Kernels that store states of two bytes wrongly."""

import dataclasses

from kda_kernels.reference.stored import Stored, quantised, random_numbers, rounded_stochastically, stored
from tests.mutants.table import mutant
from tests.mutants.victim import Chunked, Recurrent


@mutant(Recurrent, Chunked)
class RoundedToNearest:
    """rounding_seed is not looked at: states are rounded to nearest."""

    def rounded(self, S, dtype, seed, slot, token):
        return stored(S, dtype)


@mutant(Recurrent, Chunked)
class OneSeed:
    """All calls have one seed."""

    def rounded(self, S, dtype, seed, slot, token):
        return stored(S, dtype, None if seed is None else 0, slot, token)


@mutant(Recurrent)
class SameNumbersForEachToken:
    """Random numbers do not depend on the token."""

    def rounded(self, S, dtype, seed, slot, token):
        return stored(S, dtype, seed, slot, 0)


@mutant(Recurrent)
class SameNumbersForEachSlot:
    """Random numbers do not depend on the slot."""

    def rounded(self, S, dtype, seed, slot, token):
        return stored(S, dtype, seed, 0, token)


@mutant(Recurrent, Chunked)
class RoundedUpTooSeldom:
    """Random numbers have 15 bits: half of the chance to go up."""

    def rounded(self, S, dtype, seed, slot, token):
        if seed is None or S.dtype is dtype:
            return stored(S, dtype)
        numbers = random_numbers(seed, slot, token, S.numel()).view(S.shape) // 2
        if not dtype.is_floating_point:
            return quantised(S, numbers)
        return Stored(rounded_stochastically(S, numbers, dtype))


@mutant(Recurrent, Chunked)
class ScaleOfTheNextRow:
    """A state is loaded with the scales of the rows before."""

    def scales(self, inputs, slot):
        return super().scales(inputs, slot).roll(1, -1)


@mutant(Recurrent, Chunked)
class ScalesNotStored:
    """Scales go to a copy."""

    def run(self, inputs):
        scales = inputs.state_scales
        return super().run(dataclasses.replace(inputs, state_scales=None if scales is None else scales.clone()))


@mutant(Recurrent, Chunked)
class IntegersCut:
    """What is stored as integers is rounded towards zero."""

    def rounded(self, S, dtype, seed, slot, token):
        held = stored(S, dtype, seed, slot, token)
        if held.scales is None or seed is not None:
            return held
        exact = S.double() / held.scales.double().unsqueeze(-1).clamp(min=1e-300)
        return Stored(exact.trunc().to(dtype), held.scales)
