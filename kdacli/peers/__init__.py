"""Other people's kernels behind our interface; what each declares to support is data, in its `CONTRACT`.

Importing this registers them, which costs no import of theirs.
"""

from kda_kernels.problem import Op
from kda_kernels.registry import Kernel, register

for _name, _op, _backend, _module, _summary in (
    ("fla-decode", Op.DECODE, "fla", "fla_decode", "FLA's fused_recurrent_kda_fwd"),
    ("fla-prefill", Op.PREFILL, "fla", "fla_prefill", "FLA's chunk_kda"),
    ("fla-gate", Op.GATE, "fla", "fla_gate", "FLA's kda_gate_chunk_cumsum"),
    ("flashkda-prefill", Op.PREFILL, "flashkda", "flashkda_prefill", "FlashKDA, as vLLM ships it"),
    ("cudnn-prefill", Op.PREFILL, "cudnn", "cudnn_prefill", "cuDNN frontend's kda_hopper_cuda"),
    ("sglang-decode", Op.DECODE, "sglang", "sglang_decode", "SGLang's CuTe DSL decode"),
    ("sglang-packed-decode", Op.DECODE, "sglang", "sglang_packed_decode", "SGLang's default decode, Triton or CUDA"),
    ("sglang-prefill", Op.PREFILL, "sglang", "sglang_prefill", "SGLang's default chunk_kda, Triton"),
    ("sglang-step", Op.STEP, "sglang", "sglang_step", "SGLang's fused decode step, CUDA"),
    ("sglang-chain", Op.STEP, "sglang", "sglang_chain", "SGLang's step unfused, in three kernels"),
    ("vllm-step", Op.STEP, "vllm", "vllm_step", "vLLM's fused decode step, CUDA"),
    ("cula-decode", Op.DECODE, "cula", "cula_decode", "cuLA's CuTe DSL decode"),
    ("flashinfer-decode", Op.DECODE, "flashinfer", "flashinfer_decode", "FlashInfer's recurrent_kda"),
    ("flashinfer-prefill", Op.PREFILL, "flashinfer", "flashinfer_prefill", "FlashInfer's recurrent_kda"),
):
    register(Kernel(_name, _op, _backend, f"{__name__}.{_module}", _summary, ours=False))
