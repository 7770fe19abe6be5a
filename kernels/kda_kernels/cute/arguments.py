"""What the compiler is told of an argument before there is one."""

import cutlass
import cutlass.cute as cute

DTYPES = {
    "float32": cutlass.Float32,
    "float16": cutlass.Float16,
    "bfloat16": cutlass.BFloat16,
    "int32": cutlass.Int32,
    "int64": cutlass.Int64,
    "bool": cutlass.Boolean,
    "int16": cutlass.Int16,
}


def stand_in(dtype: str, shape: tuple, strides, align: int | None = None):
    """A tensor for the compiler: aligned to its elements, or to `align` bytes."""
    kind = DTYPES[dtype]
    return cute.runtime.make_fake_tensor(kind, shape, tuple(strides), assumed_align=align or max(1, kind.width // 8))
