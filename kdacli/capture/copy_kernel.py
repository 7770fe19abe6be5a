"""The kernel of `kdacli.capture.switched`, which imports it, and Triton with it, where a graph is captured."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])
def copy_kernel(
    cell,  # int64 [2]: the switch, and the address of the table
    first,  # row of the table of the first copy
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (any, copies). See `switched.row_of` for a row."""
    if tl.load(cell) != 0:
        row = tl.load(cell + 1).to(tl.pointer_type(tl.int64)) + (first + tl.program_id(1)) * COLUMNS
        source, target = tl.load(row), tl.load(row + 1)
        n0, n1, n2 = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
        n3 = tl.load(row + 5).to(tl.int32)
        s0, s1, s2 = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
        t0, t1, t2 = tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
        indices, step, kind, rows = tl.load(row + 12), tl.load(row + 13), tl.load(row + 14), tl.load(row + 15)
        count = n0 * n1 * n2 * n3
        for begin in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
            i = begin + tl.arange(0, BLOCK)
            there = i < count
            i_3, i = i % n3, i // n3
            i_2, i = i % n2, i // n2
            i_1, i_0 = i % n1, (i // n1).to(tl.int64)
            slot = i_0
            if indices != 0:
                if kind % 2 == 1:
                    slot = tl.load(indices.to(tl.pointer_type(tl.int64)) + i_0 * step, mask=there, other=0)
                else:
                    slot = tl.load(indices.to(tl.pointer_type(tl.int32)) + i_0 * step, mask=there, other=0).to(tl.int64)
                slot = tl.minimum(tl.maximum(slot, 0), rows - 1)
            a = slot * s0 + i_1 * s1 + i_2 * s2 + i_3
            b = i_0 * t0 + i_1 * t1 + i_2 * t2 + i_3
            if kind // 2 == 4:
                word = tl.load(source.to(tl.pointer_type(tl.int32)) + a, mask=there)
                tl.store(target.to(tl.pointer_type(tl.int32)) + b, word, mask=there)
            else:
                byte = tl.load(source.to(tl.pointer_type(tl.int8)) + a, mask=there)
                tl.store(target.to(tl.pointer_type(tl.int8)) + b, byte, mask=there)
