"""The judge has teeth: every fault below fails by name, and another order of the same roundings passes."""

import dataclasses
import itertools
import math

import pytest
import torch

from kda_kernels.problem import Op, Options, Problem
from kda_kernels.reference import oracle
from kda_kernels.reference.gate import log_decay
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import Reference, Verdict, expect
from kdacli.judge import judge as judge_by
from kdacli.judge.plain import DRAWS, LONG, operand_dtype, plains
from kdacli.synthetic import make_inputs
from kdacli.verify.cases import spec
from kdacli.verify.checks.check import Bench

LENS = (3, 70, 0, 64, 17)


def _inputs(
    op: Op = Op.PREFILL, seq_lens: tuple[int, ...] = LENS, gates: str = "bench", keys: str = "random", **fields
) -> Inputs:
    """Two heads; K differs from V unless `fields` say otherwise."""
    problem = Problem(op, seq_lens, **{"H": 2, "HV": 2, "K": 32, "V": 16, **fields})
    return make_inputs(problem, gates=gates, keys=keys)


def judge(inputs: Inputs, outputs: Outputs, *, op: Op, **more) -> list[Verdict]:
    return judge_by(Reference(inputs, op), outputs, **more)


def _plain(inputs: Inputs, op: Op) -> Outputs:
    """What a plain implementation makes."""
    if op is Op.GATE:
        decay = log_decay(inputs.g, inputs.A_log, inputs.dt_bias, inputs.options, torch.float32)[0]
        pieces = [piece.cumsum(0) for own in decay.split(LENS) for piece in own.split(64)]
        return Outputs(torch.cat(pieces).unsqueeze(0))
    return oracle.chunk_form(inputs, operand_dtype=operand_dtype(inputs.q.dtype))


def _good(inputs: Inputs, op: Op = Op.PREFILL) -> Outputs:
    """The oracle's result rounded once: what a kernel with no error of its own would return."""
    exact = expect(inputs, op)
    state_dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    return Outputs(exact.o.to(inputs.v.dtype), exact.final_state.to(state_dtype))


def _verdicts(inputs: Inputs, outputs: Outputs, op: Op = Op.PREFILL, **more) -> dict[str, Verdict]:
    return {v.tensor: v for v in judge(inputs, outputs, op=op, **more)}


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_rounded_oracle_passes(op, dtype):
    inputs = _inputs(op, dtype=dtype, g_dtype=dtype, beta_dtype=dtype)
    for verdict in judge(inputs, _good(inputs, op), op=op):
        assert verdict.passed and verdict.note == "" and 0 < verdict.error < verdict.bound
        assert verdict.rounding == pytest.approx(verdict.error)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("gates", "keys"), [("bench", "random"), ("init", "near-collinear"), ("weak", "random")])
def test_another_chunk_size_passes(dtype, gates, keys):
    """A chunk of 32 instead of 64 rounds the same things in other places."""
    problem = Problem(Op.PREFILL, LENS, H=2, HV=2, K=64, V=64, dtype=dtype, g_dtype=dtype, beta_dtype=dtype)
    inputs = make_inputs(problem, gates=gates, keys=keys)
    operands = torch.bfloat16 if dtype == "bfloat16" else "tf32"
    verdicts = judge(inputs, oracle.chunk_form(inputs, chunk=32, operand_dtype=operands), op=Op.PREFILL)
    assert [v.note for v in verdicts] == ["", ""]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("gates", "keys"), [("bench", "random"), ("init", "near-collinear"), ("weak", "random")])
def test_tensor_cores_may_cut_operands_to_tf32(dtype, gates, keys):
    """A kernel that does not round fp32 operands itself is right, in other chunks too."""
    inputs = _inputs(dtype=dtype, g_dtype=dtype, beta_dtype=dtype, gates=gates, keys=keys)
    made = oracle.chunk_form(inputs, chunk=32, operand_dtype="tf32 cut")
    verdicts = judge(inputs, made, op=Op.PREFILL)
    assert [v.note for v in verdicts] == ["", ""]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("gates", ["bench", "init", "weak"])
def test_products_in_bf16_fail_where_tf32_is_due(dtype, gates):
    inputs = _inputs(dtype=dtype, g_dtype=dtype, beta_dtype=dtype, gates=gates)
    made = oracle.chunk_form(inputs, operand_dtype=torch.bfloat16)
    verdicts = judge(inputs, made, op=Op.PREFILL)
    assert [v.passed for v in verdicts] == [False, False]


def test_last_bit_noise_passes():
    """Half of the elements moved by one unit in the last place of fp32."""
    inputs = _inputs(Op.DECODE, dtype="float32", g_dtype="float32", beta_dtype="float32", seq_lens=(1, 1, 1))
    good = _good(inputs, Op.DECODE)
    noisy = {name: torch.where(torch.rand_like(t) < 0.5, t.nextafter(2 * t), t) for name, t in good.tensors().items()}
    assert [v.note for v in judge(inputs, Outputs(**noisy), op=Op.DECODE)] == ["", ""]


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
@pytest.mark.parametrize("tensor", ["o", "final_state"])
def test_a_wrong_scale_fails(op, tensor):
    """By 1%; by 2% where products are in bf16."""
    inputs = _inputs(op)
    outputs = _good(inputs, op)
    factor = 1.02 if op is Op.PREFILL else 1.01
    wrong = dataclasses.replace(outputs, **{tensor: getattr(outputs, tensor) * factor})
    verdicts = _verdicts(inputs, wrong, op)
    assert not verdicts[tensor].passed
    assert [v.passed for name, v in verdicts.items() if name != tensor] == [True]


def test_nan_fails_and_is_located():
    inputs = _inputs()
    outputs = _good(inputs)
    outputs.o[0, 3 + 65 :, 1] = torch.nan  # token 65 of sequence 1, and all that follows
    verdict = _verdicts(inputs, outputs)["o"]
    assert not verdict.passed
    assert verdict.where == {"sequence": "1", "token": "65", "head": "1", "channel": "0"}
    assert "NaN, first at sequence 1, token 65, head 1, channel 0" in verdict.note


def test_inf_fails():
    inputs = _inputs()
    outputs = _good(inputs)
    outputs.final_state[4, 0, 2, 7] = -torch.inf
    verdict = _verdicts(inputs, outputs)["final_state"]
    assert not verdict.passed
    assert verdict.where == {"sequence": "4", "head": "0", "v": "2", "k": "7"}
    assert verdict.note.startswith("Inf, first at")


def test_one_wrong_element_fails_and_is_located():
    inputs = _inputs()
    outputs = _good(inputs)
    rms = outputs.o[0, 73 : 73 + 64, 0].float().square().mean().sqrt()
    outputs.o[0, 73 + 9, 0, 5] += rms  # one of 4928
    verdict = _verdicts(inputs, outputs)["o"]
    assert not verdict.passed
    assert verdict.where == {"sequence": "3", "token": "9", "head": "0", "channel": "5"}
    assert verdict.worst == pytest.approx(1, rel=0.1) and verdict.worst_bound < 0.5


def test_an_error_in_one_block_does_not_drown_in_the_norm():
    """3% in one of 128 (sequence, head) blocks is 0.3% of the norm."""
    inputs = _inputs(seq_lens=(16,) * 64)
    outputs = _good(inputs)
    outputs.o[0, 16 * 7 : 16 * 8, 1] *= 1.03
    verdict = _verdicts(inputs, outputs)["o"]
    assert verdict.error <= verdict.bound and not verdict.passed
    assert "1 of 128 (sequence, head) blocks are off, most of all sequence 7, head 1" in verdict.note


def test_one_token_off_fails():
    inputs = _inputs()
    outputs = _good(inputs)
    o = outputs.o.roll(1, dims=1)
    assert not _verdicts(inputs, dataclasses.replace(outputs, o=o))["o"].passed


def test_a_wrong_tail_row_fails():
    """The last token of the 70, as when padded rows of a partial chunk are not masked."""
    inputs = _inputs()
    outputs = _good(inputs)
    outputs.o[0, 72] *= 1.1
    verdict = _verdicts(inputs, outputs)["o"]
    assert not verdict.passed and verdict.where["sequence"] == "1" and verdict.where["token"] == "69"


def test_swapped_heads_fail():
    inputs = _inputs()
    outputs = _good(inputs)
    swapped = Outputs(outputs.o.flip(2), outputs.final_state.flip(1))
    assert not any(v.passed for v in judge(inputs, swapped, op=Op.PREFILL))


def test_a_transposed_state_fails():
    inputs = _inputs(V=32)
    outputs = _good(inputs)
    transposed = outputs.final_state.transpose(-1, -2).contiguous()
    assert not _verdicts(inputs, dataclasses.replace(outputs, final_state=transposed))["final_state"].passed


def test_a_state_of_another_shape_fails():
    inputs = _inputs()
    outputs = _good(inputs)
    transposed = outputs.final_state.transpose(-1, -2)
    verdict = _verdicts(inputs, dataclasses.replace(outputs, final_state=transposed))["final_state"]
    assert not verdict.passed and verdict.note == "shape is [5, 2, 32, 16]: it should be [5, 2, 16, 32]"


def test_a_missing_state_fails_only_if_asked_for():
    inputs = _inputs()
    outputs = dataclasses.replace(_good(inputs), final_state=None)
    assert not _verdicts(inputs, outputs)["final_state"].passed
    inputs = dataclasses.replace(inputs, output_final_state=False)
    assert [(v.tensor, v.passed) for v in judge(inputs, outputs, op=Op.PREFILL)] == [("o", True)]


def test_a_stale_state_fails():
    """The initial state handed back as the final one."""
    inputs = _inputs()
    outputs = dataclasses.replace(_good(inputs), final_state=inputs.state.clone())
    assert not _verdicts(inputs, outputs)["final_state"].passed


def _pool() -> tuple[Inputs, Outputs, int]:
    """Decode over a pool with a padding row; and a slot that no sequence uses."""
    inputs = _inputs(Op.DECODE, seq_lens=(1, 1, 1, 1), pool_slots=6, padding=1)
    unused = next(slot for slot in range(6) if slot not in inputs.state_indices.tolist())
    outputs = Outputs(_good(inputs, Op.DECODE).o, inputs.state.clone())
    used = inputs.state_indices[inputs.state_indices >= 0].long()
    outputs.final_state[used] = expect(inputs, Op.DECODE).final_state[used].float()
    return inputs, outputs, unused


def test_an_untouched_pool_passes():
    inputs, outputs, _ = _pool()
    assert [v.note for v in judge(inputs, outputs, op=Op.DECODE)] == ["", ""]


def test_a_touched_unused_slot_fails():
    inputs, outputs, unused = _pool()
    outputs.final_state[unused, 1, 3, 4] = 0.0  # it held NaN
    verdict = _verdicts(inputs, outputs, Op.DECODE)["final_state"]
    assert not verdict.passed
    assert verdict.note == f"slot {unused} of the pool was written, and no sequence uses it"


def test_swapped_slots_fail():
    inputs, outputs, _ = _pool()
    a, b = inputs.state_indices[inputs.state_indices >= 0][:2].tolist()
    outputs.final_state[[a, b]] = outputs.final_state[[b, a]]
    verdict = _verdicts(inputs, outputs, Op.DECODE)["final_state"]
    assert not verdict.passed and verdict.where["slot"] in (str(a), str(b))


def test_output_of_a_padding_row_must_be_zero():
    inputs, outputs, _ = _pool()
    row = inputs.state_indices.tolist().index(-1)
    o = outputs.o.flatten(0, 1)
    assert not o[row].any()
    o[row, 1, 2] = 1e-20
    verdict = _verdicts(inputs, outputs, Op.DECODE)["o"]
    assert not verdict.passed and f"sequence {row}, head 1 should be zero" in verdict.note


def test_all_zero_reference_must_be_met_exactly():
    inputs = _inputs(Op.DECODE, seq_lens=(1, 1), initial_state=False)
    inputs.v.zero_()
    outputs = _good(inputs, Op.DECODE)
    assert all(v.passed and v.error == 0 for v in judge(inputs, outputs, op=Op.DECODE))
    outputs.o[..., 0] = 1e-30
    assert not _verdicts(inputs, outputs, Op.DECODE)["o"].passed


def test_nothing_to_judge_passes():
    inputs = _inputs(seq_lens=(0, 0))
    assert all(v.passed for v in judge(inputs, _good(inputs), op=Op.PREFILL))


def test_underflow_of_fp16_is_no_fault():
    """Outputs of 1e-6 are subnormal in fp16: they keep few digits, whatever the kernel does."""
    inputs = _inputs(Op.DECODE, seq_lens=(1, 1), dtype="float16", options=Options(scale=1e-6))
    assert _verdicts(inputs, _good(inputs, Op.DECODE), Op.DECODE)["o"].passed


def test_nan_in_the_inputs_is_told_apart():
    inputs = _inputs()
    inputs.v[0, 5] = torch.nan
    verdict = _verdicts(inputs, _good(inputs))["o"]
    assert not verdict.passed and verdict.note.startswith("the reference is NaN, first at sequence 1, token 2")


def test_the_gate_is_judged_as_its_cumulative_sum():
    inputs = _inputs(Op.GATE)
    good = Outputs(_plain(inputs, Op.GATE).o)
    (verdict,) = judge(inputs, good, op=Op.GATE)
    assert verdict.tensor == "g_cumsum" and verdict.passed and 0 < verdict.error < 1e-6
    good.o[0, 3 + 64] += good.o[0, 3 + 63]  # the sum goes on over the end of a chunk
    (verdict,) = judge(inputs, good, op=Op.GATE)
    assert not verdict.passed and (verdict.where["sequence"], verdict.where["token"]) == ("1", "64")


def test_inputs_are_left_alone():
    inputs, outputs, _ = _pool()
    before = inputs.map(torch.clone)
    judge(inputs, outputs, op=Op.DECODE)
    for name, tensor in before.tensors().items():
        assert torch.equal(tensor.nan_to_num(7.0), inputs.tensors()[name].nan_to_num(7.0))


@pytest.mark.parametrize("unit", [1.07, 1.31, 1.61, 1.77])
@pytest.mark.parametrize(
    "name",
    ["prefill-plain-values/K=128/V=128", "prefill-any/lens=1/initial_state=no", "prefill-pair-01", "prefill-pair-55",
     "prefill-pair-40/K=128/V=128", "prefill-pair-45/seed=2", "prefill-pair-65/seed=1"],
)  # fmt: skip
def test_the_luck_of_other_roundings_passes(name, unit):
    """One rounding, or one nearly singular chunk, decides here: of two implementations that are equally good, one makes
    several times the error of the other.
    """
    bench = Bench.of_case(spec.parse(name), 0, "cpu")
    inputs = dataclasses.replace(bench.inputs, output_final_state=True)
    made = oracle.chunk_form(inputs, operand_dtype=operand_dtype(inputs.q.dtype), unit=unit)
    found = judge_by(bench.reference, made)
    assert [verdict.note for verdict in found if not verdict.passed] == []


def test_draws_are_as_good_and_differ():
    inputs = _inputs()
    (piece,) = Reference(inputs, Op.PREFILL)
    errors = piece.rows["o"].squares.sum((1, 2)).sqrt().tolist()
    assert len(set(errors)) == DRAWS and max(errors) < 1.5 * min(errors)
    assert [one.cut for one in plains(Op.PREFILL, torch.float32, 70)] == [False] * DRAWS + [True] * DRAWS
    assert len(plains(Op.DECODE, torch.float32, 70)) == len(plains(Op.GATE, torch.float32, 70)) == 1
    assert len(plains(Op.PREFILL, torch.bfloat16, LONG + 1)) == 1


def _rounded(state: torch.Tensor, to: torch.dtype | str) -> torch.Tensor:
    """float32, rounded to fewer digits; "tf32" has ten bits of mantissa."""
    if to == "tf32":
        return ((state.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return state.to(to).float()


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, "tf32"])
def test_a_float32_state_that_was_rounded_on_its_way_fails(op, to):
    """Even where bf16 products cost more than the rounding does."""
    inputs = _inputs(op)
    outputs = _good(inputs, op)
    second = (torch.arange(len(LENS)) == 1).view(-1, 1, 1, 1)
    outputs.final_state = torch.where(second, _rounded(outputs.final_state, to), outputs.final_state)
    verdict = _verdicts(inputs, outputs, op)["final_state"]
    assert not verdict.passed
    assert "2 of 10 (sequence, head) blocks, first sequence 1, head 0, hold ten bits of mantissa" in verdict.note
    if op is Op.PREFILL:
        assert verdict.error < verdict.bound and verdict.worst < verdict.worst_bound


@pytest.mark.parametrize("op", [Op.PREFILL, Op.DECODE])
def test_a_kernel_may_say_that_it_carries_states_in_bf16(op):
    inputs = _inputs(op)
    outputs = _good(inputs, op)
    outputs.final_state = _rounded(outputs.final_state, torch.bfloat16)
    found = _verdicts(inputs, outputs, op, carried_state="bfloat16")["final_state"]
    assert found.passed
    outputs.final_state *= 1.01
    assert not _verdicts(inputs, outputs, op, carried_state="bfloat16")["final_state"].passed


def test_a_state_that_has_no_more_digits_is_no_fault():
    """One token, keys and values of few bits, nothing before it: every number is what bf16 holds, or nearly so."""
    options = Options("none", qk_l2norm=False, beta_is_logit=False)
    inputs = _inputs(seq_lens=(1, 1), initial_state=False, options=options)
    inputs.k.copy_(inputs.k.sign())
    inputs.beta.fill_(0.7)
    exact = _plain(inputs, Op.PREFILL)
    assert exact.final_state.bfloat16().float().equal(exact.final_state)
    assert _verdicts(inputs, exact)["final_state"].passed
    zero = _good(inputs := _inputs(seq_lens=(0, 0), initial_state=False))
    assert _verdicts(inputs, zero)["final_state"].passed


def test_an_fp16_state_that_went_through_bf16_fails():
    inputs = _inputs(state_dtype="float16")
    outputs = _good(inputs)
    assert _verdicts(inputs, outputs)["final_state"].passed
    outputs.final_state = outputs.final_state.bfloat16().half()
    assert "hold seven bits of mantissa" in _verdicts(inputs, outputs)["final_state"].note


def test_a_bf16_state_is_no_float32():
    inputs = _inputs(state_dtype="bfloat16")
    assert _verdicts(inputs, _good(inputs))["final_state"].passed


def test_softplus_by_a_gpus_logarithm_passes():
    """__log2f of 1 + exp(x) is wrong by up to 2^-22, which long memory sees; six times that is a fault."""
    inputs = _inputs(Op.GATE, gates="weak", options=Options("softplus"))
    x = inputs.g.double() + inputs.dt_bias.double()
    rate = inputs.A_log.double().exp().unsqueeze(-1)
    exact = torch.nn.functional.softplus(x)
    wave = (x * 1e4).sin()  # from -1 to 1
    for share, off in itertools.product((1.0, 6.0), (wave.abs(), -wave.abs(), wave)):
        decay = -rate * (exact + share * 2.0**-22 * math.log(2) * off)
        pieces = [piece.cumsum(0) for own in decay[0].split(LENS) for piece in own.split(64)]
        verdict = _verdicts(inputs, Outputs(torch.cat(pieces).float().unsqueeze(0)), Op.GATE)["g_cumsum"]
        assert verdict.passed == (share == 1.0), verdict
    one_percent = Outputs((expect(inputs, Op.GATE).o * 1.01).float())
    assert not _verdicts(inputs, one_percent, Op.GATE)["g_cumsum"].passed
