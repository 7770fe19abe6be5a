"""vLLM, 0.33.0: the entry point of `vllm.general_plugins`, and what it replaces where KDA_VLLM=1 is set.

Functions are replaced in the modules that hold them, as soon as something imports those; nothing of vLLM is imported
for it, nor torch.
"""

import importlib
import logging
from typing import Any

from kda_kernels import environment
from kda_kernels.engines.patches import Patches
from kda_kernels.engines.sites import Site, reasons

VARIABLE = "KDA_VLLM"

_CALLS = "kda_kernels.engines.vllm_calls"
_K3, _GLM, _LING = "Kimi K3 and Kimi-Linear", "GLM-5.3-Flash", "Ling-3.0-flash"
_K3_OPS = "vllm.models.kimi_k3.nvidia.ops.third_party.kda"
_GLM_OPS = "vllm.models.glm5next.nvidia.ops.third_party.kda"
_LING_OPS = "vllm.third_party.flash_linear_attention.ops.kda"
_PREPARED = "vllm.models.kimi_k3.nvidia.specialized_decode.cutedsl.kda.prepared"
_CHECKPOINTS = "vllm.model_executor.layers.mamba.kda_checkpoint:kda_prefill_checkpoint_alignment"
_GLM_PREFILL = "vllm.models.glm5next.common.kda:Glm5NextLinearAttention._flashkda_prefill"

_CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"  # of other models, too

_RECORDS = "it keeps records that a later call folds into the states"
_BLACKWELL = "FlashInfer's, for Blackwell"


def _convolution(models: str, module: str) -> Site:
    ours = f"{_CALLS}:causal_conv1d_fn"
    return Site(models, "prompts' convolution", f"{module}:causal_conv1d_fn", ours, defined=_CONV)


SITES = (
    Site(_K3, "prefill", "vllm.models.kimi_k3.nvidia.kda:_flashkda_prefill", f"{_CALLS}:k3_flashkda_prefill"),
    Site(_K3, "prefill", f"{_K3_OPS}:chunk_kda_with_fused_gate", f"{_CALLS}:k3_chunk_kda_with_fused_gate"),
    _convolution(_K3, "vllm.models.kimi_k3.nvidia.kda"),
    _convolution(_K3, "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn"),
    Site(_K3, "decode", f"{_K3_OPS}:fused_recurrent_kda_packed_decode", f"{_CALLS}:k3_packed_decode"),
    Site(_K3, "speculation", f"{_K3_OPS}:fused_recurrent_kda", f"{_CALLS}:k3_fused_recurrent_kda"),
    Site(_K3, "checkpoints", _CHECKPOINTS, f"{_CALLS}:checkpoint_alignment"),
    Site(_K3, "fused step", "vllm._custom_ops:fused_kda_decode", f"{_CALLS}:fused_kda_decode"),
    Site(_K3, "prefill", "vllm.models.kimi_k3.nvidia.kda:_flashinfer_kda_prefill", why_not=_BLACKWELL),
    Site(_K3, "speculation", "vllm.models.kimi_k3.nvidia.ops.recoverssm:kda_recoverssm_verify", why_not=_RECORDS),
    Site(_K3, "fused step", "vllm.utils.flashinfer:flashinfer_fused_kda_decode", why_not=_BLACKWELL),
    Site(_K3, "fused step, drafts", "vllm.utils.flashinfer:flashinfer_packed_fused_kda_decode", why_not=_BLACKWELL),
    Site(_K3, "fused step", f"{_PREPARED}:PreparedKda.run", why_not="it projects the gate too, on Blackwell"),
    Site(_GLM, "prefill", _GLM_PREFILL, f"{_CALLS}:glm_flashkda_prefill"),
    Site(_GLM, "prefill", f"{_GLM_OPS}:chunk_kda_with_fused_gate", f"{_CALLS}:glm_chunk_kda_with_fused_gate"),
    _convolution(_GLM, "vllm.models.glm5next.common.kda"),
    Site(_GLM, "decode, speculation", f"{_GLM_OPS}:fused_recurrent_kda", f"{_CALLS}:glm_fused_recurrent_kda"),
    Site(_GLM, "checkpoints", _CHECKPOINTS, f"{_CALLS}:checkpoint_alignment"),
    Site(_LING, "prefill", f"{_LING_OPS}:chunk_kda", f"{_CALLS}:ling_chunk_kda"),
    _convolution(_LING, "vllm.model_executor.models.bailing_moe_v3"),
    Site(_LING, "decode", f"{_LING_OPS}:fused_recurrent_kda", f"{_CALLS}:glm_fused_recurrent_kda"),
    Site(_LING, "speculation", f"{_LING_OPS}:fused_recurrent_kda_fwd", f"{_CALLS}:ling_fused_recurrent_kda_fwd"),
)

log = logging.getLogger("vllm.kda")  # vLLM shows what its own loggers say, and those below them
_patches: list[Patches] = []


def install() -> None:
    """Puts ours in place of what fits, where KDA_VLLM=1; called by vLLM in each of its processes, any number of times.

    What does not fit is logged, once per process, and left as it is.
    """
    if environment.read(VARIABLE) != "1" or _patches:
        return
    ours: dict[str, str] = {}
    for site, reason in reasons(SITES).items():
        if reason is None:
            ours[site.target] = site.ours
        elif site.ours:
            log.warning("kda: %s (%s) is not replaced: %s", site.target, site.models, reason)

    def wrap(original: Any, target: str) -> Any:
        module, _, name = ours[target].partition(":")
        log.info("kda: %s is replaced", target)
        return getattr(importlib.import_module(module), name)

    def missing(target: str) -> None:
        log.warning("kda: %s is no function", target)

    _patches.append(Patches(ours, wrap, missing, only_there=[site.target for site in SITES if site.defined]))
    _patches[0].install()
