"""Is a result good enough? Every output tensor against the fp64 token recurrence, with a bound that has a reason.

The bound is not a constant that someone liked. A plain torch implementation that rounds where a kernel of that op must
round (operands of matrix products, the output, the state) runs on the same inputs, for `kda verify` eight times where
its rounding errors can be drawn anew, and the kernel may make

    a factor * (the largest error of the plain implementation) + one output rounding + a floor for fp32 sums

and, where products are in tf32, once what cutting operands to it adds to rounding them (`baseline.Cut`). That holds at
three levels, because a norm over a large tensor hides what is wrong in one place: the whole tensor, each (sequence,
head) block, and each element. A block and its elements are granted at least what the plain implementation makes of a
typical block: where nearly parallel keys let one rounding grow, what it makes of a single one is the luck of the draw.
What is exactly zero in the reference (padding rows, a state never fed) must be exactly zero. NaN, Inf and unwritten
elements never pass, and neither does a pool whose unused slots changed by a single bit. For `kda verify` a float32
state that was rounded to less on its way fails too (`digits`), unless the kernel says that it carries states so.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from kda_kernels.problem import CHUNK, Op
from kda_kernels.reference.gate import L2NORM_EPS
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import digits
from kdacli.judge.baseline import Cut, draws, expect
from kdacli.judge.bits import bits
from kdacli.judge.blocks import Blocks

# Another legal order of the same roundings (other sub-chunks, other reduction trees) makes an error of the same size:
# three kernels by three houses lie within 1.6x of each other on the same inputs. Twice that is another arithmetic.
FACTOR = 2.0
# The largest of many errors scatters more than their norm does.
ELEMENT_FACTOR = 3.0
# Partial sums of K products in fp32 wander like a random walk, 2^-24 * sqrt(K) each, and several of them in a row.
FLOOR = 4 * 2.0**-24

# Half a unit in the last place of 1.0: the most that one rounding changes an element, relative to it. Over a tensor the
# roundings have an rms of a little under half of that, which is what norms are granted.
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# What may be lost of any element: numbers under the smallest normal one are flushed to zero, or, in fp16, rounded to
# a subnormal.
SMALLEST = {torch.bfloat16: 2.0**-126, torch.float16: 2.0**-25, torch.float32: 2.0**-126}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the judge says about one output tensor.

    Attributes:
        tensor: "o", "final_state", or "g_cumsum" (the op `gate`).
        error, bound: ||out - ref|| / ||ref|| over the tensor, and what it may be.
        worst, worst_bound: the element furthest over (or nearest to) its own bound, both relative to the rms of its
            (sequence, head) block of the reference.
        where: that element, or the first one that is NaN or Inf: sequence, token, head, channel; for a state sequence,
            head, v, k and, in a pool, slot.
        passed: at all three levels, finite, zero where it must be, unused slots untouched.
        note: what is wrong, in words; "" if nothing is.
    """

    tensor: str
    error: float
    bound: float
    worst: float
    worst_bound: float
    where: dict[str, str]
    passed: bool
    note: str = ""

    def with_fault(self, note: str) -> "Verdict":
        """The same, failed by one thing more; as it is where `note` is empty."""
        if not note:
            return self
        return dataclasses.replace(self, passed=False, note="; ".join(filter(None, (self.note, note))))


def judge(
    inputs: Inputs,
    outputs: Outputs,
    *,
    op: Op | str,
    expected: Outputs | None = None,
    plain_outputs: Outputs | Sequence[Outputs] | None = None,
    carried_state: str | None = None,
    count_digits: bool = False,
) -> list[Verdict]:
    """Judges each output tensor of one call.

    Args:
        inputs: as they were before the call; their pool must not be the one that the call updated.
        outputs: what came out. With a pool, final_state is the pool after the call. final_state is judged when it is
            there, and must be there when `inputs.output_final_state` is set.
        op: which reference applies, and which plain implementation sets the bound.
        expected: `expect(inputs, op)` if it is at hand; computed otherwise.
        plain_outputs: `draws(inputs, op)`. If it is not at hand, it is computed, for one unit alone.
        carried_state: what the kernel says that it carries states in, if not in float32 (see `Contract`): final_state
            may be rounded to that.
        count_digits: float32 that was rounded to less on its way fails (see `digits`).
    """
    expected = expect(inputs, op) if expected is None else expected
    plain_outputs = draws(inputs, op, units=()) if plain_outputs is None else plain_outputs
    plain_outputs = [plain_outputs] if isinstance(plain_outputs, Outputs) else plain_outputs
    of_tokens = Blocks.of_tokens(inputs)
    if Op(op) is Op.GATE:
        return [_judge_tensor("g_cumsum", of_tokens, torch.float32, CHUNK, outputs.o, expected.o, plain_outputs)]
    K = inputs.q.shape[-1]
    usual = _usual_norms(inputs, of_tokens, expected.final_state)
    verdicts = [_judge_tensor("o", of_tokens, inputs.v.dtype, K, outputs.o, expected.o, plain_outputs, usual)]
    if outputs.final_state is not None and expected.final_state is not None:
        of_states, dtype = Blocks.of_state(inputs), state_dtype(inputs, carried_state)
        states = outputs.final_state, expected.final_state
        verdict = _judge_tensor("final_state", of_states, dtype, K, *states, plain_outputs)
        if count_digits and dtype is torch.float32 and not math.isnan(verdict.error):
            verdict = verdict.with_fault(digits.note(of_states, *states, plain_outputs[0].final_state))
        verdicts.append(_with_unused_slots(verdict, inputs, outputs.final_state))
    elif inputs.output_final_state:
        verdicts.append(_failed("final_state", {}, "missing: the kernel returned none"))
    return verdicts


def state_dtype(inputs: Inputs, carried: str | None) -> torch.dtype:
    """What final_state should be rounded to. carried: as `carried_state` of `judge`."""
    dtype = torch.float32 if inputs.state is None else inputs.state.dtype
    return dtype if carried is None or dtype is not torch.float32 else getattr(torch, carried)


def _judge_tensor(
    name: str,
    blocks: Blocks,
    dtype: torch.dtype,
    terms: int,
    out: torch.Tensor,
    ref: torch.Tensor,
    plain_outputs: Sequence[Outputs],
    usual: torch.Tensor | None = None,
) -> Verdict:
    """One tensor.

    Args:
        dtype: what it should be rounded to. terms: how many numbers are summed into an element.
        plain_outputs: what the plain implementation made, each time.
        usual: [sequences, heads], see `_usual_norms`; None: blocks do not cancel.
    """
    if out.shape != ref.shape:
        return _failed(name, {}, f"shape is {list(out.shape)}: it should be {list(ref.shape)}")
    plain_outs = [one.final_state if name == "final_state" else one.o for one in plain_outputs]
    out, ref, plain_outs = blocks.rows(out), blocks.rows(ref), [blocks.rows(one) for one in plain_outs]
    if not ref.numel():
        return Verdict(name, 0.0, 0.0, 0.0, 0.0, {}, True)
    plain_rows = [("the plain implementation made", one) for one in plain_outs]
    for what, rows in (("the reference is", ref), *plain_rows, ("", out)):
        if (verdict := _not_finite(name, blocks, rows, what)) is not None:
            return verdict
    unit, floor, smallest = UNIT_ROUNDOFF[dtype], FLOOR * math.sqrt(terms), SMALLEST[dtype]
    wrong, plain_wrongs = (out - ref).abs_(), [(one - ref).abs_() for one in plain_outs]
    cut = torch.tensor([isinstance(one, Cut) for one in plain_outputs], device=ref.device)

    # the tensor
    norm = ref.norm().item()
    error = _ratio(wrong.norm().item(), norm)
    granted = _granted(torch.stack([x.norm() for x in plain_wrongs]), cut, FACTOR).item()
    bound = granted / norm + unit / 2 + floor + smallest * math.sqrt(ref.numel()) / norm if norm else 0.0

    # each block: one whose plain error is small by luck is granted a typical one, relative to its usual size
    count = blocks.sums(torch.ones_like(ref))
    norms, wrongs, *each = (blocks.sums(x.square()).sqrt() for x in (ref, wrong, *plain_wrongs))
    sizes = norms if usual is None else torch.maximum(norms, usual)
    plains = _granted(torch.stack(each), cut, FACTOR)
    granted = torch.maximum(plains, _typical(plains, sizes) * sizes)
    limits = granted + unit / 2 * norms + floor * sizes + smallest * count.sqrt()
    limits = torch.where(norms > 0, limits, 0.0)

    # each element, against the usual largest error of the plain implementation in its block, or in a typical one
    rms = norms / count.clamp(min=1).sqrt()
    size = sizes / count.clamp(min=1).sqrt()
    largest = _granted(torch.stack([blocks.maxima(x) for x in plain_wrongs]), cut, ELEMENT_FACTOR, _rms)
    largest = torch.maximum(largest, _typical(largest, size) * size)
    may = blocks.spread(largest + ELEMENT_FACTOR * floor * size + smallest) + unit * ref.abs()
    may = torch.where(blocks.spread(norms) > 0, may, 0.0)
    share = torch.where(wrong > 0, wrong / may, 0.0)  # inf where nothing may be wrong
    at = int(share.argmax())
    scale = blocks.spread(rms).expand_as(ref).flatten()[at].item()
    worst, worst_bound = (_ratio(x.flatten()[at].item(), scale) for x in (wrong, may))

    where = blocks.where(at, ref.shape)
    notes = _notes(error, bound, wrongs, limits, norms, share.flatten()[at].item(), where)
    return Verdict(name, error, bound, worst, worst_bound, where, not notes, "; ".join(notes))


def _largest(errors: torch.Tensor) -> torch.Tensor:
    return errors.amax(0)


def _rms(errors: torch.Tensor) -> torch.Tensor:
    return errors.square().mean(0).sqrt()


def _granted(
    errors: torch.Tensor,
    cut: torch.Tensor,
    factor: float,
    of_draws: Callable[[torch.Tensor], torch.Tensor] = _largest,
) -> torch.Tensor:
    """What may be wrong, of the plain implementation's errors [draws, ...] and which of these are `Cut`, [draws].

    The factor is for what scatters from one order of roundings to another. The shift by cutting goes one way: it counts
    once.
    """
    scatter = of_draws(errors[~cut])
    shift = (of_draws(errors[cut]).square() - scatter.square()).clamp(min=0).sqrt() if bool(cut.any()) else 0.0
    return factor * scatter + shift


def _typical(errors: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The rms over blocks of the errors relative to the sizes, both [sequences, heads]. Size 0 does not count."""
    there = sizes > 0
    return (errors[there] / sizes[there]).square().mean().sqrt().nan_to_num(0.0)


def _usual_norms(inputs: Inputs, tokens: Blocks, final_state: torch.Tensor | None) -> torch.Tensor | None:
    """How large o of each (sequence, head) is where q and the state know nothing of each other: [sequences, heads].

    o = scale * S q is a sum over K. With few, nearly parallel keys and a q at a right angle to them the sum cancels:
    o is then far smaller than its terms, and a rounding error, which goes with the terms, far larger beside it. What
    one implementation makes of such a block is chance; so it is granted what a block that does not cancel would be:
    ||scale q|| ||S|| / sqrt(K), the norm of the terms. S is the larger of the states before and after.
    """
    if final_state is None:
        return None
    states = Blocks.of_state(inputs)
    norms = [states.rows(s).norm(dim=-1) for s in (inputs.state, final_state) if s is not None]
    state = norms[0] if len(norms) == 1 else torch.maximum(*norms)  # of the sequences that have one
    K, heads = inputs.q.shape[-1], inputs.v.shape[2]
    q = tokens.rows(inputs.q).norm(dim=-1).square()
    if inputs.options.qk_l2norm:
        q = q / (q + L2NORM_EPS)
    q = q.repeat_interleave(heads // q.shape[1], dim=1)
    squares = q.new_zeros(tokens.sequences, heads).index_add_(0, tokens.owner, q)
    full = torch.zeros_like(squares).index_copy_(0, states.owner, state)
    return abs(inputs.scale) * squares.sqrt() * full / K**0.5


def _notes(
    error: float,
    bound: float,
    wrongs: torch.Tensor,
    limits: torch.Tensor,
    norms: torch.Tensor,
    worst_share: float,
    where: dict[str, str],
) -> list[str]:
    """What is wrong, in words; empty if all three levels hold."""
    notes = [f"relative error {error:.2e} > {bound:.2e}"] if not error <= bound else []
    excess = torch.where(wrongs > 0, wrongs / limits, 0.0)
    if not bool((excess <= 1).all()):
        block = int(excess.argmax())
        norm = norms.flatten()[block].item()
        n, h = divmod(block, norms.shape[1])
        count = int((excess > 1).sum())
        notes.append(
            f"sequence {n}, head {h} should be zero"
            if norm == 0
            else f"{count} of {norms.numel()} (sequence, head) blocks are off, most of all sequence {n}, head {h}:"
            f" {wrongs.flatten()[block].item() / norm:.2e} > {limits.flatten()[block].item() / norm:.2e}"
        )
    if not worst_share <= 1:
        notes.append(f"the element at {said(where)} is off by {worst_share:.3g} times its bound")
    return notes


def _not_finite(name: str, blocks: Blocks, rows: torch.Tensor, what: str) -> Verdict | None:
    """A failing verdict if `rows` hold NaN or Inf."""
    finite = rows.isfinite()
    if bool(finite.all()):
        return None
    first = int((~finite).flatten().byte().argmax())
    where = blocks.where(first, rows.shape)
    kind = "NaN" if bool(rows.flatten()[first].isnan()) else "Inf"
    count = int((~finite).sum())
    lead = f"{what} {kind}" if what else kind
    return _failed(name, where, f"{lead}, first at {said(where)}; {count} of {rows.numel()} elements are not finite")


def _with_unused_slots(verdict: Verdict, inputs: Inputs, pool: torch.Tensor) -> Verdict:
    """Fails the verdict if a slot that no sequence uses is not bit for bit what it was."""
    if inputs.state_indices is None:
        return verdict
    used = inputs.state_indices.long()
    unused = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    unused[used[used >= 0]] = False
    changed = bits(pool[unused]).ne(bits(inputs.state[unused])).flatten(1).any(1)
    if not bool(changed.any()):
        return verdict
    slot = int(unused.nonzero()[changed][0])
    return verdict.with_fault(f"slot {slot} of the pool was written, and no sequence uses it")


def said(where: dict[str, str]) -> str:
    """sequence 1, token 65, head 0, channel 17."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


def _ratio(a: float, b: float) -> float:
    """a / b, where nothing relative to nothing is 0 and something relative to nothing is infinite."""
    return a / b if b else (math.inf if a else 0.0)


def _failed(name: str, where: dict[str, str], note: str) -> Verdict:
    return Verdict(name, math.nan, math.nan, math.nan, math.nan, where, False, note)
