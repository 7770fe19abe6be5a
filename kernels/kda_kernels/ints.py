"""Whole numbers, on the host: Triton's functions of these names serve in kernels too, and take 3 to 5 us here."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; b > 0."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is not under n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
