"""PTX instructions that the DSL does not offer, or only behind its layout algebra."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op

PTX = {BFloat16: "bf16", Float16: "f16"}
LOWER, UPPER = 0x5410, 0x7632  # of `pick_bytes`: the lower halves of two words, the upper ones


@dsl_user_op
def fresh(x: Int32, *, loc=None, ip=None) -> Int32:
    """x, but for the compiler a new value: what is made of it is not made ahead of a loop, kept and spilled."""
    return Int32(_asm(T.i32(), [Int32(x).ir_value(loc=loc, ip=ip)], "mov.b32 $0, $1;", "=r,r", loc, ip))


@dsl_user_op
def fresh_float(x: Float32, *, loc=None, ip=None) -> Float32:
    """As `fresh`: what is made of it is made again, where it would be kept."""
    return Float32(_asm(T.f32(), [Float32(x).ir_value(loc=loc, ip=ip)], "mov.b32 $0, $1;", "=f,f", loc, ip))


@dsl_user_op
def load_words(source: cute.Pointer, count: int, *, loc=None, ip=None) -> tuple:
    """2 or 4 neighbouring words of global memory, asked for here: see `kda_kernels.cute.math.load_now`."""
    struct = ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>")
    targets = ", ".join(f"${i}" for i in range(count))
    text = f"ld.global.v{count}.b32 {{{targets}}}, [${count}];"
    result = _asm(struct, [source.toint().ir_value(loc=loc, ip=ip)], text, "=r," * count + "l", loc, ip)
    return tuple(Int32(llvm.extractvalue(T.i32(), result, [i], loc=loc, ip=ip)) for i in range(count))


@dsl_user_op
def send_bytes(target: cute.Pointer, source: cute.Pointer, count: int, *, loc=None, ip=None) -> None:
    """So many bytes from shared to global memory, both aligned to 16, in the background: see cp.async.bulk."""
    operands = [x.toint().ir_value(loc=loc, ip=ip) for x in (target, source)]
    text = f"cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], {count};"
    _asm(None, operands, text, "l,r", loc, ip)


@dsl_user_op
def load_transposed(source: cute.Pointer, *, loc=None, ip=None) -> tuple:
    """ldmatrix.x4.trans: four 8x8 matrices of 16-bit elements, lane 8m + r giving the address of row r of matrix m.

    A lane gets, of each, column lane // 4 and rows 2 (lane % 4) and the next: as accumulators of a product lie.
    """
    return _four_words("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", source, loc, ip)


@dsl_user_op
def load_matrices(source: cute.Pointer, *, loc=None, ip=None) -> tuple:
    """ldmatrix.x4: as `load_transposed`, but a lane gets row lane // 4 and columns 2 (lane % 4) and the next."""
    return _four_words("ldmatrix.sync.aligned.m8n8.x4.shared.b16", source, loc, ip)


@dsl_user_op
def load_four_words(source: cute.Pointer, *, loc=None, ip=None) -> tuple:
    """From shared memory, by one load, though not all of them be needed: ptxas splits one that is not volatile."""
    return _four_words("ld.volatile.shared.v4.b32", source, loc, ip)


@dsl_user_op
def multiply_16x8x16(acc: tuple, a: tuple, b: tuple, dtype: type = BFloat16, *, loc=None, ip=None) -> tuple:
    """mma.m16n8k16 of bf16 or fp16: acc + a b, fp32."""
    return _multiply("m16n8k16.row.col.f32.{0}.{0}.f32".format(PTX[dtype]), acc, a, b, loc, ip)


@dsl_user_op
def multiply_16x8x8(acc: tuple, a: tuple, b: Int32, dtype: type = BFloat16, *, loc=None, ip=None) -> tuple:
    """mma.m16n8k8 of bf16 or fp16: acc + a b, fp32."""
    return _multiply("m16n8k8.row.col.f32.{0}.{0}.f32".format(PTX[dtype]), acc, a, (b,), loc, ip)


@dsl_user_op
def store_transposed(target: cute.Pointer, words: tuple, *, loc=None, ip=None) -> None:
    """stmatrix.x4.trans, the inverse of `load_transposed`."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (target.toint(), *words)]
    _asm(None, operands, "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", loc, ip)


@dsl_user_op
def store_matrices(target: cute.Pointer, words: tuple, *, loc=None, ip=None) -> None:
    """stmatrix.x4, the inverse of `load_matrices`."""
    operands = [x.ir_value(loc=loc, ip=ip) for x in (target.toint(), *words)]
    _asm(None, operands, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", loc, ip)


@dsl_user_op
def float_pair(word: Int32, dtype: type = BFloat16, *, loc=None, ip=None) -> tuple:
    """Both halves of a word, in bf16 or fp16, as fp32, the lower first."""
    word = Int32(word)
    if dtype is Float16:
        pair = ir.Type.parse("!llvm.struct<(f32, f32)>")
        text = "{ .reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        result = _asm(pair, [word.ir_value(loc=loc, ip=ip)], text, "=f,=f,r", loc, ip, effects=False)
        return tuple(Float32(llvm.extractvalue(T.f32(), result, [i], loc=loc, ip=ip)) for i in range(2))
    halves = (word << 16, word & Int32(-65536))
    return tuple(Float32(llvm.bitcast(T.f32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)) for x in halves)


@dsl_user_op
def multiply_pairs(a: Int32, b: Int32, dtype: type = BFloat16, *, loc=None, ip=None) -> Int32:
    """The products of two pairs of bf16, or of fp16, rounded to the same. One instruction."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Int32(_asm(T.i32(), operands, f"mul.rn.{PTX[dtype]}x2 $0, $1, $2;", "=r,r,r", loc, ip, effects=False))


@dsl_user_op
def multiply(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a b, whose subnormals stay."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float32(_asm(T.f32(), operands, "mul.rn.f32 $0, $1, $2;", "=f,f,f", loc, ip, effects=False))


@dsl_user_op
def multiply_add(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a b + c, rounded once."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(_asm(T.f32(), operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip, effects=False))


@dsl_user_op
def larger_size(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """max(a, |b|), or the one that is a number. One instruction."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    text = "{ .reg .f32 t; abs.f32 t, $2; max.f32 $0, $1, t; }"
    return Float32(_asm(T.f32(), operands, text, "=f,f,f", loc, ip, effects=False))


@dsl_user_op
def add_down(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a + b, rounded down."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b)]
    return Float32(_asm(T.f32(), operands, "add.rm.f32 $0, $1, $2;", "=f,f,f", loc, ip, effects=False))


@dsl_user_op
def multiply_add_down(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a b + c, rounded once, down."""
    operands = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(_asm(T.f32(), operands, "fma.rm.f32 $0, $1, $2, $3;", "=f,f,f,f", loc, ip, effects=False))


@dsl_user_op
def pick_bytes(low: Int32, high: Int32, selector, *, loc=None, ip=None) -> Int32:
    """prmt: of the eight bytes of two words the four that the selector's nibbles number, a constant or a register."""
    operands = [Int32(x).ir_value(loc=loc, ip=ip) for x in (low, high)]
    if isinstance(selector, int):
        text, constraints = f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r"
    else:
        operands.append(Int32(selector).ir_value(loc=loc, ip=ip))
        text, constraints = "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r"
    return Int32(_asm(T.i32(), operands, text, constraints, loc, ip, effects=False))


@cute.jit
def finished(acc):
    """Waits for all products that were started, and returns accumulators anew: nothing made of them may come before."""
    warpgroup.wait_group(0)
    return [fresh_float(acc[i]) for i in range(len(acc) if isinstance(acc, list) else cute.size(acc))]


@cute.jit
def rest(exact, rounded):
    """exact - rounded, fp32 [..] and bf16 or fp16 of an even number of elements, into `exact`.

    By words: element by element the compiler rounds again, one conversion an element.
    """
    words = cute.recast_tensor(rounded, Int32)
    for i in cutlass.range_constexpr(cute.size(exact) // 2):
        low, high = float_pair(words[i], rounded.element_type)
        exact[2 * i] = exact[2 * i] - low
        exact[2 * i + 1] = exact[2 * i + 1] - high


@dsl_user_op
def exp2_approx(x: Float32, *, loc=None, ip=None) -> Float32:
    """2**x, 2 ulp; 0 under 2**-126. One instruction."""
    operand = Float32(x).ir_value(loc=loc, ip=ip)
    return Float32(_asm(T.f32(), [operand], "ex2.approx.ftz.f32 $0, $1;", "=f,f", loc, ip, effects=False))


@cute.jit
def select(condition, a: Float32, b: Float32) -> Float32:
    """a or b, with no branch."""
    return Float32(cutlass.select_(condition, a, b))


def _multiply(kind: str, acc: tuple, a: tuple, b: tuple, loc, ip) -> tuple:
    """mma.sync of that kind: acc + a b."""
    inputs = ((a, "r"), (b, "r"), (acc, "f"))
    sets, first = ["{$0, $1, $2, $3}"], 4
    for operands, _ in inputs:
        sets.append("{" + ", ".join(f"${first + i}" for i in range(len(operands))) + "}")
        first += len(operands)
    constraints = ",".join(["=f"] * 4 + [letter for operands, letter in inputs for _ in operands])
    values = [x.ir_value(loc=loc, ip=ip) for operands, _ in inputs for x in operands]
    results = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    out = _asm(results, values, f"mma.sync.aligned.{kind} {', '.join(sets)};", constraints, loc, ip, effects=False)
    return tuple(Float32(llvm.extractvalue(T.f32(), out, [i], loc=loc, ip=ip)) for i in range(4))


@dsl_user_op
def multiply_warpgroup(
    shape: str,
    a: list | Int64,
    b: Int64,
    steps: list,
    acc: list | None = None,
    transposed: bool = False,
    *,
    loc=None,
    ip=None,
) -> list:
    """Starts acc + a b, or a b, in a warpgroup: wgmma. Returns the accumulators.

    Its steps share the upper halves of their descriptors: else ptxas moves a constant there in each.

    Args:
        shape: as in wgmma's name, and dtypes: "m64n64k16.f32.bf16.bf16".
        a: 4 words or tf32 numbers for each step of the depth; or the descriptor of what lies in shared memory.
        b: a descriptor. transposed: whether its columns, not the depth, lie beside each other.
        steps: for each step what is added to the descriptor b, in units of 16 bytes; if a is one, too, to both.
    """
    count = int(shape.split("k")[0].split("n")[1]) // 2
    before = [] if acc is None else acc
    in_shared, tf32 = not isinstance(a, list), "tf32" in shape
    first = count + 1  # of the left operands, behind b
    targets = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    lines = ["{ .reg .b64 x, y; .reg .b32 l, h, m, n, o;", f"mov.b64 {{m, n}}, ${count};"]
    if in_shared:
        lines.append(f"mov.b64 {{l, h}}, ${first};")
    for i, step in enumerate(steps):
        offsets = step if in_shared else (0, step)
        left = "{" + ", ".join(f"${first + 4 * i + n}" for n in range(4)) + "}"
        if in_shared:
            lines.append(f"add.u32 o, l, {offsets[0]}; mov.b64 x, {{o, h}};")
            left = "x"
        lines.append(f"add.u32 o, m, {offsets[1]}; mov.b64 y, {{o, n}};")
        flags = [int(i > 0 or acc is not None), 1, 1]
        if not tf32:
            flags += [0, int(transposed)] if in_shared else [int(transposed)]
        lines.append(f"wgmma.mma_async.sync.aligned.{shape} {targets}, {left}, y, {', '.join(map(str, flags))};")
    text = " ".join([*lines, "}"])
    letters = ["l"] if in_shared else ["f" if tf32 else "r"] * len(a)
    constraints = ",".join(["=f"] * count + ["l", *letters] + [str(i) for i in range(len(before))])
    operands = [Int64(b).ir_value(loc=loc, ip=ip)]
    kind = Int64 if in_shared else Float32 if tf32 else Int32
    operands += [kind(x).ir_value(loc=loc, ip=ip) for x in ([a] if in_shared else a)]
    operands += [Float32(x).ir_value(loc=loc, ip=ip) for x in before]
    result = ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * count)})>")
    out = _asm(result, operands, text, constraints, loc, ip)
    return [Float32(llvm.extractvalue(T.f32(), out, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def bulk_store_lasting(target: cute.Pointer, source: cute.Pointer, size: int, *, loc=None, ip=None) -> None:
    """cp.async.bulk of `size` bytes of shared memory, which the L2 cache evicts last."""
    operands = [x.toint().ir_value(loc=loc, ip=ip) for x in (target, source)]
    text = (
        "{ .reg .b64 p; createpolicy.fractional.L2::evict_last.b64 p, 1.0; "
        f"cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [$0], [$1], {size}, p; }}"
    )
    _asm(None, operands, text, "l,r", loc, ip)


def _four_words(opcode, source, loc, ip):
    results = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = f"{opcode} {{$0, $1, $2, $3}}, [$4];"
    result = _asm(results, [source.toint().ir_value(loc=loc, ip=ip)], text, "=r,=r,=r,=r,r", loc, ip)
    return tuple(Int32(llvm.extractvalue(T.i32(), result, [i], loc=loc, ip=ip)) for i in range(4))


def _asm(result, operands, text, constraints, loc, ip, effects=True):
    return llvm.inline_asm(
        result, operands, text, constraints, has_side_effects=effects, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
