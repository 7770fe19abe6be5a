"""The polynomials of the CuTe kernels' device functions, in plain Python."""

import math

import pytest

from kda_kernels.cute.runtime import missing_packages

pytestmark = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
STEPS = 4096


def horner(coefficients: list[float], x: float) -> float:
    y = 0.0
    for c in reversed(coefficients):
        y = y * x + c
    return y


def worst(actual, exact, low: float, high: float) -> float:
    """The largest relative error on a grid without 0."""
    points = (low + (high - low) * (i + 1) / STEPS for i in range(STEPS))
    return max(abs(actual(x) / exact(x) - 1) for x in points if x)


def test_exact_to_an_ulp():
    from kda_kernels.cute.math import ATANH, EXP2

    assert worst(lambda x: horner(EXP2, x), lambda x: 2.0**x, -0.5, 0.5) < 2**-24
    assert worst(lambda z: z * horner(ATANH, z * z), math.atanh, 0, 1 / 3) < 2**-24


def test_the_quick_softplus_is_right_where_it_is_small():
    from kda_kernels.cute.math import LOG1P

    assert worst(lambda e: e * horner(LOG1P, e), math.log1p, 0, 1) < 1.5e-6
    assert worst(lambda e: e * horner(LOG1P, e), math.log1p, 0, 1e-30) < 1e-15
