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
from kda_kernels.ints import cdiv
from kda_kernels.ranges import stage
from kda_kernels.tensors import Convolution, Inputs
from kda_kernels.triton.common import cast, conv_taps, convolved, load_slot
from kda_kernels.triton.launch import dtype_of, launch
from kda_kernels.triton.runtime import on_device, require_device

C, GROUP = 32, 8  # tokens of a program, and of them those whose loads are in flight together
BLOCK, WARPS = 256, 4  # channels of a program, 2 a thread: with 4 it takes 10% longer
PAIR = 2  # channels of a thread: they are loaded together where every row begins with a whole pair
# What no kernel is compiled for: one serves every batch, length, number of heads and pool.
ARGUMENTS = (
    *("weight", "bias", "indices", "cu_seqlens", "has_initial_state"),
    *("sequences", "halvings", "T", "slots", "null_slot", "stride_indices"),
    *("D", "stride_n", "stride_e", "stride_x_s", "stride_x_t", "stride_o_s", "stride_o_t"),
)


@triton.jit
def _before(p_x, in_call, p_state, in_state, channels, offsets, mask):
    """The token before some, fp32, from the call or from the sequence's state; zeros where it is in neither."""
    here = tl.load(p_x + channels, mask=(mask & in_call) != 0, other=0.0).to(tl.float32)
    held = tl.load(p_state + offsets, mask=(mask & in_state) != 0, other=0.0).to(tl.float32)
    return tl.where(in_call, here, held)


@triton.jit
def _store_window(p_state, stride_l, offsets, p_x, stride_x_t, channels, mask, x1, x2, x3, n_tokens, W: tl.constexpr):
    """A sequence's last W - 1 tokens, p_x being its first and x1, x2, x3 those before, into its state."""
    tl.debug_barrier()  # every warp has read what is overwritten now
    for i in tl.static_range(W - 1):
        back = (W - 1 - i) - n_tokens  # before the first token of the call, if it is over 0
        p_new = p_x - back.to(tl.int64) * stride_x_t + channels
        new = tl.load(p_new, mask=(mask & (back <= 0)) != 0, other=0.0).to(tl.float32)
        new = tl.where(back == 1, x1, tl.where(back == 2, x2, tl.where(back == 3, x3, new)))
        p = p_state + i * stride_l + offsets
        tl.store(p, cast(new, p.dtype.element_ty), mask=mask)


@triton.jit
def _tokens(p_x, stride, mask, rows, COUNT: tl.constexpr):
    """COUNT tokens as they lie in memory, those after `rows` as zeros."""
    found: tl.tuple = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(p_x, mask=(mask & (i < rows)) != 0, other=0.0),)
        p_x += stride  # not i * stride: as many addresses would take registers
    return found


@triton.jit
def _fill(p_o, value, stride_o_t, mask, rows, BLOCK: tl.constexpr):
    """So many rows of the result, from p_o on, become `value`."""
    nothing = tl.full([BLOCK], value, tl.float32).to(p_o.dtype.element_ty)
    for _ in range(rows):
        tl.store(p_o, nothing, mask=mask)
        p_o += stride_o_t


@triton.jit
def _sequence(cu_seqlens, sequences, halvings, i_p, C: tl.constexpr):
    """Of a program its sequence, the last n with cu_seqlens[n] // C + n <= i_p."""
    i_n = 0
    end = sequences + 1
    for _ in range(halvings):
        middle = (i_n + end) // 2
        begun = tl.load(cu_seqlens + middle).to(tl.int32) // C + middle <= i_p
        i_n = tl.where(begun, middle, i_n)
        end = tl.where(begun, end, middle)
    return i_n


@triton.jit(do_not_specialize=ARGUMENTS)
def convolution_kernel(
    x,  # [B, T, D], rows apart
    out,  # [B, T, D], rows apart
    weight,  # [D, W]
    bias,  # [D] or None
    states,  # [slots, L, D] or [slots, D, L]
    indices,  # [N]; None: sequence n has slot n
    cu_seqlens,  # [N + 1], or None for a dense batch
    has_initial_state,  # bool [N] or None
    sequences,
    halvings,  # of the sequences, until one is left
    T,  # tokens per batch row
    slots,
    null_slot,
    stride_indices,
    stride_e,  # of states, between what does not lie side by side: tokens, in units of STEP, or channels
    D,  # this and the strides after it: in units of STEP
    stride_n: tl.int64,  # of states, from slot to slot
    stride_x_s: tl.int64,  # s: from sequence to sequence of a dense batch, from token to token of a packed one
    stride_x_t,
    stride_o_s: tl.int64,
    stride_o_t,
    W: tl.constexpr,
    TOKENS_FIRST: tl.constexpr,  # channels lie side by side in a state
    STEP: tl.constexpr,  # PAIR or 1: what D and the distances of rows of channels are multiples of
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: C tokens, from `token` on, of sequence i_n, and a block of channels.

    Grid: (cdiv(D, BLOCK) * M,), channels fastest, with M the batch rows times cdiv(T, C), or T // C + N + 1 of a packed
    batch: start // C + n is at least the number of programs of the sequences before n. What is behind the last of them
    counts as sequence N.
    """
    D *= STEP
    stride_n *= STEP
    stride_x_s *= STEP
    stride_x_t *= STEP
    stride_o_s *= STEP
    stride_o_t *= STEP
    if TOKENS_FIRST:
        stride_e *= STEP
    blocks = tl.cdiv(D, BLOCK)
    i_p = tl.program_id(0) // blocks
    if cu_seqlens is not None:
        i_n = _sequence(cu_seqlens, sequences, halvings, i_p, C)
        first = tl.load(cu_seqlens + i_n).to(tl.int32)
        n_tokens = T - first
        if i_n < sequences:
            n_tokens = tl.load(cu_seqlens + i_n + 1).to(tl.int32) - first
        token = (i_p - (first // C + i_n)) * C
    else:
        i_n = i_p // tl.cdiv(T, C)
        first = i_n
        n_tokens = T
        token = i_p % tl.cdiv(T, C) * C
    rows = tl.minimum(n_tokens - token, C)
    if rows <= 0:
        return
    channels = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < D
    p_x = x + first * stride_x_s + token.to(tl.int64) * stride_x_t
    p_o = out + first * stride_o_s + token.to(tl.int64) * stride_o_t + channels
    raw = _tokens(p_x + channels, stride_x_t, mask, rows, GROUP)  # on its way while the slot is looked up
    slot = i_n.to(tl.int64)
    if indices is not None:
        slot = load_slot(indices, tl.minimum(i_n, sequences - 1), stride_indices, null_slot)
    slot = tl.where(i_n < sequences, slot, -1)
    if (slot < 0) | (slot >= slots):  # padding, or a slot that is not there
        _fill(p_o, tl.where(slot < 0, 0.0, float("nan")), stride_o_t, mask, rows, BLOCK)
        return

    p_state = states + slot * stride_n
    offsets = channels if TOKENS_FIRST else channels * stride_e
    stride_l = stride_e if TOKENS_FIRST else 1
    inside = token > 0
    held = token == 0
    if has_initial_state is not None:
        held = held & (tl.load(has_initial_state + i_n) != 0)
    x1 = _before(p_x - stride_x_t, inside, p_state + (W - 2) * stride_l, held, channels, offsets, mask)
    x2 = tl.zeros_like(x1)
    x3 = tl.zeros_like(x1)
    if W > 2:
        x2 = _before(p_x - 2 * stride_x_t, inside, p_state + (W - 3) * stride_l, held, channels, offsets, mask)
    if W > 3:
        x3 = _before(p_x - 3 * stride_x_t, inside, p_state + (W - 4) * stride_l, held, channels, offsets, mask)
    w0, w1, w2, w3, b = conv_taps(weight, bias, channels, mask, W)
    if token == 0:
        _store_window(p_state, stride_l, offsets, p_x, stride_x_t, channels, mask, x1, x2, x3, n_tokens, W)

    p_x += channels
    for t in range(0, rows, GROUP):
        p_x += GROUP * stride_x_t
        following = _tokens(p_x, stride_x_t, mask, rows - t - GROUP, GROUP)
        for i in tl.static_range(GROUP):
            x0 = raw[i].to(tl.float32)
            y = convolved(x0, x1, x2, x3, w0, w1, w2, w3, b)
            tl.store(p_o, cast(y, p_o.dtype.element_ty), mask=(mask & (t + i < rows)) != 0)
            p_o += stride_o_t
            x1, x2, x3 = x0, x1, x2
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
    x_t, o_t, packed = x.stride(-2), out.stride(-2), cu_seqlens is not None
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not N:
        out.zero_()
        return
    programs = T // C + N + 1 if packed else N * cdiv(T, C)
    states = conv.states
    _, _, channel, token = conv.entries
    tokens_first = channel == 1
    apart = token if tokens_first else channel
    rows = (D, states.stride(0), x_t if packed else x.stride(0), x_t, o_t if packed else out.stride(0), o_t)
    odd = any(n % PAIR for n in rows) or (tokens_first and apart % PAIR)
    step = 1 if odd else PAIR
    tensors = (x, out, conv.weight, conv.bias, states, indices, cu_seqlens, has_initial_state)
    numbers = (
        N, N.bit_length(), T, states.shape[0], -1 if null_slot is None else null_slot,
        1 if indices is None else indices.stride(0), apart // step if tokens_first else apart,
        *[n // step for n in rows],
    )  # fmt: skip
    constants = (conv.width, tokens_first, step, C, GROUP, BLOCK)
    kind = None
    if not (T | D | apart | x_t | o_t) >> 31:  # else Triton makes 64-bit numbers of them
        aligned = [t.data_ptr() % 16 == 0 for t in (x, out, states)]
        kind = (x.device, constants, *aligned, *map(dtype_of, tensors))
    with stage("convolution"), on_device(x):
        launch(
            convolution_kernel, (cdiv(D, BLOCK) * programs,), kind, (*tensors, *numbers, *constants), num_warps=WARPS
        )


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
