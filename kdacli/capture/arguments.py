"""The arguments of a recorded call as a dump's tensors and options, under our names.

Nothing is copied here: tensors are views of the caller's, so that sizes are known before anything is written.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kda_kernels.problem import CHUNK
from kdacli.capture import steps
from kdacli.capture.sites import Site
from kdacli.dumps import names

_OUT = ("out", "o", "output", "core_attn_out")


class NotKdaError(Exception):
    """A call that a dump cannot hold, and why; or, without a reason, one that is no KDA call at all."""


@dataclasses.dataclass
class Call:
    """One call, before it ran.

    Attributes:
        tensors: inputs by our names; `state` is the pool where there is one, `token_states` and `checkpoint_states` are
            outputs, and `conv_states` is both.
        options: by FLA's names.
        out: the tensor that the call was given for its result, if any.
        left_out: tensor arguments that no table knows.
        writes_state: whether the call leaves its final state anywhere.
    """

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    out: torch.Tensor | None
    left_out: list[str]
    writes_state: bool = True

    @property
    def pooled(self) -> bool:
        return "state_indices" in self.tensors and "state" in self.tensors


def bind(function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """All arguments by name with their defaults, and which of them were given."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    given = set(bound.arguments)
    bound.apply_defaults()
    flat: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            flat |= value
            given |= set(value)
        else:
            flat[name] = value
    return flat, given


def read(site: Site, arguments: Mapping[str, Any], given: set[str], renamed: Mapping[str, str]) -> Call:
    """Sorts the arguments of one call.

    Args:
        given: those that are no defaults. renamed: {their name: the one it counts as}.
    Raises:
        NotKdaError: the call is none of KDA, or one that a dump cannot hold.
    """
    if site.only_if and not arguments.get(site.only_if):
        raise NotKdaError
    reasons = (why for name, why in site.not_if.items() if arguments.get(name) is not None)
    if reason := site.seen_only or next(reasons, None):
        raise NotKdaError(reason)
    arguments = dict(arguments) | {name: getattr(arguments["self"], own) for name, own in site.own.items()}
    updates = site.options.get("update_state", not arguments.get("disable_state_update"))
    call = Call({}, {}, None, [], writes_state=updates)
    for name in sorted(arguments, key=given.__contains__):  # what was given goes last and wins
        if arguments[name] is not None and name not in (site.packed_qkv, *site.ignored, *(site.checkpoints or ())):
            _sort(call, name, renamed.get(name, name), arguments[name])
    if site.step:
        _arrange(call, site.step, arguments)
    _apply(site, call, arguments)
    if site.packed_qkv:
        _unpack(call, arguments[site.packed_qkv])
    if site.checkpoints:
        _keep_checkpoints(call, *site.checkpoints, arguments)
    _complete(call)
    return call


def _sort(call: Call, name: str, known: str, value: Any) -> None:
    """Adds an argument to what it is of a call; `known`: as which it is looked up."""
    if isinstance(value, torch.Tensor):
        if key := names.ours(known, names.INPUTS):
            call.tensors[key] = value.detach()
        elif known in _OUT:
            call.out = value.detach()
        else:
            call.left_out.append(name)
    elif known in names.INPUTS["rounding_seed"] and isinstance(value, int):
        call.tensors["rounding_seed"] = torch.tensor([value])
    elif isinstance(value, bool | int | float) and (key := names.ours(known, names.OPTIONS)):
        call.options[key] = value


def _arrange(call: Call, step: str, arguments: Mapping[str, Any]) -> None:
    """What a fused step has beside the recurrence."""
    try:
        tensors, options = steps.ARRANGEMENTS[step](arguments)
    except ValueError as error:
        raise NotKdaError(str(error)) from error
    call.tensors |= tensors
    call.options |= options
    call.left_out = [name for name in call.left_out if name in steps.NOT_HELD]


def _complete(call: Call) -> None:
    """Leaves out what has no meaning without its other half.

    Raises:
        NotKdaError: something is missing that every call has, or the slots are of no known form.
    """
    if missing := [name for name in names.REQUIRED if name not in call.tensors]:
        raise NotKdaError(f"it has no {' and no '.join(missing)} (--name THEIRS=OURS says which arguments they are)")
    if ("token_states" in call.tensors) != ("token_state_indices" in call.tensors):
        both = ("token_states", "token_state_indices")
        call.left_out += [name for name in both if call.tensors.pop(name, None) is not None]
    if not call.pooled:
        call.tensors.pop("state_indices", None)
    elif call.tensors["state_indices"].ndim != 1 + ("num_accepted_tokens" in call.tensors):
        raise NotKdaError(f"its slots have {call.tensors['state_indices'].ndim} dimensions")


def _apply(site: Site, call: Call, arguments: Mapping[str, Any]) -> None:
    """What the site says beside the arguments."""
    options = call.options
    options |= site.options
    if site.gate_if:
        options["use_gate_in_kernel"] = bool(_present(arguments.get(site.gate_if)))
    if site.logit_if:
        options["use_beta_sigmoid_in_kernel"] = bool(arguments.get(site.logit_if))
    unsafe = site.bound_if_safe and not options.get("safe_gate")
    if "lower_bound" in options and (unsafe or options.get("use_gate_in_kernel") is False):
        del options["lower_bound"]
    if options.get("safe_gate") and "lower_bound" not in options:
        del options["safe_gate"]
    if site.op:
        options["op"] = site.op
    if not call.writes_state:
        options |= {"output_final_state": False, "update_state": False}


def _keep_checkpoints(call: Call, states: str, positions: str, tokens: int, arguments: Mapping[str, Any]) -> None:
    """States inside the prompts, as far as a dump can name their positions: multiples of 64 tokens, not the start."""
    room, at = arguments.get(states), arguments.get(positions)
    if room is None or at is None:
        return
    offsets = at.detach() * tokens
    offsets = torch.where(offsets % CHUNK == 0, offsets, 0)
    rows = torch.where(offsets > 0, torch.arange(len(offsets), device=offsets.device), -1)
    call.tensors |= {"checkpoint_states": room.detach(), "checkpoint_rows": rows, "checkpoint_offsets": offsets}


def _present(value: Any) -> bool:
    return value is not None and value is not False


def _unpack(call: Call, mixed: torch.Tensor) -> None:
    """q, k and v of `mixed` [N, 2 H K + HV V] as views [1, N, heads, size]; of [N, S, D] as [N, S, heads, size]."""
    if "state" not in call.tensors or call.tensors["state"].ndim != 4:
        raise NotKdaError("q, k and v are packed and no state says which sizes they have")
    HV, V, K = call.tensors["state"].shape[1:]
    keys = (mixed.shape[-1] - HV * V) // 2
    sizes = {"q": (keys, K), "k": (keys, K), "v": (HV * V, V)}
    parts = mixed.detach().split([width for width, _ in sizes.values()], dim=-1)
    for (name, (_, size)), part in zip(sizes.items(), parts, strict=True):
        tokens = part.unflatten(-1, (-1, size))
        call.tensors[name] = tokens.unsqueeze(0) if mixed.ndim == 2 else tokens


def trim(call: Call) -> None:
    """More slots than sequences are the rest of a buffer. Makes views."""
    if not call.pooled:
        return
    tensors = call.tensors
    indices, q, cu_seqlens = tensors["state_indices"], tensors["q"], tensors.get("cu_seqlens")
    sequences = len(cu_seqlens) - 1 if cu_seqlens is not None else len(indices) if q.shape[0] == 1 else len(q)
    for name in ("state_indices", "num_accepted_tokens", "has_initial_state", "token_state_indices"):
        if name in tensors:
            tensors[name] = tensors[name][:sequences]


def mark_padding(tensors: dict[str, torch.Tensor], null_slot: int | None) -> None:
    """Padding slots become -1. Computes where the tensors lie."""
    if "state_indices" not in tensors or "state" not in tensors:
        return
    indices = tensors["state_indices"]
    padding = indices < 0 if null_slot is None else (indices < 0) | (indices == null_slot)
    tensors["state_indices"] = torch.where(padding, -1, indices)
    if "num_accepted_tokens" in tensors:  # of rows that are padding, it is whatever the buffer held
        accepted = tensors["num_accepted_tokens"]
        tensors["num_accepted_tokens"] = torch.where(padding.all(dim=1), 1, accepted)
