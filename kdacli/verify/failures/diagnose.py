"""What kind of wrong, in words: from the numbers alone, and by the usual `mistakes`."""

from collections.abc import Iterator, Sequence

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import CHUNK, Op
from kda_kernels.tensors import Inputs, Outputs
from kdacli.judge import Verdict, expect, said
from kdacli.judge.bits import bits
from kdacli.judge.layout import Place
from kdacli.judge.reference import rows_of
from kdacli.verify.failures.mistakes import mistakes

Rows = dict[str, tuple[Place, torch.Tensor, torch.Tensor]]  # by field of `Outputs`: what came out, the reference
CLOSE = 0.25  # an explanation leaves at most this share of the error, and
NEAR = 2e-2  # this relative error


def diagnose(inputs: Inputs, outputs: Outputs, op: Op, verdicts: Sequence[Verdict]) -> list[str]:
    """Explanations of a wrong result, one line each; none if nothing known fits.

    Args:
        inputs: as they were before the call. outputs: what came out, pool included.
        verdicts: what the judge said of these outputs; only tensors that did not pass are looked at.
    """
    wrong = {"o" if v.tensor == "g_cumsum" else v.tensor for v in verdicts if not v.passed}
    expected, rows = expect(inputs, op), {}
    for name in (wrong & expected.tensors().keys() & outputs.tensors().keys()) - {"conv_states"}:
        out, ref = getattr(outputs, name), getattr(expected, name)
        if out.shape == ref.shape and ref.numel():
            place = Place.whole(inputs, name)
            rows[name] = (place, rows_of(place, outputs, name).double(), place.rows(ref))
    found = [f"{name}: {line}" for name, parts in rows.items() for line in _from_numbers(name, *parts)]
    if "final_state" in rows and inputs.state is not None:
        place, out, ref = rows["final_state"]
        before = Outputs(inputs.v, inputs.state, state_scales=inputs.state_scales)
        if _explains(out, rows_of(place, before, "final_state").double(), ref):
            found.append("final_state: it is the state that came in: nothing was written, or into a copy")
    if "conv_states" in wrong and inputs.conv is not None and outputs.conv_states is not None:
        if torch.equal(bits(outputs.conv_states), bits(inputs.conv.states)):
            found.append("conv_states: they are as they came in: nothing was shifted, or in a copy")
    if rows and all(bool(out.isfinite().all()) for _, out, _ in rows.values()):
        found += [f"it fits if {what}" for what in _mistakes(inputs, rows, op)]
    return found


def _from_numbers(name: str, place: Place, out: torch.Tensor, ref: torch.Tensor) -> Iterator[str]:
    """What the numbers of one tensor say without the inputs."""
    finite = out.isfinite()
    if not bool(finite.all()):
        yield _not_finite(place, finite)
        return
    if not bool(out.any()):
        yield "it is all zeros"
        return
    factor = (out * ref).sum() / ref.square().sum()
    if _explains(out, factor * ref, ref):
        yield f"it is {factor.item():.4g} times what it should be"
    if name == "final_state":
        V, K = place.layout.dims.V, place.layout.dims.K
        if V == K and _explains(out, ref.unflatten(-1, (V, K)).mT.flatten(-2), ref):
            yield "it is transposed: the other of V-first and K-first"
    elif len(out) > 1:
        for step, which in ((1, "the one before"), (-1, "the next")):
            if _explains(out, ref.roll(step, 0), ref):
                yield f"each token holds the result of {which}: off by one"
    if out.shape[1] > 1:
        order = torch.cdist(out.transpose(0, 1).flatten(1), ref.transpose(0, 1).flatten(1)).argmin(1)
        if order.tolist() != list(range(len(order))) and _explains(out, ref[:, order], ref):
            yield f"its heads are permuted: they hold those of {order.tolist()}"


def _not_finite(place: Place, finite: torch.Tensor) -> str:
    """From where on there is no number."""
    bad = ~finite
    first = place.name_flat(int(bad.flatten().byte().argmax()), finite.shape)
    rows = bad.flatten(1).any(1).cpu()
    if not place.group:
        return f"NaN or Inf in {int(rows.sum())} of {len(rows)} states, first at {said(first)}"
    sequence, token = place.owner == int(first["sequence"]), int(first["token"])
    to_its_end = bool(rows[sequence][token:].all())
    chunk = f", chunk {token // CHUNK}" if int(sequence.sum()) > CHUNK else ""
    rest = "and to the end of the sequence" if to_its_end else f"in {int(rows.sum())} of {len(rows)} tokens"
    return f"NaN or Inf from {said(first)}{chunk} on, {rest}"


def _mistakes(inputs: Inputs, rows: Rows, op: Op) -> Iterator[str]:
    """The mistakes that explain all of `rows`."""
    for what, changed in mistakes(inputs, op):
        try:
            would = expect(changed, op).tensors()
        except InputError:
            continue  # with that mistake it would have been refused
        if all(
            name in would and _explains(out, _rows_like(place, would[name], out), ref)
            for name, (place, out, ref) in rows.items()
        ):
            yield what


def _rows_like(place: Place, tensor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The rows of `tensor`, or something of another shape than `out` where it has fewer."""
    enough = all(index[0] < len(tensor) for index in place.index)
    return place.rows(tensor) if enough else tensor.new_empty(0)


def _explains(out: torch.Tensor, made: torch.Tensor, ref: torch.Tensor) -> bool:
    """Whether `made` is what came out, far better than the reference is."""
    if made.shape != out.shape or not bool(made.isfinite().all()):
        return False
    left, error = (out - made).norm().item(), (out - ref).norm().item()
    return left <= CLOSE * error and left <= NEAR * max(made.norm().item(), 1e-30)
