"""Whole numbers on the host, against Triton's functions of the same names."""

import pytest
import triton

from kda_kernels.ints import cdiv, next_power_of_2


@pytest.mark.parametrize("b", [1, 3, 64])
def test_cdiv(b):
    assert [cdiv(a, b) for a in range(200)] == [triton.cdiv(a, b) for a in range(200)]


def test_next_power_of_2():
    numbers = [*range(1, 300), 2**20 - 1, 2**20, 2**20 + 1]
    assert [next_power_of_2(n) for n in numbers] == [triton.next_power_of_2(n) for n in numbers]
    assert next_power_of_2(0) == 1
