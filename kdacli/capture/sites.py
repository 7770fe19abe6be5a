"""Where engines call KDA: which functions to record, and what their arguments mean where the names do not say it.

Argument names become ours by the table of aliases in `kdacli.dumps.names`; a `Site` holds only what that table cannot
know. The sources are FLA 0.6, SGLang 0.5.23 and vLLM 0.33.0; tests/test_capture_sites.py holds the table against them.
Imports no torch: every Python process of a captured program reads this.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Site:
    """One function that computes KDA.

    Attributes:
        target: "module:function" or "module:Class.method".
        op: decode or prefill; "" leaves it to be inferred from the lengths.
        options: what the call means whatever its arguments are, by FLA's names.
        gate_if: the argument whose presence means that g is raw; "" if `options` or an argument says so.
        logit_if: the argument whose truth means that beta is a logit.
        only_if: the argument that must be true for the call to be KDA at all.
        not_if: arguments that make the call one that a dump cannot hold, where they are given, and why.
        bound_if_safe: lower_bound counts only beside a true safe_gate.
        null_slot: the slot that engines reserve for padding, beside negative ones.
        packed_qkv: the argument that holds q, k and v of one token per row, side by side.
        own: {argument's name: attribute of self} of what a method does not receive.
        ignored: arguments that are no part of the call, whatever they are called.
        checkpoints: (where states inside the prompts go, at which position of each sequence, tokens a position).
        step: how its arguments beside the recurrence are arranged, see `kdacli.capture.steps`; "" where it has none.
        seen_only: why its calls are counted and not recorded; "" if they are recorded.
        since, until: the first release known to have it, and the first known to have it no more; "" where not known.
    """

    target: str
    op: str = ""
    options: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    gate_if: str = ""
    logit_if: str = ""
    only_if: str = ""
    not_if: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bound_if_safe: bool = False
    null_slot: int | None = None
    packed_qkv: str = ""
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    checkpoints: tuple[str, str, int] | None = None
    step: str = ""
    seen_only: str = ""
    since: str = ""
    until: str = ""

    @property
    def releases(self) -> str:
        """Those known to have it, in words; "" where none is known."""
        return " ".join([f"from {self.since} on"] * bool(self.since) + [f"before {self.until}"] * bool(self.until))


_V_FIRST = {"state_v_first": True}
_RAW = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True, **_V_FIRST}
_READY = {"use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False, **_V_FIRST}
_FUSED_GATE = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": False, **_V_FIRST}

_PROJECTED = "a fused step that also projects its gate, which a dump does not hold"
_RECORDS = "its states are kept as records that a later call folds in, which a dump does not hold"
_TREE = {"retrieve_parent_token": "a tree of drafts"}
_FUSED_ACCEPT = {"fused_accept_state_indices": "its states come from the drafts' own buffer"}
_OUTPUTS = ("final_state", "workspace", "seq_order")


def _kda() -> tuple[Site, ...]:
    """Ours, where an engine calls them itself."""
    ranks = {"group": "its tokens are spread over the ranks of a group"}
    return (
        Site("kda_kernels.api:kda_decode", "decode", _V_FIRST),
        Site("kda_kernels.api:kda_step", "step", _V_FIRST, packed_qkv="mixed_qkv", step="kda"),
        Site("kda_kernels.api:kda_prefill", "prefill", _V_FIRST, not_if=ranks, step="kda"),
    )


def _fla() -> tuple[Site, ...]:
    return (
        Site("fla.ops.kda:chunk_kda", "prefill"),
        Site("fla.ops.kda:fused_recurrent_kda"),
        Site("fla.ops.kda.fused_recurrent:fused_recurrent_kda_fwd"),
    )


def _sglang() -> tuple[Site, ...]:
    """The dispatcher sees every backend's calls; its extend takes ready betas unless beta_is_raw."""
    dispatcher = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher"
    ops = "sglang.kernels.ops.attention"
    now: dict[str, Any] = {"since": "0.5.23"}
    normed = {"use_qk_l2norm_in_kernel": True, **_V_FIRST}
    packed: dict[str, Any] = {"op": "decode", "options": _RAW, "packed_qkv": "mixed_qkv"}
    update = "fused_sigmoid_gating_delta_rule_update"
    gating: dict[str, Any] = {"options": _RAW, "only_if": "is_kda", "not_if": _TREE}
    cutedsl = "cutedsl_fused_sigmoid_gating_kda_update"
    verify = {**_RAW, "update_state": False}
    kept: dict[str, Any] = {"checkpoints": ("track_state", "track_chunk_idx", 64)}
    fused_verify = "linear.fused_kda_conv_recurrent_verify:fused_kda_conv_gating_verify"
    drafts: dict[str, Any] = {"op": "step", "options": verify, "not_if": {"replayssm_rawv": _RECORDS}}
    return (
        Site(f"{dispatcher}.extend", "prefill", normed, gate_if="A_log", logit_if="beta_is_raw", **kept, **now),
        Site(f"{dispatcher}.decode", "decode", _RAW, **now),
        Site(f"{dispatcher}.packed_decode", **packed, not_if={"replayssm_d": _RECORDS}, **now),
        Site(f"{dispatcher}.target_verify", "decode", verify, not_if={**_TREE, **_FUSED_ACCEPT}, **now),
        Site(f"{ops}.fla.kda:chunk_kda", "prefill", _V_FIRST, gate_if="A_log", logit_if="beta_is_raw", **kept, **now),
        Site(f"{ops}.fla.fused_recurrent:fused_recurrent_kda_packed_decode", **packed, **now),
        Site(f"{ops}.linear.fused_sigmoid_gating_recurrent:{update}", **gating, **now),
        Site(f"{ops}.fla.fused_sigmoid_gating_recurrent:{update}", **gating, until="0.5.23"),
        Site(f"{ops}.cutedsl_kda:{cutedsl}", "decode", _RAW, **now),
        Site(f"sglang.jit_kernel.cutedsl_kda:{cutedsl}", "decode", _RAW, until="0.5.23"),
        Site(f"{ops}.kda_fused_decode:kda_fused_decode", "step", _RAW, packed_qkv="mixed_qkv", step="sglang", **now),
        Site(f"{ops}.{fused_verify}", **drafts, packed_qkv="mixed_qkv", step="sglang_verify", **now),
        Site(f"{ops}.kda_decode_mtp:fused_kda_decode_mtp_dspark", **drafts, step="sglang_mtp", **now),
    )


def _vllm() -> tuple[Site, ...]:
    """Slot 0 is vLLM's null block."""
    k3, glm = "vllm.models.kimi_k3", "vllm.models.glm5next"
    now: dict[str, Any] = {"since": "0.33.0"}
    null: dict[str, Any] = {"null_slot": 0}
    fused: dict[str, Any] = {"packed_qkv": "x", "step": "vllm", **null}
    sites = [
        Site(
            f"{k3}.nvidia.kda:_flashkda_prefill",
            "prefill",
            _RAW,
            ignored=_OUTPUTS,
            checkpoints=("checkpoint_state", "checkpoint_offsets", 1),
            **now,
        ),
        Site(f"{k3}.nvidia.kda:_flashinfer_kda_prefill", "prefill", _RAW, ignored=_OUTPUTS, **now),
        Site(
            f"{glm}.common.kda:Glm5NextLinearAttention._flashkda_prefill",
            "prefill",
            _RAW,
            own={"A_log": "A_log", "dt_bias": "dt_bias", "lower_bound": "kda_lower_bound"},
            ignored=("raw_qkv", "conv_state", "recurrent_state"),
            **now,
        ),
        Site("vllm._custom_ops:fused_kda_decode", "step", _RAW, **fused, **now),
        Site("vllm.utils.flashinfer:flashinfer_fused_kda_decode", "step", _RAW, **fused, **now),
        Site("vllm.utils.flashinfer:flashinfer_packed_fused_kda_decode", "step", _RAW, **fused, **now),
        Site(f"{k3}.nvidia.ops.recoverssm:kda_recoverssm_verify", seen_only=_RECORDS, **now),
        Site(f"{k3}.nvidia.recoverssm.kernels:CuteRecoverSSMVerify.__call__", seen_only=_RECORDS, **now),
        Site(f"{k3}.nvidia.specialized_decode.cutedsl.kda.prepared:PreparedKda.run", seen_only=_PROJECTED, **now),
    ]
    computed: dict[str, Any] = {"options": _V_FIRST, "gate_if": "compute_gate", "logit_if": "sigmoid_beta", **null}
    gate: dict[str, Any] = {"op": "prefill", "options": _FUSED_GATE, "bound_if_safe": True}
    module, before = "vllm.third_party.flash_linear_attention.ops.kda", "vllm.model_executor.layers.fla.ops.kda"
    sites += [
        Site(f"{module}:chunk_kda", "prefill", _READY, **now),
        Site(f"{module}:chunk_kda_with_fused_gate", "prefill", _FUSED_GATE, **now),
        Site(f"{module}:fused_recurrent_kda", options=_READY, **null, **now),
        Site(f"{module}:fused_recurrent_kda_fwd", options=_READY, **null, **now),
        Site(f"{before}:chunk_kda", "prefill", _READY, until="0.33.0"),
        Site(f"{before}:chunk_kda_with_fused_gate", **gate, until="0.33.0"),
        Site(f"{before}:fused_recurrent_kda", **computed, until="0.33.0"),
    ]
    for vendor in ("nvidia", "amd"):
        module = f"{glm}.{vendor}.ops.third_party.kda"
        sites += [
            Site(f"{module}:chunk_kda_with_fused_gate", **gate, **now),
            Site(f"{module}:fused_recurrent_kda", **computed, **now),
        ]
        module = f"{k3}.{vendor}.ops.third_party.kda"
        sites += [
            Site(f"{module}:chunk_kda_with_fused_gate", "prefill", _RAW, **now),
            Site(f"{module}:fused_recurrent_kda", options=_RAW, **null, **now),
            Site(f"{module}:fused_recurrent_kda_packed_decode", "decode", _RAW, packed_qkv="mixed_qkv", **null, **now),
        ]
    return tuple(sites)


ENGINES: dict[str, tuple[Site, ...]] = {"kda": _kda(), "fla": _fla(), "sglang": _sglang(), "vllm": _vllm()}

SITES = {site.target: site for sites in ENGINES.values() for site in sites}


def resolve(names: tuple[str, ...]) -> tuple[Site, ...]:
    """The sites that `names` stand for: an engine's name for all of its own, or "module:function"."""
    found: dict[str, Site] = {}
    for name in names:
        for site in ENGINES.get(name) or (SITES.get(name) or Site(name),):
            found[site.target] = site
    return tuple(found.values())


def well_formed(name: str) -> bool:
    """Whether `name` is an engine's or has the form module:function."""
    if name in ENGINES:
        return True
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *function.split(".")))
