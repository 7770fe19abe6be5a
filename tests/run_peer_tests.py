"""Runs SGLang's, cuLA's and FlashKDA's own tests of their KDA kernels against our functions.

    python tests/run_peer_tests.py sglang PATH/TO/sglang/test/registered/.../test_kda_kernels.py [pytest arguments]
    python tests/run_peer_tests.py cula PATH/TO/cuLA/tests/test_kda_decode.py
    python tests/run_peer_tests.py flashkda PATH/TO/FlashKDA/tests/test_fwd.py -k vs_fla

The files are run as they are, with modules of the peer's names in place of its own that hold ours: inputs, references
and tolerances are the peer's. Needs a GPU, and none of the peers; FlashKDA's comparisons with FLA need that. Its others
need a reference that it compiles with nvcc, and do not run here.
"""

import itertools
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import pytest
import torch

from kda_kernels import registry
from kda_kernels.api import chunk_kda_fwd, kda_decode
from kda_kernels.api import fused_recurrent_kda as ours_recurrent
from kda_kernels.checks import check_inputs
from kda_kernels.problem import CHUNK, Gate, Options
from kda_kernels.tensors import Inputs
from kda_kernels.triton.chunk_indices import prepare_chunk_indices as ours_indices
from kda_kernels.triton.gate import kda_gate_chunk_cumsum as ours_gate


def _nothing(**_: Any) -> None:
    pass


# --- SGLang


def chunk_local_cumsum(
    g: torch.Tensor, chunk_size: int, cu_seqlens: torch.Tensor | None = None, chunk_indices: Any = None
) -> torch.Tensor:
    """In plain torch: what the test compares with."""
    out = torch.empty_like(g, dtype=torch.float32)
    ends = [0, g.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for first, end in itertools.pairwise(ends):
        for at in range(first, end, chunk_size):
            out[:, at : min(at + chunk_size, end)] = g[:, at : min(at + chunk_size, end)].float().cumsum(1)
    return out


def prepare_chunk_indices(cu_seqlens: torch.Tensor, chunk_size: int) -> torch.Tensor:
    assert chunk_size == CHUNK
    return ours_indices(cu_seqlens, int(cu_seqlens[-1]))


def kda_gate_chunk_cumsum(raw_g, A_log, chunk_size, dt_bias=None, cu_seqlens=None) -> torch.Tensor:
    assert chunk_size == CHUNK
    return ours_gate(raw_g, A_log, dt_bias, cu_seqlens=cu_seqlens)


def fused_recurrent_kda(q, k, v, g, beta, initial_state, use_qk_l2norm_in_kernel, cu_seqlens):
    return ours_recurrent(
        q, k, v, g, beta, initial_state=initial_state, output_final_state=True, state_v_first=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_kda_packed_decode(
    mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices, use_qk_l2norm_in_kernel
) -> torch.Tensor:
    B, (_, HV, V, K) = len(mixed_qkv), initial_state.shape
    H = (mixed_qkv.shape[1] - HV * V) // (2 * K)
    q, k, v = mixed_qkv.split([H * K, H * K, HV * V], -1)
    return kda_decode(
        q.view(B, 1, H, K), k.view(B, 1, H, K), v.view(B, 1, HV, V), a.view(B, 1, HV, K), b.view(B, 1, HV),
        state=initial_state, state_indices=ssm_state_indices, A_log=A_log, dt_bias=dt_bias, scale=scale,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, out=out,
    )  # fmt: skip


def sglang_update(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens, use_qk_l2norm_in_kernel,
    softplus_beta, softplus_threshold, is_kda, scale=None,
) -> torch.Tensor:  # fmt: skip
    assert (softplus_beta, softplus_threshold, is_kda) == (1.0, 20.0, True)
    return kda_decode(
        q, k, v, a.reshape(*v.shape[:3], q.shape[3]), b.reshape(v.shape[:3]), state=initial_state_source,
        state_indices=initial_state_indices, A_log=A_log, dt_bias=dt_bias, scale=scale, cu_seqlens=cu_seqlens,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )  # fmt: skip


class TritonKDAKernel:
    supports_packed_decode = True

    def packed_decode(
        self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads, head_v_dim
    ) -> torch.Tensor:
        out = mixed_qkv.new_empty(len(mixed_qkv), 1, num_v_heads, head_v_dim)
        fused_recurrent_kda_packed_decode(mixed_qkv, a, b, A_log, dt_bias, scale, ssm_states, out, cache_indices, True)
        return out.transpose(0, 1)


# --- cuLA


def cula_decode(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens=None, scale=None,
    use_qk_l2norm_in_kernel=True, out=None, **_,
) -> torch.Tensor:  # fmt: skip
    if a.ndim == q.ndim - 1:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    return kda_decode(
        q, k, v, a, b, state=initial_state_source, state_indices=initial_state_indices, A_log=A_log, dt_bias=dt_bias,
        scale=scale, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, out=out,
    )  # fmt: skip


def cula_update(
    A_log, a, dt_bias, softplus_beta, softplus_threshold, q, k, v, b, initial_state_source, initial_state_indices,
    scale=None, use_qk_l2norm_in_kernel=True, cu_seqlens=None, is_kda=True, out=None, state_layout="vk",
) -> torch.Tensor:  # fmt: skip
    assert (softplus_beta, softplus_threshold, is_kda) == (1.0, 20.0, True)
    HV, V, K = v.shape[2], v.shape[3], q.shape[3]
    if initial_state_source.shape[1:] != ((HV, V, K) if state_layout == "vk" else (HV, K, V)):
        raise ValueError(f"State layout mismatch: {initial_state_source.shape}")
    options = Options(Gate.SOFTPLUS, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale)
    inputs = Inputs(
        q, k, v, a.reshape(*v.shape[:2], HV, K), b, options, A_log.flatten(), dt_bias, initial_state_source,
        initial_state_indices, cu_seqlens, state_v_first=state_layout == "vk",
    )  # fmt: skip
    check_inputs(inputs)
    return registry.decode(inputs, out).o


# --- FlashKDA


def flashkda_fwd(
    q, k, v, g, beta, scale, out, *, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens=None
) -> None:
    _, final = chunk_kda_fwd(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, A_log=A_log,
        dt_bias=dt_bias, lower_bound=lower_bound, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        out=out,
    )  # fmt: skip
    final_state.copy_(final)


def _no_reference(*_: Any, **__: Any) -> None:
    raise AssertionError("FlashKDA's own reference needs nvcc: choose its comparisons with FLA, -k vs_fla")


_FLA = "sglang.srt.layers.attention.fla"
STAND_INS: dict[str, dict[str, dict[str, Callable[..., Any]]]] = {
    "sglang": {
        f"{_FLA}.cumsum": {"chunk_local_cumsum": chunk_local_cumsum},
        f"{_FLA}.fused_recurrent": {"fused_recurrent_kda_packed_decode": fused_recurrent_kda_packed_decode},
        f"{_FLA}.fused_sigmoid_gating_recurrent": {"fused_sigmoid_gating_delta_rule_update": sglang_update},
        f"{_FLA}.index": {"prepare_chunk_indices": prepare_chunk_indices},
        f"{_FLA}.kda": {"fused_recurrent_kda": fused_recurrent_kda, "kda_gate_chunk_cumsum": kda_gate_chunk_cumsum},
        "sglang.srt.layers.attention.linear.kernels.kda_triton": {"TritonKDAKernel": TritonKDAKernel},
        "sglang.srt.utils.common": {"get_device": lambda: "cuda"},
        "sglang.test.ci.ci_register": {"register_amd_ci": _nothing, "register_cuda_ci": _nothing},
    },
    "cula": {"cula.kda": {"kda_decode": cula_decode, "fused_sigmoid_gating_delta_rule_update": cula_update}},
    "flashkda": {"flash_kda": {"fwd": flashkda_fwd}, "torch_ref": {"torch_ref": _no_reference}},
}


def stand_ins(peer: str) -> dict[str, ModuleType]:
    """By name, the modules that the peer's tests import, and the packages that these lie in."""
    found: dict[str, ModuleType] = {}
    for name, functions in STAND_INS[peer].items():
        parts = name.split(".")
        for package in (".".join(parts[:n]) for n in range(1, len(parts) + 1)):
            module = found.setdefault(package, ModuleType(package))
            module.__path__, module.__spec__ = [], ModuleSpec(package, None, is_package=True)
        vars(found[name]).update(functions)
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in STAND_INS:
        print(__doc__)
        return 2
    if not Path(arguments[1]).is_file():
        print(f"Error: {arguments[1]}: no such file", file=sys.stderr)
        return 2
    os.environ.setdefault("FLA_FLASH_KDA", "0")  # what FLA compares with is its own, not what stands in for FlashKDA
    sys.modules.update(stand_ins(arguments[0]))
    folder = str(Path(arguments[1]).resolve().parent)
    return int(pytest.main([arguments[1], "--rootdir", folder, "-p", "no:cacheprovider", *arguments[2:]]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
