"""Fills in what a dump does not say, where that follows safely from what it holds; else asks for it.

Every assumption is written down in `notes`, which `kda compare` prints.
"""

from collections.abc import Sequence

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Op, Options
from kda_kernels.tensors import Checkpoints, Convolution, GatedNorm, Inputs
from kdacli.dumps.pieces import anywhere
from kdacli.dumps.said import Said
from kdacli.dumps.shapes import Tensors

DECODE_TOKENS = 8  # most tokens a sequence that still count as a decode call (speculative decoding verifies a few)
_SURE = 32  # values in [0, 1] that make chance unlikely: a logit N(0, 1) lies there with probability 0.34


def build_inputs(tensors: Tensors, said: Said, beta_name: str, notes: list[str]) -> Inputs:
    """The call's `Inputs`, shapes not checked yet.

    Raises:
        InputError: something is neither said nor to be inferred, or contradicts the tensors.
    """
    tensors = dict(tensors)
    options = Options.of_switches(
        _use_gate(tensors, said, notes),
        said.lower_bound,
        promise=said.lower_bound,
        beta_is_logit=(logit := _beta_is_logit(tensors["beta"], said, beta_name, notes)),
        allow_neg_eigval=_neg_eigval(said, logit, notes),
        qk_l2norm=_qk_l2norm(tensors["q"], tensors["k"], said, notes),
        scale=said.scale,
    )
    v_first = _v_first(tensors, said, notes)
    checkpoints, conv, norm = _checkpoints(tensors, said), _conv(tensors, said, notes), _norm(tensors, said)
    return Inputs(
        **tensors,
        options=options,
        state_v_first=v_first,
        output_final_state=said.output_final_state is not False,
        update_state=said.update_state is not False,
        null_slot=said.null_slot,
        batch_invariant=bool(said.batch_invariant),
        checkpoints=checkpoints,
        conv=conv,
        norm=norm,
    )


def _checkpoints(tensors: Tensors, said: Said) -> Checkpoints | None:
    taken = _taken(tensors, ("checkpoint_states", "checkpoint_rows"), ("checkpoint_offsets",))
    if taken is None:
        return None
    states, rows, offsets = taken
    assert states is not None and rows is not None
    return Checkpoints(states, rows, offsets, said.checkpoint_every)


def _conv(tensors: Tensors, said: Said, notes: list[str]) -> Convolution | None:
    if "conv_weight" not in tensors and tensors.pop("conv_states", None) is not None:
        notes.append("conv_states not used: there is no conv_weight, so q, k and v are convolved already")
    taken = _taken(tensors, ("conv_weight", "conv_states"), ("conv_bias", "conv_indices"))
    if taken is None:
        return None
    weight, states, bias, indices = taken
    assert weight is not None and states is not None
    return Convolution(weight, bias, states, indices, bool(said.conv_tokens_first), bool(said.conv_rounded))


def _norm(tensors: Tensors, said: Said) -> GatedNorm | None:
    taken = _taken(tensors, ("norm_gate", "norm_weight"), ())
    if taken is None:
        return None
    gate, weight = taken
    assert gate is not None and weight is not None
    return GatedNorm(gate, weight) if said.norm_eps is None else GatedNorm(gate, weight, said.norm_eps)


def _taken(tensors: Tensors, needed: Sequence[str], others: Sequence[str]) -> list[torch.Tensor | None] | None:
    """Takes these out of `tensors`; None where there is none of them."""
    found = {name: tensors.pop(name, None) for name in (*needed, *others)}
    if all(tensor is None for tensor in found.values()):
        return None
    if absent := [name for name in needed if found[name] is None]:
        there = next(name for name, tensor in found.items() if tensor is not None)
        raise InputError(f"{' and '.join(needed)} belong together: {absent[0]} is missing beside {there}")
    return list(found.values())


def _use_gate(tensors: Tensors, said: Said, notes: list[str]) -> bool:
    """Whether g is raw. Takes A_log and dt_bias out of `tensors` where the call did not use them."""
    in_kernel = said.use_gate_in_kernel
    if in_kernel is None:
        in_kernel = "A_log" in tensors
        if not in_kernel and anywhere(tensors["g"], lambda g: g > 0):
            raise InputError(
                "g holds positive values, so it is raw, but A_log is missing: add it, or the log decay as g"
            )
        gate = "A_log is there, so g is raw" if in_kernel else "A_log is not there, so g is the log decay itself"
        notes.append(f"use_gate_in_kernel is not said: {gate}")
    if not in_kernel:
        if unused := [name for name in ("A_log", "dt_bias") if tensors.pop(name, None) is not None]:
            notes.append(f"{' and '.join(unused)} not used: the gate is not computed in the kernel")
        return False
    if said.lower_bound is None:
        if said.safe_gate:
            raise InputError("safe_gate is set but lower_bound is missing: it should be negative, such as -5.0")
        if "A_log" not in tensors:
            raise InputError("use_gate_in_kernel is set but A_log is missing: only the safe gate works without it")
        if said.safe_gate is None:
            notes.append("lower_bound is not said: the gate is -exp(A_log) * softplus(g + dt_bias)")
    if absent := [name for name in ("A_log", "dt_bias") if name not in tensors]:
        notes.append(f"{' and '.join(absent)} not there: as zeros")
    return True


def _beta_is_logit(beta: torch.Tensor, said: Said, name: str, notes: list[str]) -> bool:
    if said.use_beta_sigmoid_in_kernel is not None:
        return said.use_beta_sigmoid_in_kernel
    if said.allow_neg_eigval:
        notes.append("use_beta_sigmoid_in_kernel is not said: allow_neg_eigval is, so beta is a logit")
        return True
    if beta.is_floating_point() and bool(((beta < 0) | (beta > 2)).any()):
        notes.append(f"use_beta_sigmoid_in_kernel is not said: {name} leaves [0, 2], so it is a logit")
        return True
    if beta.numel() >= _SURE:
        notes.append(f"use_beta_sigmoid_in_kernel is not said: {name} lies in [0, 2], so it is beta itself")
        return False
    raise InputError(f"use_beta_sigmoid_in_kernel is missing: {name} has too few values to tell logits from betas")


def _neg_eigval(said: Said, beta_is_logit: bool, notes: list[str]) -> bool:
    if said.allow_neg_eigval is None and beta_is_logit:
        notes.append("allow_neg_eigval is not said: taken as false")
    return bool(said.allow_neg_eigval)


def _qk_l2norm(q: torch.Tensor, k: torch.Tensor, said: Said, notes: list[str]) -> bool:
    """Models normalise q and k; what is open is whether that had happened before the dump."""
    if said.use_qk_l2norm_in_kernel is not None:
        return said.use_qk_l2norm_in_kernel
    done = _unit(q) and _unit(k)
    why = "q and k have length 1 already, so it is false" if done else "q and k are not normalised, so it is true"
    notes.append(f"use_qk_l2norm_in_kernel is not said: {why}")
    return not done


def _unit(x: torch.Tensor) -> bool:
    """True if every row that is not zero has length 1, to the precision of bf16."""

    def norms(rows: torch.Tensor) -> torch.Tensor:
        return rows.float().norm(dim=-1)

    off = anywhere(x, lambda rows: ((n := norms(rows)) != 0) & ((n - 1).abs() >= 0.02))
    return not off and anywhere(x, lambda rows: norms(rows) > 0)


def _v_first(tensors: Tensors, said: Said, notes: list[str]) -> bool:
    state, K, V = tensors.get("state"), tensors["q"].shape[-1], tensors["v"].shape[-1]
    if said.state_v_first is not None:
        return said.state_v_first
    if state is not None and K != V and state.shape[-2:] in ((V, K), (K, V)):
        v_first = state.shape[-2:] == (V, K)
        notes.append(f"state_v_first is not said: {str(v_first).lower()} by the shape of the state")
        return v_first
    notes.append("state_v_first is not said: taken as true, [.., V, K]")
    return True


def infer_op(seq_lens: Sequence[int], has_state: bool, said: Said, notes: list[str], steps: bool = False) -> Op:
    """What the dump says; else step where there is a convolution or a norm (`steps`), decode if every sequence has 1 to
    8 tokens and a state comes in, prefill otherwise.
    """
    if said.op is not None:
        return said.op
    if steps:
        return Op.STEP
    short = bool(seq_lens) and all(1 <= n <= DECODE_TOKENS for n in seq_lens)
    op = Op.DECODE if short and has_state else Op.PREFILL
    notes.append(f"op is not said: {op}, by the lengths of the sequences and whether a state comes in")
    return op
