"""What the supported releases of the DSL have in different places."""

try:
    from cutlass.memory import SmemAllocator as SmemAllocator
except ImportError:  # before 4.8
    from cutlass.utils import SmemAllocator as SmemAllocator
