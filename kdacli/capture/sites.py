"""Where engines call KDA: which functions to record, and what their arguments mean where the names do not say it.

Argument names become ours by the table of aliases in `kdacli.dumps.names`; a `Site` holds only what that table cannot
know. The sources are FLA 0.6, SGLang 0.5.23 and vLLM 0.33. Imports no torch: every Python process of a captured program
reads this.
"""

import dataclasses
from collections.abc import Mapping


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
        bound_if_safe: lower_bound counts only beside a true safe_gate.
        null_slot: the slot that engines reserve for padding, beside negative ones.
        packed_qkv: the argument that holds q, k and v of one token a row, side by side.
    """

    target: str
    op: str = ""
    options: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    gate_if: str = ""
    logit_if: str = ""
    only_if: str = ""
    bound_if_safe: bool = False
    null_slot: int | None = None
    packed_qkv: str = ""


_V_FIRST = {"state_v_first": True}
_RAW = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True, **_V_FIRST}
_READY = {"use_gate_in_kernel": False, "use_beta_sigmoid_in_kernel": False, **_V_FIRST}
_FUSED_GATE = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": False, **_V_FIRST}

_SGLANG = "sglang.srt.layers.attention.linear.kda_backend:KDAKernelDispatcher"
_SGLANG_OPS = "sglang.kernels.ops.attention.fla"
_VLLM_K3 = "vllm.models.kimi_k3"
_VLLM_OPS = ("vllm.third_party.flash_linear_attention.ops.kda", "vllm.model_executor.layers.fla.ops.kda")

ENGINES: dict[str, tuple[Site, ...]] = {
    "fla": (
        Site("fla.ops.kda:chunk_kda", "prefill"),
        Site("fla.ops.kda:fused_recurrent_kda"),
        Site("fla.ops.kda.fused_recurrent:fused_recurrent_kda_fwd"),
    ),
    # The dispatcher sees every backend's calls; its extend takes ready betas unless beta_is_raw.
    "sglang": (
        Site(
            f"{_SGLANG}.extend",
            "prefill",
            {"use_qk_l2norm_in_kernel": True, **_V_FIRST},
            gate_if="A_log",
            logit_if="beta_is_raw",
        ),
        Site(f"{_SGLANG}.decode", "decode", _RAW),
        Site(f"{_SGLANG}.packed_decode", "decode", _RAW, packed_qkv="mixed_qkv"),
        Site(f"{_SGLANG_OPS}.kda:chunk_kda", "prefill", _V_FIRST, gate_if="A_log", logit_if="beta_is_raw"),
        Site(
            f"{_SGLANG_OPS}.fused_recurrent:fused_recurrent_kda_packed_decode", "decode", _RAW, packed_qkv="mixed_qkv"
        ),
        Site(
            f"{_SGLANG_OPS}.fused_sigmoid_gating_recurrent:fused_sigmoid_gating_delta_rule_update",
            options=_RAW,
            only_if="is_kda",
        ),
        Site("sglang.jit_kernel.cutedsl_kda:cutedsl_fused_sigmoid_gating_kda_update", "decode", _RAW),
    ),
    # Slot 0 is vLLM's null block.
    "vllm": (
        *(
            site
            for module in _VLLM_OPS
            for site in (
                Site(f"{module}:chunk_kda", "prefill", _READY),
                Site(f"{module}:chunk_kda_with_fused_gate", "prefill", _FUSED_GATE, bound_if_safe=True),
                Site(
                    f"{module}:fused_recurrent_kda",
                    options=_V_FIRST,
                    gate_if="compute_gate",
                    logit_if="sigmoid_beta",
                    null_slot=0,
                ),
            )
        ),
        *(
            site
            for module in (f"{_VLLM_K3}.nvidia.ops.third_party.kda", f"{_VLLM_K3}.amd.ops.third_party.kda")
            for site in (
                Site(f"{module}:chunk_kda_with_fused_gate", "prefill", {**_RAW, "use_qk_l2norm_in_kernel": True}),
                Site(f"{module}:fused_recurrent_kda", options=_RAW, null_slot=0),
                Site(
                    f"{module}:fused_recurrent_kda_packed_decode",
                    "decode",
                    _RAW,
                    null_slot=0,
                    packed_qkv="mixed_qkv",
                ),
            )
        ),
        Site(f"{_VLLM_K3}.nvidia.kda:_flashkda_prefill", "prefill", _RAW),
    ),
}

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
