"""States in two bytes: rounded stochastically, or in int16 with scales, in torch and, to the same bits, in Triton."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from decode_inputs import decaying, stores_as_defined

from kda_kernels import registry
from kda_kernels.dtypes import STATES
from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Problem
from kda_kernels.reference import stored as plain
from kda_kernels.triton import stored as device
from kda_kernels.triton.decode import DecodeConfig, decode
from kda_kernels.triton.widened import widened
from kdacli.dumps import load, save
from kdacli.judge import Reference, judge
from kdacli.synthetic import make_inputs
from kdacli.verify.cases.spec import parse
from kdacli.verify.checks.check import Bench, check
from kdacli.verify.transforms import transformed

DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "int16": tl.int16}


def test_philox_is_that_of_random123():
    """Its known answers for philox4x32 with 7 rounds (tests/kat_vectors): zeros, ones, and digits of pi."""
    for counter, key, words in (
        ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ):
        made = plain._philox(tuple(torch.tensor([c]) for c in counter), key)
        assert tuple(map(int, made)) == words


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_neighbour_is_as_likely_as_it_is_near(dtype):
    """Over all random numbers there are: exact in bf16, to 2^-13 of the distance between neighbours in fp16."""
    x = torch.tensor([1.0, 1.2345678, -3.7e-5, -(2.0**-14) * 0.99999, 1e-7, 2.0**-24, 0.0, 1e-20, 65519.0, -1.9999999])
    every = torch.arange(65536)[:, None].expand(-1, len(x))
    made = plain.rounded_stochastically(x.expand(65536, -1), every, dtype).double()
    low, high = made.amin(0), made.amax(0)
    nearest = x.to(dtype)
    assert ((low == nearest) | (high == nearest) | (x == 65519.0)).all()
    lost = 0.0 if dtype is torch.bfloat16 else 2.0**-37  # beside the 2^-14 that is added
    assert (low - lost <= x).all() and (x <= high + lost).all()
    finite = high.isfinite()
    off = (made.mean(0) - x.double()).abs()
    step = torch.where(high > low, high - low, x.abs().double().clamp(min=2.0**-24) * 2.0**-7)
    assert (off <= (0 if dtype is torch.bfloat16 else 2.0**-13) * step)[finite].all()
    assert ((low == high) == (x == nearest.float()))[finite].all() or dtype is torch.float16


def test_what_is_no_number_stays():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 65536.0, -7e4])
    numbers = torch.full_like(x, 65535, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16):
        made = plain.rounded_stochastically(x, numbers, dtype)
        assert made[0].isnan() and made[1:3].tolist() == x[1:3].tolist()
    assert made[3:].tolist() == [float("inf"), -float("inf")]
    q, scales = plain.quantised(torch.tensor([[1.0, float("nan")], [float("inf"), 0.0], [0.0, -0.0], [2.0**-111, 0.0]]))
    assert scales[:2].isnan().all() and scales[2:].tolist() == [0.0, 0.0] and not q.any()


def test_int16_has_the_scale_of_its_row():
    x = torch.randn(2, 3, 5, 8) * torch.logspace(-30, 4, 5)[:, None]
    held = plain.quantised(x)
    off = (held.values(torch.float64) - x.double()).abs() / held.scales.double()[..., None]
    assert off.max() <= 0.5 + 2e-3  # the product of integer and scale is rounded to fp32
    assert (held.state.abs().amax(-1) == 32767).all()
    numbers = torch.arange(65536)[:, None, None]
    q, scales = plain.quantised(torch.tensor([[1.0, -0.3, 0.11111, 0.0]]).expand(65536, 1, 4), numbers)
    assert set(q[:, 0, 0].tolist()) == {32766, 32767} and not q[:, 0, 3].any()
    mean = (q.double() * scales.double()[..., None]).mean(0)[0]
    assert (mean - torch.tensor([1.0, -0.3, 0.11111, 0.0]).double()).abs().max() < 2e-7


@triton.jit
def _store_kernel(x, p, scales, seed, slot, token, V: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    row = tl.arange(0, V)
    k = tl.arange(0, BK)
    at = row[:, None] * K + k[None, :]
    ok = (k < K)[None, :] & (row < V)[:, None]
    tile = tl.load(x + at, mask=ok, other=0.0)
    p_scales = None
    if scales is not None:
        p_scales = scales + row
    odd = tl.sum(tl.where(tile == tile, 0.0, float("nan")), 1)
    number = None
    if seed is not None:
        number = tl.load(seed)
    device.store_state(
        p + at, tile, ok, p_scales, row < V, odd, number, slot.to(tl.int64), token.to(tl.int64), row, K, BK
    )


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_makes_the_same_bits(dtype, stochastic, device_name="cpu"):
    """With seeds of 64 bits and of either sign; K is no power of two."""
    V, K, slot, token = 8, 24, 2**31 - 5, 3
    special = [float("inf"), -float("inf"), 65520.0, -65535.9, 7e4, 6e-8, -3e-5, 6.1e-5, 1e-30, 0.0]
    for seed in (-2, 2**40 + 12345):
        x = torch.randn(V, K) * torch.logspace(-8, 2, V)[:, None]
        x[0, : len(special)] = torch.tensor(special)
        x[1], x[2], x[3] = 0.0, float("nan"), x[3] * 1e34
        want = plain.stored(x[None], getattr(torch, dtype), seed if stochastic else None, slot, token)
        x = x.to(device_name)
        made = torch.zeros(V, K, dtype=getattr(torch, dtype), device=device_name)
        scales = torch.full((V,), -1.0, device=device_name) if dtype == "int16" else None
        number = torch.tensor([seed], device=device_name) if stochastic else None
        _store_kernel[(1,)](x, made, scales, number, slot, token, V, K, 32)
        rows = slice(None)
        if scales is not None:
            assert torch.equal(scales.cpu().nan_to_num(nan=-7), want.scales[0].nan_to_num(nan=-7))
            rows = want.scales[0].isfinite()
        assert torch.equal(made.cpu()[rows].nan_to_num(nan=7), want.state[0, rows].nan_to_num(nan=7))


@pytest.mark.gpu
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_makes_the_same_bits(dtype, stochastic):
    test_triton_makes_the_same_bits(dtype, stochastic, "cuda")


PROBLEM = Problem(Op.DECODE, (1, 2), H=1, HV=1, K=16, V=8, pool_slots=4, state_dtype="int16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_scales": None}, "state_scales is missing: a pool in int16 should come with it"),
        ({"state_scales": torch.ones(4, 1, 7)}, "state_scales has shape"),
        ({"state_scales": torch.ones(4, 1, 8).double()}, "state_scales is float64: it should be float32"),
        ({"state": torch.ones(4, 1, 8, 16)}, "state_scales is given with a state in float32"),
        ({"state_v_first": False, "state": torch.ones(4, 1, 16, 8, dtype=torch.int16)}, "state is int16 and K-first"),
        ({"rounding_seed": torch.ones(1)}, "rounding_seed is float32: it should be int64"),
        ({"rounding_seed": torch.ones(2, dtype=torch.int64)}, "rounding_seed has shape [2]: it should be [1]"),
        ({"state_indices": None}, "state is int16"),
    ],
)
def test_wrong_arguments_are_one_line(change, message):
    inputs = dataclasses.replace(make_inputs(PROBLEM), **change)
    with pytest.raises(InputError) as error:
        registry.get("torch-decode").run(inputs)
    assert message in str(error.value)


def test_the_public_function_takes_a_seed_that_is_a_number():
    from kda_kernels.api import kda_decode

    problem = dataclasses.replace(PROBLEM, state_rounding="stochastic")
    inputs = make_inputs(problem)
    call = {name: getattr(inputs, name) for name in ("state_indices", "A_log", "dt_bias", "cu_seqlens", "state_scales")}
    pools = []
    for seed in (inputs.rounding_seed, int(inputs.rounding_seed), 5):
        mine = inputs.fresh()
        call |= {"state": mine.state, "state_scales": mine.state_scales, "rounding_seed": seed}
        kda_decode(*(getattr(mine, n) for n in ("q", "k", "v", "g", "beta")), **call, state_rounding="stochastic")
        pools.append(mine.state)
    assert torch.equal(pools[0], pools[1]) and not torch.equal(pools[1], pools[2])
    with pytest.raises(InputError, match="rounding_seed is missing"):
        kda_decode(inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, **call | {"rounding_seed": None},
                   state_rounding="stochastic")  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_dump_holds_scales_and_seed(tmp_path, suffix):
    inputs = make_inputs(dataclasses.replace(PROBLEM, state_rounding="stochastic"))
    mine = inputs.fresh()
    outputs = registry.get("torch-decode").run(mine)
    save(tmp_path / f"call{suffix}", inputs, outputs, op=Op.DECODE)
    back = load(tmp_path / f"call{suffix}")
    assert torch.equal(back.inputs.rounding_seed, inputs.rounding_seed)
    assert back.inputs.state.dtype is back.outputs.final_state.dtype is torch.int16
    for have, want in ((back.inputs.state_scales, inputs.state_scales), (back.outputs.state_scales, mine.state_scales)):
        assert torch.equal(have.nan_to_num(), want.nan_to_num())
    verdicts = judge(Reference(back.inputs, Op.DECODE), back.outputs)
    assert [v.tensor for v in verdicts] == ["o", "final_state"] and all(v.passed for v in verdicts)


def test_a_dump_of_integers_without_scales_is_refused(tmp_path):
    inputs = make_inputs(PROBLEM)
    outputs = registry.get("torch-decode").run(inputs.fresh())
    save(tmp_path / "call.pt", inputs, dataclasses.replace(outputs, state_scales=None), op=Op.DECODE)
    with pytest.raises(InputError, match="no state_scales after it"):
        load(tmp_path / "call.pt")


def test_stored_states_are_unbiased_over_seeds():
    """The mean of 256 draws is nearer by their root, for each element, and for all of them together."""
    x, draws = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0)), 256
    for dtype in DTYPES:
        every = [plain.stored(x, getattr(torch, dtype), seed, slot=3).values(torch.float64) for seed in range(draws)]
        off = torch.stack(every).mean(0) - x.double()
        size = x.abs().amax(-1, keepdim=True) if dtype == "int16" else x.abs()
        last_place = size.double() * 2.0 ** (1 - STATES[dtype].digits)
        assert ((off / last_place).abs() <= 5 * 0.5 / draws**0.5).all(), dtype
        assert (off / last_place).square().mean().sqrt() <= 0.5 / draws**0.5, dtype


STORED = pytest.mark.parametrize(
    ("dtype", "stochastic", "piece"),
    [*((dtype, True, piece) for dtype in DTYPES for piece in (0, 16)), ("int16", False, 0), ("int16", False, 16)],
)


@STORED
def test_triton_decode_stores_as_it_is_defined(dtype, stochastic, piece, device_name="cpu"):
    """States of drafts, which are taken at once, and in pieces."""
    inputs = decaying(dtype, stochastic, T=1 if piece else 2, K=32, V=64, drafts=not piece, device=device_name)
    stores_as_defined(inputs, lambda x: decode(x, config=DecodeConfig(64, 2, piece=piece)))


@pytest.mark.gpu
@STORED
def test_a_gpu_stores_as_it_is_defined(dtype, stochastic, piece):
    test_triton_decode_stores_as_it_is_defined(dtype, stochastic, piece, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prefill_of_fp32_states_serves_other_pools(dtype):
    """To the bit what the same prefill makes when it stores states itself: padding, new sequences, checkpoints."""
    problem = Problem(
        Op.PREFILL, (5, 65, 0, 3, 2), H=1, HV=2, K=16, V=24, pool_slots=7, padding=1, state_dtype=dtype,
        state_rounding="stochastic",
    )  # fmt: skip
    transforms = ("fresh-states", "checkpoints-in-pool" if dtype == "int16" else "checkpoints-every")
    inputs = transformed(make_inputs(problem), transforms)
    kernel, direct, wide = registry.get("torch-prefill"), inputs.fresh(), inputs.fresh()
    expected, made = kernel.run(direct), widened(wide, kernel.run)
    assert torch.equal(made.o, expected.o)
    for have, want in ((wide.state, direct.state), (wide.checkpoints.states, direct.checkpoints.states)):
        assert torch.equal(have.view(torch.int16), want.view(torch.int16))
    if dtype == "int16":
        assert torch.equal(wide.state_scales.nan_to_num(), direct.state_scales.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ["prefill-stochastic-bf16", "prefill-int16", "prefill-int16/state_rounding=stochastic"]
)
def test_cute_prefill_stores_as_it_is_defined(case):
    result = check(registry.get("cute-prefill"), Bench.of_case(parse(f"{case}/K=128/V=128"), 0, "cuda"))
    assert result.status == "pass", result
