"""Cases that hold every two options of the CuTe decode kernel together: what it is compiled for, and judged on."""

import dataclasses
from typing import NamedTuple

import torch
from decode_inputs import DEVICE, GIVEN, SAFE, make, with_pool, with_state

from kda_kernels.cute.decode.config import DecodeConfig
from kda_kernels.problem import Gate, Options
from kda_kernels.tensors import Inputs
from kdacli.verify.cases.cover import Row, pairwise_cover

OPTIONS = {
    "softplus": Options(),
    "softplus, 2 sigmoid": Options(allow_neg_eigval=True),
    "safe": SAFE,
    "safe, no norm": Options(Gate.SAFE, -2.0, beta_is_logit=False, qk_l2norm=False, scale=0.2),
    "given": GIVEN,
}
TOKENS = {"one": (1, None), "three": (3, None), "packed": (1, [2, 1, 0, 3, 1])}  # T and lens of `make`; 5 sequences

AXES = {
    "options": tuple(OPTIONS),
    "tokens": tuple(TOKENS),
    "state": ("pool float32", "pool bfloat16", "plain float32", "plain bfloat16", "none"),
    "sizes": ((128, 128), (64, 128), (96, 48), (32, 32), (256, 256)),  # K, V
    "heads": ((2, 2), (1, 3)),  # H, HV
    "dtype": ("bfloat16", "float16", "float32"),
    "g": ("bfloat16", "float32"),
    "beta": ("bfloat16", "float32"),
    "A_log": ("float32", "bfloat16"),
    "dt_bias": ("float32", "bfloat16", None),
    "index": ("int32", "int64"),
    "token_states": (None, "float32", "bfloat16"),
    "batch": ("few", "many"),  # whose schedule it is
}
HEADS_IN_ALL = {"few": 1, "many": 10**6}
SLOTS = [4, -1, 0, 6, 2]
SMS = 132


class Case(NamedTuple):
    """One row of the cover as tensors."""

    inputs: Inputs
    token_states: torch.Tensor | None
    config: DecodeConfig


def rows() -> list[Row]:
    return [row for row, _ in pairwise_cover(AXES, _mend)]


def name(row: Row) -> str:
    return " ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x).replace(" ", "-") for x in row.values())


def case_of(row: Row) -> Case:
    """The tensors of a row; the pool has NaN in unused slots and in the gaps between slots."""
    (K, V), (H, HV), (T, lens) = row["sizes"], row["heads"], TOKENS[row["tokens"]]
    inputs = make(
        N=5, T=T, H=H, HV=HV, K=K, V=V, lens=lens, options=OPTIONS[row["options"]], dtype=_dtype(row["dtype"])
    )
    inputs = dataclasses.replace(inputs, g=inputs.g.to(_dtype(row["g"])), beta=inputs.beta.to(_dtype(row["beta"])))
    if inputs.A_log is not None:
        bias = None if row["dt_bias"] is None else inputs.dt_bias.to(_dtype(row["dt_bias"]))
        inputs = dataclasses.replace(inputs, A_log=inputs.A_log.to(_dtype(row["A_log"])), dt_bias=bias)
    if inputs.cu_seqlens is not None:
        inputs = dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens.to(_dtype(row["index"])))
    kind, _, dtype = row["state"].partition(" ")
    if kind == "pool":
        inputs = with_pool(inputs, SLOTS, gap=64, dtype=_dtype(dtype), index_dtype=_dtype(row["index"]))
    elif kind == "plain":
        inputs = with_state(inputs, _dtype(dtype))
    token_states = None
    if row["token_states"] is not None:
        shape = (*inputs.q.shape[:2], HV, V, K)
        token_states = torch.empty(shape, dtype=_dtype(row["token_states"]), device=DEVICE)
    return Case(inputs, token_states, _config(inputs, token_states, row["batch"]))


def unlike(inputs: Inputs) -> dict[str, Inputs]:
    """Calls with the same q as `inputs`, one token of 3 sequences in a pool, that each need a function of their own."""

    def but(**fields):
        return dataclasses.replace(inputs.fresh(), **fields)

    options, plain = inputs.options, inputs.state[inputs.state_indices.long()]
    return {
        "as it is": inputs,
        "no norm": but(options=dataclasses.replace(options, qk_l2norm=False), k=inputs.k / inputs.k.shape[-1] ** 0.5),
        "safe": but(options=SAFE),
        "state in bf16": but(state=inputs.state.bfloat16()),
        "no dt_bias": but(dt_bias=None),
        "plain": but(state=plain, state_indices=None),
        "g in fp32": but(g=inputs.g.float()),
        "fewer rows": but(v=inputs.v[..., :16].contiguous(), state=inputs.state[:, :, :16].contiguous()),
        "beta in fp32": but(beta=inputs.beta.float()),
        "A_log in bf16": but(A_log=inputs.A_log.bfloat16()),
        "dt_bias in bf16": but(dt_bias=inputs.dt_bias.bfloat16()),
        "int64 indices": but(state_indices=inputs.state_indices.long()),
        "fp16": but(**{name: getattr(inputs, name).half() for name in ("q", "k", "v")}),
        "2 sigmoid": but(options=dataclasses.replace(options, allow_neg_eigval=True)),
        "beta given": but(options=dataclasses.replace(options, beta_is_logit=False), beta=inputs.beta.sigmoid()),
        "plain, not wanted": but(state=plain, state_indices=None, output_final_state=False),
        "no state": but(state=None, state_indices=None),
    }


def _config(inputs: Inputs, token_states: torch.Tensor | None, batch: str) -> DecodeConfig:
    """What an H100 would take if there were so many heads in all."""
    K, V = inputs.q.shape[3], inputs.v.shape[3]
    states = [x for x in (inputs.state, token_states) if x is not None]
    wide = any(x.dtype == torch.float32 for x in states) or (inputs.state is None and inputs.output_final_state)
    one_token = inputs.cu_seqlens is None and inputs.q.shape[1] == 1
    return DecodeConfig.choose(HEADS_IN_ALL[batch], K, V, K % 64 == 0 and not wide, one_token, SMS)


def _mend(row: Row) -> Row:
    """The nearest row that makes sense."""
    row = dict(row)
    if row["options"] == "given":
        row |= {"A_log": "float32", "dt_bias": None}
    if row["state"] == "none" and row["tokens"] != "packed":
        row["index"] = "int32"
    return row


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
