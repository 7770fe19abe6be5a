"""The generated part of the suite `full`: every two options of the operation together, in some case."""

import dataclasses

from kda_kernels.problem import Gate, Op, Options, Parts, Problem
from kdacli.verify.cases.case import Case
from kdacli.verify.cases.cover import Pair, Row, pairwise_cover

GATES = {
    "softplus": (Gate.SOFTPLUS, None),
    "safe": (Gate.SAFE, -5.0),
    "safe, bound -1": (Gate.SAFE, -1.0),
    "activated": (Gate.NONE, None),
    "activated, bound -5": (Gate.NONE, -5.0),
}
# initial_state, final_state, pool, padding
STATES = {
    "none": (False, False, False, 0),
    "in": (True, False, False, 0),
    "out": (False, True, False, 0),
    "in and out": (True, True, False, 0),
    "pool": (True, True, True, 0),
    "pool, padding": (True, True, True, 1),
    "empty pool": (False, False, True, 1),
}
AXES: dict[str, tuple] = {
    "gate": tuple(GATES),
    "beta": ("logit", "2 sigmoid", "value"),
    "l2norm": (True, False),
    "scale": (None, 0.7),
    "dtype": ("bfloat16", "float16", "float32"),
    "g_dtype": ("bfloat16", "float16", "float32"),
    "beta_dtype": ("bfloat16", "float32"),
    "param_dtype": ("float32", "bfloat16"),
    "state": tuple(STATES),
    "state_dtype": ("float32", "bfloat16"),
    "v_first": (True, False),
    "packed": (True, False),
    "heads": ((1, 1), (2, 2), (1, 2)),
    "sizes": ((32, 32), (64, 32), (16, 64), (40, 24)),
    "gates": ("bench", "init", "weak"),
    "keys": ("random", "near-collinear"),
    "layout": (None, "packed-projection", "padded-heads", "heads-first", "every-second-token", "offset",
               "int64-indices", "pool-with-gaps"),
    "values": (None, "cut-off-gates", "open-gates", "mixed-gates", "sudden-gates", "repeated-keys", "tiny-keys",
               "extreme-betas", "large-state"),
    "lengths": ("one", "edges", "even"),
}  # fmt: skip
# What a step has beside those of decode: width and bias; dtypes of weights, of states and of the norm's weight.
STEP_AXES: dict[str, tuple] = {
    "conv": ((4, False), (3, True), (2, False), (0, False)),
    "part_dtypes": (("bfloat16", "bfloat16", "bfloat16"), ("float32", "float32", "float32"),
                    ("float16", "bfloat16", "float32")),
    "tokens_first": (True, False),
    "norm": (True, False),
}  # fmt: skip
_GATE_AXES = ("gate", "g_dtype", "param_dtype", "packed", "heads", "sizes", "gates", "layout", "values", "lengths")
_GATE_VALUES = (None, "cut-off-gates", "open-gates", "mixed-gates", "sudden-gates", "strong-gates")
LENGTHS = {
    Op.PREFILL: {"one": (65,), "edges": (1, 0, 17), "even": (20, 20)},
    Op.DECODE: {"one": (5,), "edges": (1, 0, 3, 2), "even": (1, 1)},
    Op.STEP: {"one": (5,), "edges": (1, 0, 3, 2), "even": (1, 1)},
    Op.GATE: {"one": (65,), "edges": (1, 0, 17), "even": (20, 20)},
}
# What an axis sets, by the names in `kdacli.verify.cases.spec`, where that is not its own name alone.
_FIELDS = {
    "gate": ("gate", "lower_bound"),
    "beta": ("logit", "neg_eigval"),
    "state": ("initial_state", "final_state", "pool", "padding"),
    "heads": ("H", "HV"),
    "sizes": ("K", "V"),
    "layout": ("transforms",),
    "values": ("transforms",),
    "lengths": ("lens",),
    "conv": ("conv", "conv_bias"),
    "part_dtypes": ("conv_dtype", "conv_state_dtype", "norm_dtype"),
}
_SHOWN = 4  # pairs told of a case


def pair_cases(op: Op) -> list[Case]:
    """The cover of one op as cases, each with the pairs of options that it is there for."""
    found = pairwise_cover(axes_of(op), _mend)
    cases = [case_of(f"{op}-pair-{i:02}", op, row, _why(new)) for i, (row, new) in enumerate(found, 1)]
    return [
        dataclasses.replace(case, about=tuple(_FIELDS.get(a, (a,)) + _FIELDS.get(b, (b,)) for a, _, b, _ in new))
        for case, (_, new) in zip(cases, found, strict=True)
    ]


def axes_of(op: Op) -> dict[str, tuple]:
    """The options of an op, each with its values."""
    if op is Op.STEP:
        return AXES | STEP_AXES
    return AXES if op is not Op.GATE else {name: AXES[name] for name in _GATE_AXES} | {"values": _GATE_VALUES}


def _mend(row: Row) -> Row:
    """The nearest row that is a problem: what is said twice is said once, what has no meaning is left out."""
    row = dict(row)
    if row["lengths"] == "edges":
        row["packed"] = True
    if row["gate"].startswith("activated") and "param_dtype" in row:
        row["param_dtype"] = "float32"
    if row["gate"] == "activated, bound -5" and row["values"] in ("cut-off-gates", "forget-everything"):
        row["values"] = None  # they would break the promise
    if "state" not in row:
        return row | {"layout": None if row["layout"] == "pool-with-gaps" else row["layout"]}
    initial, _, pool, _ = STATES[row["state"]]
    if not (initial or pool):
        row["state_dtype"] = "float32"
        row["layout"] = None if row["layout"] == "pool-with-gaps" else row["layout"]
    if not initial and row["values"] == "large-state":
        row["values"] = None
    if not row["l2norm"] and row["values"] in ("huge-keys", "tiny-keys"):
        row["values"] = None
    return row


def case_of(name: str, op: Op, row: Row, why: str) -> Case:
    """The case that a row of options describes, mended where they do not fit together."""
    row = _mend(row)
    row = {axis: values[0] for axis, values in (AXES | STEP_AXES).items()} | row
    gate, lower_bound = GATES[row["gate"]]
    initial, final, pool, padding = STATES[row["state"]]
    if op is Op.GATE:
        initial, final, pool, padding = False, False, False, 0
    seq_lens, (H, HV), (K, V) = LENGTHS[op][row["lengths"]], row["heads"], row["sizes"]
    options = Options(
        gate=gate,
        lower_bound=lower_bound,
        beta_is_logit=row["beta"] != "value",
        allow_neg_eigval=row["beta"] == "2 sigmoid",
        qk_l2norm=row["l2norm"],
        scale=row["scale"],
    )
    problem = Problem(
        op=op,
        seq_lens=seq_lens,
        H=H,
        HV=HV,
        K=K,
        V=V,
        packed=row["packed"],
        dtype=row["dtype"],
        g_dtype=row["g_dtype"],
        beta_dtype=row["beta_dtype"],
        param_dtype=row["param_dtype"],
        state_dtype=row["state_dtype"],
        initial_state=initial,
        final_state=final,
        pool_slots=len(seq_lens) + 2 if pool else None,
        padding=padding,
        state_v_first=row["v_first"],
        options=options,
        parts=_parts(row) if op is Op.STEP else None,
    )
    transforms = tuple(t for t in (row["values"], row["layout"]) if t)
    return Case(name, why, problem, row["gates"], row["keys"], transforms)


def _parts(row: Row) -> Parts:
    (width, bias), (weight, states, norm) = row["conv"], row["part_dtypes"]
    return Parts(width, bias, weight, states, row["tokens_first"], row["norm"], norm)


def _why(new: list[Pair]) -> str:
    """Of the pairs that no case before has, a few spread over the list."""
    step = max(1, len(new) // _SHOWN)
    shown = [f"{a} {_said(x)} with {b} {_said(y)}" for a, x, b, y in new[::step][:_SHOWN]]
    more = len(new) - len(shown)
    return f"pairs: {'; '.join(shown)}" + (f"; {more} more" if more else "")


def _said(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
