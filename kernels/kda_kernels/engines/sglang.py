"""SGLang, 0.5.23: the entry point of `sglang.srt.plugins`, which adds "kda" to the --linear-attn-...-backend choices.

Without such a choice nothing changes. With one, SGLang's dispatcher of KDA kernels is built with ours for the phases
that chose it.
"""

import importlib
import logging
import sys
import typing
from typing import Any

from kda_kernels.engines.patches import Patches
from kda_kernels.engines.sites import Site, reasons

NAME = "kda"

_CALLS, _ALL = "kda_kernels.engines.sglang_calls", "all with KDA layers"
_BACKEND = "sglang.srt.layers.attention.linear.kda_backend"
_DISPATCHER = f"{_BACKEND}:KDAKernelDispatcher"
_FUSED = (
    "linear.fused_kda_conv_recurrent_verify:fused_kda_conv_gating_verify",
    "kda_decode_mtp:fused_kda_decode_mtp_dspark",
)
_UNCALLED = "SGLang does not call it for another backend than its own: speculation goes through target_verify"
STEP = "sglang.kernels.ops.attention.kda_fused_decode:kda_fused_decode"


def _phase(what: str, method: str) -> Site:
    return Site(_ALL, what, f"{_DISPATCHER}.{method}", f"{_CALLS}:KdaKernel.{method}", patched=False)


SITES = (
    Site(_ALL, "choice of kernels", f"{_DISPATCHER}.__init__", f"{_CALLS}:build_dispatcher"),
    Site(_ALL, "prompts' convolution", f"{_BACKEND}:KDAAttnBackend._convolve_prefill", f"{_CALLS}:convolve_prefill"),
    _phase("decode", "packed_decode"),
    _phase("decode", "decode"),
    _phase("prefill, checkpoints", "extend"),
    _phase("speculation", "target_verify"),
    Site(_ALL, "fused step", STEP, f"{_CALLS}:kda_fused_decode", patched=False),
    *(Site(_ALL, "fused speculation", f"sglang.kernels.ops.attention.{name}", why_not=_UNCALLED) for name in _FUSED),
)

log = logging.getLogger("sglang.kda")
_patches: list[Patches] = []


def install() -> None:
    """Adds the choice; called by SGLang in each of its processes. Why it cannot is logged, once per process."""
    if _patches:
        return
    reason = next((reason for site, reason in reasons(SITES).items() if site.patched and site.ours and reason), None)
    if reason is None:
        try:
            _add_choice()
        except (ImportError, AttributeError) as error:
            reason = f"it takes no further choice: {error}"
    if reason is not None:
        log.warning("kda: no backend %s: %s", NAME, reason)
        return
    targets = [site.target for site in SITES if site.patched and site.ours]
    _patches.append(Patches(targets, _wrap, lambda target: log.warning("kda: %s is no function", target)))
    _patches[0].install()


def _add_choice() -> None:
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    choices.add_linear_attn_kernel_backend_choices([NAME])
    if (settings := sys.modules.get("sglang.srt.server_args")) is None:
        return
    # Loaded before (python -m sglang.launch_server): the verify flag has these choices and one more, in a list of its
    # own, which was made then.
    for name, hint in typing.get_type_hints(settings.ServerArgs, include_extras=True).items():
        for argument in getattr(hint, "__metadata__", ()):
            listed = getattr(argument, "choices", None)
            if name.startswith("linear_attn_") and isinstance(listed, list) and NAME not in listed:
                listed.append(NAME)


def _wrap(original: Any, target: str) -> Any:
    module, _, name = next(site.ours for site in SITES if site.target == target).partition(":")
    ours = getattr(importlib.import_module(module), name)

    def call(self: Any, *given: Any, **named: Any) -> Any:
        return ours(self, *given, original=original, **named)

    return call
