"""The options that a dump states, as Python values. An option it leaves out is None here and is inferred later."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kda_kernels.errors import InputError
from kda_kernels.problem import Op

_TRUE, _FALSE, _NONE = ("true", "1", "yes", "on"), ("false", "0", "no", "off"), ("", "none", "null")


@dataclasses.dataclass(frozen=True)
class Said:
    """Each option by the name that FLA's functions give it, None if the dump does not say."""

    op: Op | None = None
    use_gate_in_kernel: bool | None = None
    lower_bound: float | None = None
    safe_gate: bool | None = None
    use_qk_l2norm_in_kernel: bool | None = None
    use_beta_sigmoid_in_kernel: bool | None = None
    allow_neg_eigval: bool | None = None
    scale: float | None = None
    state_v_first: bool | None = None
    output_final_state: bool | None = None
    update_state: bool | None = None
    null_slot: int | None = None
    batch_invariant: bool | None = None
    checkpoint_every: int | None = None
    conv_tokens_first: bool | None = None
    conv_rounded: bool | None = None
    norm_eps: float | None = None


def _plain(name: str, value: Any) -> Any:
    """A Python scalar out of a scalar, a one-element tensor or the text that .safetensors metadata holds."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.ndim > 1 or value.is_meta or value.is_complex() or value.layout != torch.strided:
            raise InputError(f"{name} is a tensor of shape {list(value.shape)}: it should be one plain value")
        return value.item()
    if isinstance(value, str):
        text = value.strip().lower()
        return None if text in _NONE else text
    return value


def _bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value in _TRUE + _FALSE:
        return value in _TRUE
    raise InputError(f"{name} is {_short(value)}: it should be true or false")


def _float(name: str, value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            if math.isfinite(number := float(value)):
                return number
        except (ValueError, OverflowError):
            pass
    raise InputError(f"{name} is {_short(value)}: it should be a finite number")


def _int(name: str, value: Any) -> int:
    number = _float(name, value)
    if not number.is_integer():
        raise InputError(f"{name} is {_short(value)}: it should be a whole number")
    return int(number)


def _op(name: str, value: Any) -> Op:
    try:
        return Op(value)
    except ValueError:
        raise InputError(f"{name} is {_short(value)}: it should be one of {', '.join(Op)}") from None


def _short(value: Any) -> str:
    """A value for a message of one line; a container only by its type, since its contents may be long."""
    return repr(value)[:60] if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"


_READ: dict[str, Callable[[str, Any], Any]] = {
    "op": _op,
    **dict.fromkeys(("lower_bound", "scale", "norm_eps"), _float),
    **dict.fromkeys(("null_slot", "checkpoint_every"), _int),
}


def parse(options: Mapping[str, tuple[str, Any]]) -> Said:
    """Reads {our name: (its name in the dump, value)}.

    Raises:
        InputError: a value of the wrong kind, or options that contradict each other.
    """
    values = {}
    for key, (name, value) in options.items():
        if (plain := _plain(name, value)) is not None:
            values[key] = _READ.get(key, _bool)(name, plain)
    said = Said(**values)
    if said.lower_bound is not None and not said.lower_bound < 0:
        raise InputError(f"lower_bound is {said.lower_bound}: it should be negative, such as -5.0")
    if said.allow_neg_eigval and said.use_beta_sigmoid_in_kernel is False:
        raise InputError(
            "allow_neg_eigval is set but use_beta_sigmoid_in_kernel is not: the factor 2 needs the sigmoid"
        )
    if said.scale is not None and said.scale == 0:
        raise InputError("scale is 0: it should be a number other than 0")
    return said
