"""A case of `kda verify`: one call, with the reason why it is there. The tables of cases are built with `row`."""

import dataclasses
from typing import Any

from kda_kernels.problem import SAFE_BOUND, Gate, Op, Options, Parts, Problem

SOFTPLUS = Options()  # Kimi-Linear
SAFE = Options(gate=Gate.SAFE, lower_bound=SAFE_BOUND)  # Kimi K3
NONE = Options(gate=Gate.NONE)

FP32: dict[str, Any] = {"dtype": "float32", "g_dtype": "float32", "beta_dtype": "float32"}
FP16: dict[str, Any] = {"dtype": "float16", "g_dtype": "float16", "beta_dtype": "float16"}
MIXED: dict[str, Any] = {
    "g_dtype": "float32",
    "beta_dtype": "float32",
    "param_dtype": "bfloat16",
    "state_dtype": "bfloat16",
}
STOCHASTIC: dict[str, Any] = {"state_rounding": "stochastic", "about": "state_rounding"}
CONV = Parts(norm=False)  # of a prefill
NO_STATE: dict[str, Any] = {"initial_state": False, "final_state": False}
_FIELDS = ("HV", "packed", "padding", "initial_state", "final_state", "dtype", "g_dtype", "beta_dtype", "param_dtype",
           "state_dtype")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One call and why it is there.

    Attributes:
        name: unique, for `kda verify --case`.
        why: what goes wrong in kernels that fail it.
        problem, gates, keys: what `kdacli.synthetic.make_inputs` draws from.
        transforms: names in `kdacli.verify.transforms.TRANSFORMS`, applied in order.
        properties: names in `kdacli.verify.properties.PROPERTIES`: what must hold beside the values.
        decode_steps: for prefill: the last so many tokens of each sequence are decoded from the pool, one by one. For
            decode, if it is not 0: all of them.
        gpu_only: too large for an interpreter, or about something that only a GPU has.
        seed: added to the seed of the run.
        about: what makes it this case, as groups of fields by their names in `spec`: while one group is as it is
            here, others may be changed for a kernel that does not support them (`kdacli.verify.adapt`). Empty:
            it is about its values, memory or properties, which stay.
    """

    name: str
    why: str
    problem: Problem
    gates: str = "bench"
    keys: str = "random"
    transforms: tuple[str, ...] = ()
    properties: tuple[str, ...] = ()
    decode_steps: int = 0
    gpu_only: bool = False
    seed: int = 0
    about: tuple[tuple[str, ...], ...] = ()


def row(
    name: str,
    op: Op,
    seq_lens: tuple[int, ...],
    why: str,
    *,
    options: Options = SAFE,
    dim: int = 64,
    heads: int = 1,
    v_heads: int | None = None,
    gates: str = "bench",
    keys: str = "random",
    transforms: tuple[str, ...] = (),
    properties: tuple[str, ...] = (),
    decode_steps: int = 0,
    gpu_only: bool = False,
    about: str = "",
    **fields,
) -> Case:
    """A case in few words; `fields` are those of `Problem`. Its name begins with the op.

    Args:
        about: the one field that it is about; "": whichever differ from the usual, unless it has transforms, keys,
            gates, properties or decode steps of its own, which say enough.
    """
    sizes = {"H": heads, "HV": v_heads or heads, "K": dim, "V": dim}
    problem = Problem(op, seq_lens, options=options, **{**sizes, **fields})
    says_enough = transforms or properties or decode_steps or (gates, keys) != ("bench", "random")
    groups = ((about,),) if about else () if says_enough else _unusual(problem)
    return Case(f"{op}-{name}", why, problem, gates, keys, transforms, properties, decode_steps, gpu_only, about=groups)


def _unusual(problem: Problem) -> tuple[tuple[str, ...], ...]:
    """The fields, by their names in `spec`, that are not as in most cases; lengths and sizes may be."""
    usual = Problem(problem.op, problem.seq_lens, H=problem.H, HV=problem.H, options=SAFE)
    names = {"pool": "pool_slots", "v_first": "state_v_first"} | {name: name for name in _FIELDS}
    found = [key for key, name in names.items() if getattr(problem, name) != getattr(usual, name)]
    options = {"logit": "beta_is_logit", "neg_eigval": "allow_neg_eigval", "l2norm": "qk_l2norm"} | {
        name: name for name in ("gate", "lower_bound", "scale")
    }
    found += [key for key, name in options.items() if getattr(problem.options, name) != getattr(SAFE, name)]
    parts = {"conv": "width", "conv_bias": "bias", "conv_dtype": "weight_dtype", "conv_state_dtype": "state_dtype"} | {
        name: name for name in ("tokens_first", "norm", "norm_dtype")
    }
    if problem.parts is not None:
        plain = Parts(norm=problem.op is not Op.PREFILL)
        found += [key for key, name in parts.items() if getattr(problem.parts, name) != getattr(plain, name)]
    return tuple((key,) for key in found)


def change(options: Options, **changes) -> Options:
    """`options` with other values."""
    return dataclasses.replace(options, **changes)
