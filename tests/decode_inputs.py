"""Random inputs for tests of kernels, and how results of one rounding are judged; on the GPU where there is one."""

import dataclasses
import itertools

import torch

from kda_kernels.problem import Gate, Op, Options, Problem
from kda_kernels.reference.oracle import recurrence
from kda_kernels.reference.stored import Stored, stored
from kda_kernels.tensors import Inputs
from kdacli.synthetic import make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding: half an ulp, next to sums in fp32.
RTOL = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-5}
SAFE = Options(gate=Gate.SAFE, lower_bound=-5.0)
GIVEN = Options(gate=Gate.NONE, beta_is_logit=False, qk_l2norm=False, scale=0.3)


def make(
    N=2, T=1, H=2, HV=2, K=16, V=16, *, options=None, dtype=torch.bfloat16, lens=None, v_first=True, seed=0,
    device=DEVICE, **fields,
) -> Inputs:  # fmt: skip
    """Random inputs without a state; packed when `lens` is given."""
    gen = torch.Generator().manual_seed(seed)
    options = options or Options()
    B, T = (1, sum(lens)) if lens is not None else (N, T)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    g, beta = normal(B, T, HV, K), normal(B, T, HV)
    raw = options.gate is not Gate.NONE
    inputs = Inputs(
        q=normal(B, T, H, K).to(dtype),
        k=(normal(B, T, H, K) / (1 if options.qk_l2norm else K**0.5)).to(dtype),
        v=normal(B, T, HV, V).to(dtype),
        g=(g if raw else -g.abs()).to(dtype),
        beta=(beta if options.beta_is_logit else beta.sigmoid()).to(dtype),
        options=options,
        A_log=torch.rand(HV, generator=gen) if raw else None,
        dt_bias=normal(HV, K) if raw else None,
        cu_seqlens=None if lens is None else torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32),
        state_v_first=v_first,
    )
    return dataclasses.replace(inputs, **fields).to(device)


def with_state(inputs: Inputs, dtype=torch.float32, seed=1) -> Inputs:
    """A plain state."""
    (_, _, HV, K), V = inputs.g.shape, inputs.v.shape[3]
    N = inputs.q.shape[0] if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    last = (V, K) if inputs.state_v_first else (K, V)
    state = torch.randn(N, HV, *last, generator=torch.Generator().manual_seed(seed)).to(inputs.q.device, dtype)
    return dataclasses.replace(inputs, state=state)


def with_pool(inputs: Inputs, slots: list[int], P=7, gap=0, dtype=torch.float32, index_dtype=torch.int32) -> Inputs:
    """A pool whose unused slots, and the gaps between slots, hold NaN."""
    plain = with_state(inputs).state
    size = plain[0].numel()
    memory = torch.full((P, size + gap), float("nan"), dtype=dtype, device=plain.device)
    pool = memory[:, :size].view(P, *plain.shape[1:])
    for n, slot in enumerate(slots):
        if slot >= 0:
            pool[slot] = plain[n].to(dtype)
    return dataclasses.replace(
        inputs, state=pool, state_indices=torch.tensor(slots, dtype=index_dtype, device=plain.device)
    )


def tokens_of(inputs: Inputs, rows: slice, tokens: slice) -> Inputs:
    """The call with these rows and tokens of q, k, v, g and beta; a view, and everything else as it was."""
    names = ("q", "k", "v", "g", "beta")
    return dataclasses.replace(inputs, **{name: getattr(inputs, name)[rows, tokens] for name in names})


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN only where the expected tensor has it, which is in the unused slots of a pool."""
    rtol = RTOL[actual.dtype]
    atol = 1e-5 * float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def states_after_tokens(inputs: Inputs) -> torch.Tensor:
    """The state after each token, float64 [B, T, HV, V, K] ([.., K, V]): the oracle's, run on every prefix of every
    sequence by itself. NaN for the tokens of padding."""
    (B, T), last = inputs.q.shape[:2], (inputs.v.shape[3], inputs.q.shape[3])
    last = last if inputs.state_v_first else last[::-1]
    out = torch.full((B, T, inputs.v.shape[2], *last), float("nan"), dtype=torch.float64, device=inputs.q.device)
    if inputs.cu_seqlens is None:
        sequences = [(slice(n, n + 1), 0, T) for n in range(B)]
    else:
        sequences = [(slice(0, 1), *ends) for ends in itertools.pairwise(inputs.cu_seqlens.tolist())]
    for n, (row, first, end) in enumerate(sequences):
        slot = n if inputs.state_indices is None else int(inputs.state_indices[n])
        if slot < 0:
            continue
        state = None if inputs.state is None else inputs.state[slot : slot + 1]
        alone = dataclasses.replace(inputs, state=state, state_indices=None, cu_seqlens=None, output_final_state=True)
        for t in range(first, end):
            out[row, t] = recurrence(tokens_of(alone, row, slice(first, t + 1))).final_state
    return out


def decaying(dtype: str, stochastic: bool, T: int, K=128, V=128, drafts=False, device=DEVICE) -> Inputs:
    """Steps that write u k = 0, since k is: no sum can change their fp32 state. A row has NaN, and another is 0.

    With `drafts` each token's state has a slot, and of the second sequence two were accepted.
    """
    slots = [[3, 1], [0, 2], [5, 6]] if drafts else [3, 0, 5]
    problem = Problem(
        Op.DECODE, (T,) * 3, H=2, HV=2, K=K, V=V, packed=False, pool_slots=7, state_dtype=dtype, dtype="float32",
        state_rounding="stochastic" if stochastic else "nearest", options=SAFE,
    )  # fmt: skip
    inputs = make_inputs(problem, device=device)
    start = torch.randn(7, 2, V, K) * torch.logspace(-9, 3, V)[:, None]
    start[:, 0, V - 3, 3], start[:, 1, 8] = torch.nan, 0.0
    held = stored(start.flatten(0, 1), inputs.state.dtype)
    inputs.state.copy_(held.state.view(start.shape))
    if held.scales is not None:
        inputs.state_scales.copy_(held.scales.view(7, 2, V))
    return dataclasses.replace(
        inputs, k=torch.zeros_like(inputs.k), state_indices=torch.tensor(slots, dtype=torch.int32, device=device),
        num_accepted_tokens=torch.tensor([1, 2, 1], dtype=torch.int32, device=device) if drafts else None,
    )  # fmt: skip


def stores_as_defined(inputs: Inputs, decode) -> None:
    """`decode` stores to the bit what it would store in fp32, rounded as `kda_kernels.reference.stored` says."""
    values = Stored(inputs.state, inputs.state_scales).values(torch.float32)
    wide = dataclasses.replace(inputs, state=values, state_scales=None, rounding_seed=None)
    decode(wide)
    decode(inputs)
    seed = None if inputs.rounding_seed is None else int(inputs.rounding_seed)
    slots, T = inputs.state_indices.tolist(), inputs.q.shape[1]
    places = [(slot, slot, T - 1) for slot in slots if isinstance(slot, int)]  # where to, where from, after which token
    if inputs.num_accepted_tokens is not None:
        starts = [row[n - 1] for row, n in zip(slots, inputs.num_accepted_tokens.tolist(), strict=True)]
        places = [(to, start, t) for row, start in zip(slots, starts, strict=True) for t, to in enumerate(row)]
    for to, start, t in places:
        want = stored(wide.state[to].cpu(), inputs.state.dtype, seed, start, t)
        rows = slice(None) if want.scales is None else want.scales.isfinite()  # of others the integers may be any
        assert torch.equal(inputs.state[to].cpu()[rows].nan_to_num(7), want.state[rows].nan_to_num(7))
        if want.scales is not None:
            assert torch.equal(inputs.state_scales[to].cpu().nan_to_num(-1), want.scales.nan_to_num(-1))
