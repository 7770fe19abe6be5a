"""The one table of aliases: what any engine calls a tensor or an option of a KDA call, and what kda calls it.

Sources of the names: FLA (`initial_state`, `ht`), SGLang (`initial_state_source`, `cache_indices`, `h0_indices`), vLLM
(`ssm_state`, `ssm_state_indices`, `query_start_loc`, `core_attn_out`) and their layers (`a`, `raw_g`, `b`). Ours come
first in each row. Names are matched as they are, case included: `A` (often -exp(A_log)) is not `a` (the raw gate).
"""

import enum
from collections.abc import Iterable, Mapping
from typing import Any

from kda_kernels.errors import InputError

Aliases = Mapping[str, tuple[str, ...]]

_STATE = ("state", "initial_state", "h0", "h0_source", "initial_state_source", "recurrent_state", "state_pool")
_SSM = ("ssm_state", "ssm_states", "temporal_state")

INPUTS: Aliases = {
    "q": ("q", "query", "queries"),
    "k": ("k", "key", "keys"),
    "v": ("v", "value", "values"),
    "g": ("g", "raw_g", "a", "gate", "raw_gate", "forget_gate"),
    "beta": ("beta", "b", "betas", "raw_beta"),
    "A_log": ("A_log", "a_log"),
    "dt_bias": ("dt_bias", "g_bias", "gate_bias"),
    "state": (*_STATE, *_SSM),
    "state_indices": (
        "state_indices",
        "ssm_state_indices",
        "initial_state_indices",
        "h0_indices",
        "cache_indices",
        "slot_ids",
        "slot_indices",
    ),
    "cu_seqlens": ("cu_seqlens", "cu_seq_lens", "query_start_loc", "offsets"),
    "has_initial_state": ("has_initial_state",),
    "num_accepted_tokens": ("num_accepted_tokens",),
    "token_states": ("token_states", "intermediate_states_buffer", "intermediate_ssm"),
    "token_state_indices": ("token_state_indices", "intermediate_state_indices"),
    "checkpoint_states": ("checkpoint_states",),
    "checkpoint_rows": ("checkpoint_rows",),
    "checkpoint_offsets": ("checkpoint_offsets",),
    "state_scales": ("state_scales", "state_scale"),
    "rounding_seed": ("rounding_seed", "rand_seed"),
    "conv_weight": ("conv_weight",),
    "conv_bias": ("conv_bias",),
    "conv_states": ("conv_states",),
    "conv_indices": ("conv_indices",),
    "norm_gate": ("norm_gate",),
    "norm_weight": ("norm_weight",),
}

OUTPUTS: Aliases = {
    "o": ("o", "out", "output", "core_attn_out", "attn_out"),
    "final_state": (
        "final_state",
        "ht",
        "h_t",
        "state_after",
        "state_out",
        "new_state",
        "recurrent_state_after",
        "ssm_state_after",
        "ssm_states_after",
        "state_pool_after",
    ),
}

# Inside a section of its own, an output may carry the name of the state it replaced.
OUTPUTS_ALONE: Aliases = {
    "o": OUTPUTS["o"],
    "final_state": (*OUTPUTS["final_state"], *_STATE, *_SSM),
    "token_states": INPUTS["token_states"],
    "checkpoints": ("checkpoints",),
    "conv_states": INPUTS["conv_states"],
    "state_scales": INPUTS["state_scales"],
}

# Where a call writes them: an output that stands alone is also the memory that it was written to.
ROOM = {"token_states": "token_states", "checkpoints": "checkpoint_states"}

OPTIONS: Aliases = {
    "op": ("op",),
    "use_gate_in_kernel": ("use_gate_in_kernel", "compute_gate"),
    "lower_bound": ("lower_bound", "gate_lower_bound"),
    "safe_gate": ("safe_gate", "use_safe_gate"),
    "use_qk_l2norm_in_kernel": ("use_qk_l2norm_in_kernel", "qk_l2norm"),
    "use_beta_sigmoid_in_kernel": ("use_beta_sigmoid_in_kernel", "beta_is_logit", "beta_is_raw", "sigmoid_beta"),
    "allow_neg_eigval": ("allow_neg_eigval",),
    "scale": ("scale", "softmax_scale"),
    "state_v_first": ("state_v_first", "transpose_state_layout"),
    "output_final_state": ("output_final_state",),
    "update_state": ("update_state",),
    "null_slot": ("null_slot",),
    "batch_invariant": ("batch_invariant",),
    "checkpoint_every": ("checkpoint_every",),
    "conv_tokens_first": ("conv_tokens_first",),
    "conv_rounded": ("conv_rounded",),
    "norm_eps": ("norm_eps",),
}

REQUIRED = ("q", "k", "v", "g", "beta")

# Sections of a nested dump.
SECTIONS: Aliases = {
    "inputs": ("inputs", "input", "kwargs"),
    "outputs": ("outputs", "output", "results"),
    "options": ("options", "config"),
    "meta": ("meta", "metadata"),
}


class Section(enum.Enum):
    """Where in a dump a name was found, which decides what it can mean."""

    FLAT = (INPUTS, OUTPUTS, OPTIONS)
    INPUTS = (INPUTS, OPTIONS)
    OUTPUTS = (OUTPUTS_ALONE,)
    OPTIONS = (OPTIONS,)


def ours(name: str, aliases: Aliases) -> str | None:
    """kda's name for `name`, or None if the table has none."""
    return next((key for key, names in aliases.items() if name in names), None)


def rename(found: Mapping[str, Any], section: Section) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Splits what a section holds into (what the table does not know, {our name: (its name there, value)}).

    Raises:
        InputError: two names in it mean the same thing.
    """
    known: dict[str, tuple[str, Any]] = {}
    rest = {}
    for name, value in found.items():
        key = next((k for table in section.value if (k := ours(name, table))), None)
        if key is None:
            rest[name] = value
        elif key in known:
            raise InputError(f"{known[key][0]} and {name} both mean {key}: keep the one that the call used")
        else:
            known[key] = (name, value)
    return rest, known


def listed(found: Iterable[str], most: int = 16) -> str:
    """The first of some names, for a message of one line."""
    names = sorted(found)
    return ", ".join([name[:40] for name in names[:most]] + (["..."] if len(names) > most else []))


def missing(key: str, have: Iterable[str]) -> InputError:
    """The error for a tensor that is not there: which names would do, and what there is instead."""
    also = f" (or {', '.join(INPUTS[key][1:])})" if INPUTS[key][1:] else ""
    return InputError(f"{key}{also} is missing: the dump holds {listed(have) or 'no tensors'}")
