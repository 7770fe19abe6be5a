"""KDA kernels. Importing this costs nothing: its functions bring in torch and triton when they are first named."""

import importlib

__version__ = "0.1.0"  # as kdacli's

_EXPORTS = {
    "Checkpoints": "kda_kernels.api",
    "ContextParallel": "kda_kernels.parallel",
    "Convolution": "kda_kernels.api",
    "GatedNorm": "kda_kernels.api",
    "convolution_halo": "kda_kernels.parallel",
    "checkpoint_alignment": "kda_kernels.api",
    "prefill_workspace_bytes": "kda_kernels.api",
    "chunk_kda": "kda_kernels.api",
    "chunk_kda_fwd": "kda_kernels.api",
    "fused_recurrent_kda": "kda_kernels.api",
    "fused_recurrent_kda_fwd": "kda_kernels.api",
    "kda_conv": "kda_kernels.api",
    "kda_decode": "kda_kernels.api",
    "kda_prefill": "kda_kernels.api",
    "kda_step": "kda_kernels.api",
    "kda_segment_summary": "kda_kernels.segments",
    "kda_gate_chunk_cumsum": "kda_kernels.triton.gate",
    "chunk_local_cumsum": "kda_kernels.triton.gate",
    "prepare_chunk_indices": "kda_kernels.triton.chunk_indices",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
