"""The causal convolution of whole prompts: SiLU of it, and the windows at the end of sequences, in one launch.

Floor: each number read once and written once, of T=8192 and 4608 channels in bf16 151 MB.

A program owns `BLOCK` neighbouring channels of `C` tokens of one sequence and walks down its tokens with the last W - 1
of them in registers, as `gate` does; the rows before the first are read a second time, from the L2 cache. The next
`GROUP` tokens are on their way while these are worked on. A sequence's first program also stores its new state: whoever
writes that is the only one that reads the old one.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from kda_kernels.checks import check_inputs
from kda_kernels.errors import InputError
from kda_kernels.ints import cdiv, next_power_of_2
from kda_kernels.ranges import stage
from kda_kernels.tensors import Convolution, Inputs
from kda_kernels.triton.common import cast, conv_taps, convolved, load_slot
from kda_kernels.triton.launch import dtype_of, launch, usual
from kda_kernels.triton.runtime import on_device, require_device

C, GROUP = 32, 8  # tokens of a program, and of them those whose loads are in flight together
BLOCK, WARPS = 256, 4  # channels of a program, 2 a thread: with 4 it takes 10% longer
MOST_SEQUENCES = 1024  # that a program looks at in one go, to find its own
NUMBERS = ("indices", "cu_seqlens", "has_initial_state", "sequences", "T", "slots", "null_slot", "stride_indices")


@triton.jit
def _before(p_x, in_call, p_state, in_state, stride, channels, mask):
    """The token before some, fp32, from the call or from the sequence's state; zeros where it is in neither."""
    here = tl.load(p_x + channels, mask=(mask & in_call) != 0, other=0.0).to(tl.float32)
    held = tl.load(p_state + channels * stride, mask=(mask & in_state) != 0, other=0.0).to(tl.float32)
    return tl.where(in_call, here, held)


@triton.jit
def _tokens(p_x, mask, rows, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tokens as they lie in memory, those after `rows` as zeros."""
    found: tl.tuple = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(p_x + i * STRIDE, mask=(mask & (i < rows)) != 0, other=0.0),)
    return found


@triton.jit
def _sequence(cu_seqlens, sequences, T, i_p, C: tl.constexpr, NB: tl.constexpr):
    """Of a program: its sequence, the first token of that, its length, and the program's first token in it."""
    i_n = -1
    first = 0
    end = T
    for n in range(0, sequences + 1, NB):
        o_n = n + tl.arange(0, NB)
        start = tl.load(cu_seqlens + o_n, mask=o_n <= sequences, other=0).to(tl.int32)
        begun = (o_n <= sequences) & (start // C + o_n <= i_p)
        i_n += tl.sum(begun.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(begun, start, 0), 0))
        end = tl.minimum(end, tl.min(tl.where(begun | (o_n > sequences), T, start), 0))
    return i_n, first, end - first, (i_p - (first // C + i_n)) * C


@triton.jit(do_not_specialize=NUMBERS)
def convolution_kernel(
    x,  # [B, T, D], rows apart
    out,  # [B, T, D], rows apart
    weight,  # [D, W]
    bias,  # [D] or None
    states,  # [slots, D, L], with strides
    indices,  # [N]; None: sequence n has slot n
    cu_seqlens,  # [N + 1], or None for a dense batch
    has_initial_state,  # bool [N] or None
    sequences,
    T,  # tokens per batch row
    slots,
    null_slot,
    stride_indices,
    stride_x_s: tl.int64,  # s: from sequence to sequence of a dense batch, from token to token of a packed one
    stride_o_s: tl.int64,
    stride_n: tl.int64,  # of states, from slot to slot
    D: tl.constexpr,
    W: tl.constexpr,
    STRIDE_X: tl.constexpr,  # from token to token: the model's, with which offsets are part of instructions
    STRIDE_O: tl.constexpr,
    STRIDE_C: tl.constexpr,  # of states, from channel to channel
    STRIDE_L: tl.constexpr,  # from token to token
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    NB: tl.constexpr,  # a power of 2 over `sequences`, or MOST_SEQUENCES
):
    """One program: C tokens, from `token` on, of sequence i_n, and a block of channels.

    Grid: (cdiv(D, BLOCK) * M,), channels fastest, with M the batch rows times cdiv(T, C), or T // C + N + 1 of a packed
    batch: start // C + n is at least the number of programs of the sequences before n. What is behind the last of them
    counts as sequence N.
    """
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    i_p = tl.program_id(0) // BLOCKS
    if cu_seqlens is not None:
        i_n, first, n_tokens, token = _sequence(cu_seqlens, sequences, T, i_p, C, NB)
    else:
        i_n = i_p // tl.cdiv(T, C)
        first = i_n
        n_tokens = T
        token = i_p % tl.cdiv(T, C) * C
    rows = tl.minimum(n_tokens - token, C)
    if rows <= 0:
        return
    channels = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < D
    p_x = x + first * stride_x_s + token.to(tl.int64) * STRIDE_X
    p_o = out + first * stride_o_s + token.to(tl.int64) * STRIDE_O + channels
    raw = _tokens(p_x + channels, mask, rows, STRIDE_X, GROUP)  # on its way while the slot is looked up
    slot = i_n.to(tl.int64)
    if indices is not None:
        slot = load_slot(indices, tl.minimum(i_n, sequences - 1), stride_indices, null_slot)
    slot = tl.where(i_n < sequences, slot, -1)
    if (slot < 0) | (slot >= slots):  # padding, or a slot that is not there
        nothing = tl.full([BLOCK], tl.where(slot < 0, 0.0, float("nan")), tl.float32).to(out.dtype.element_ty)
        for _ in range(rows):
            tl.store(p_o, nothing, mask=mask)
            p_o += STRIDE_O
        return

    p_state = states + slot * stride_n
    inside = token > 0
    held = token == 0
    if has_initial_state is not None:
        held = held & (tl.load(has_initial_state + i_n) != 0)
    x1 = _before(p_x - STRIDE_X, inside, p_state + (W - 2) * STRIDE_L, held, STRIDE_C, channels, mask)
    x2 = tl.zeros_like(x1)
    x3 = tl.zeros_like(x1)
    if W > 2:
        x2 = _before(p_x - 2 * STRIDE_X, inside, p_state + (W - 3) * STRIDE_L, held, STRIDE_C, channels, mask)
    if W > 3:
        x3 = _before(p_x - 3 * STRIDE_X, inside, p_state + (W - 4) * STRIDE_L, held, STRIDE_C, channels, mask)
    w0, w1, w2, w3, b = conv_taps(weight, bias, channels, mask, W)
    if token == 0:
        tl.debug_barrier()  # every warp has read what is overwritten now
        for i in tl.static_range(W - 1):
            back = (W - 1 - i) - n_tokens  # before the first token of the call, if it is over 0
            p_new = p_x - back.to(tl.int64) * STRIDE_X + channels
            new = tl.load(p_new, mask=(mask & (back <= 0)) != 0, other=0.0).to(tl.float32)
            new = tl.where(back == 1, x1, tl.where(back == 2, x2, tl.where(back == 3, x3, new)))
            p = p_state + i * STRIDE_L + channels * STRIDE_C
            tl.store(p, cast(new, p.dtype.element_ty), mask=mask)

    p_x += channels
    for t in range(0, rows, GROUP):
        p_x += GROUP * STRIDE_X
        following = _tokens(p_x, mask, rows - t - GROUP, STRIDE_X, GROUP)
        for i in tl.static_range(GROUP):
            x0 = raw[i].to(tl.float32)
            y = convolved(x0, x1, x2, x3, w0, w1, w2, w3, b)
            tl.store(p_o + i * STRIDE_O, cast(y, p_o.dtype.element_ty), mask=(mask & (t + i < rows)) != 0)
            x1, x2, x3 = x0, x1, x2
        p_o += GROUP * STRIDE_O
        raw = following


def launch_convolution(
    x: torch.Tensor,
    out: torch.Tensor,
    conv: Convolution,
    indices: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    has_initial_state: torch.Tensor | None,
    null_slot: int | None,
) -> None:
    """The kernel on checked tensors.

    Args:
        x, out: [B, T, D], or with cu_seqlens [T, D] or [1, T, D]. indices: as those of `conv`.
    """
    require_device(x)
    T, D = x.shape[-2:]
    if not x.numel():
        return
    x_t, o_t = x.stride(-2), out.stride(-2)
    if cu_seqlens is None:
        N, steps = x.shape[0], (x.stride(0), out.stride(0), conv.states.stride(0))
        programs = N * cdiv(T, C)
    else:
        N, steps = cu_seqlens.shape[0] - 1, (x_t, o_t, conv.states.stride(0))
        programs = T // C + N + 1
    if not N:
        out.zero_()
        return
    inner = conv.entries[2:]
    constants = (D, conv.width, x_t, o_t, *inner, C, GROUP, BLOCK, min(next_power_of_2(N + 1), MOST_SEQUENCES))
    typed = (x, out, conv.weight, conv.bias, conv.states, indices, cu_seqlens, has_initial_state)
    kind = None
    if usual(typed[:5], steps, (T,)):
        kind = (x.device, constants, tuple(map(dtype_of, typed)))
    with stage("convolution"), on_device(x):
        launch(
            convolution_kernel, (cdiv(D, BLOCK) * programs,), kind,
            (
                *typed, N, T, conv.states.shape[0], -1 if null_slot is None else null_slot,
                1 if indices is None else indices.stride(0), *steps, *constants,
            ),
            num_warps=WARPS,
        )  # fmt: skip


def convolve(inputs: Inputs) -> Inputs:
    """A prefill behind its convolution: q, k and v are views of what comes out of it, and its states are shifted.

    One launch where q, k and v are views of one projection, else three.

    Raises:
        InputError: see `check_inputs`; or the convolution has slots of its own.
    """
    check_inputs(inputs)
    assert (conv := inputs.conv) is not None
    if conv.indices is not None and inputs.state_indices is not None:
        raise InputError("conv.indices", "is given", "a prefill's convolution has the slots of state_indices")
    parts = [x.flatten(2) for x in (inputs.q, inputs.k, inputs.v)]
    sizes = [x.shape[2] for x in parts]
    out = parts[0].new_empty(*parts[0].shape[:2], sum(sizes))
    made = out.split(sizes, 2)
    slots = conv.indices if inputs.state_indices is None else inputs.state_indices
    where = slots, inputs.cu_seqlens, inputs.has_initial_state, inputs.null_slot
    if (mixed := _projection(parts)) is not None:
        launch_convolution(mixed, out, conv, *where)
    else:
        for x, y, channels in zip(parts, made, _slices(sizes), strict=True):
            bias = None if conv.bias is None else conv.bias[channels]
            own = Convolution(conv.weight[channels], bias, conv.by_channel[:, channels])
            launch_convolution(x, y, own, *where)
    q, k, v = (y.unflatten(2, x.shape[2:]) for x, y in zip((inputs.q, inputs.k, inputs.v), made, strict=True))
    return inputs.changed(q=q, k=k, v=v, conv=None)


def _projection(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """[B, T, D] of which these are views, side by side; None if they are not."""
    first, at = parts[0], parts[0].data_ptr()
    for x in parts:
        if x.stride() != first.stride() or x.data_ptr() != at:
            return None
        at += x.shape[2] * x.element_size()
    D = sum(x.shape[2] for x in parts)
    if first.stride(1) < D or len({x.untyped_storage().data_ptr() for x in parts}) > 1:
        return None
    return first.as_strided((*first.shape[:2], D), first.stride())


def _slices(sizes: list[int]) -> list[slice]:
    """Of channels that lie one after another."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
