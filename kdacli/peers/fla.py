"""What the kernels of flash-linear-attention (FLA) have in common: can they run here, and how FLA is told the options.

Written against FLA 0.6.0. Nothing is set globally, and `fla` is imported only when one of its kernels runs.
"""

import importlib.metadata
import importlib.util
import re
from typing import Any

from kda_kernels.problem import SAFE_BOUND, Gate
from kda_kernels.tensors import Inputs
from kdacli.peers import here

OLDEST = (0, 6)  # the first with state_v_first, grouped value heads and beta logits in all of its KDA functions


def unsupported_here() -> str | None:
    """Why nothing of FLA can run on this machine; None if it can."""
    if importlib.util.find_spec("fla") is None:
        return "fla is not installed: pip install flash-linear-attention"
    version = _version()
    if version is not None and version < OLDEST:
        have, need = (".".join(map(str, v)) for v in (version, OLDEST))
        return f"fla is {have}: {need} or newer is needed, pip install -U flash-linear-attention"
    return here.no_gpu("FLA's kernels")


def _version() -> tuple[int, int] | None:
    """(major, minor) as installed; None for a copy without metadata."""
    for distribution in ("fla-core", "flash-linear-attention"):
        try:
            numbers = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
        if numbers:
            return int(numbers[1]), int(numbers[2])
    return None


def options_of(inputs: Inputs) -> dict[str, Any]:
    """The options of `inputs` as FLA's keyword arguments."""
    options = inputs.options
    raw = options.gate is not Gate.NONE
    return {
        "A_log": inputs.A_log,
        "dt_bias": inputs.dt_bias,
        "scale": options.scale,
        "use_qk_l2norm_in_kernel": options.qk_l2norm,
        "use_gate_in_kernel": raw,
        "use_beta_sigmoid_in_kernel": options.beta_is_logit,
        "allow_neg_eigval": options.allow_neg_eigval,
        "lower_bound": options.lower_bound if raw else None,
        "state_v_first": inputs.state_v_first,
        "cu_seqlens": inputs.cu_seqlens,
    }


def safe_gate(inputs: Inputs) -> bool:
    """Whether FLA may take the gates as bounded, which makes its chunk kernels faster."""
    bound = inputs.options.lower_bound
    return bound is not None and bound >= SAFE_BOUND
