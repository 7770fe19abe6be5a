"""The KDA layers of SGLang 0.5.23 and vLLM 0.33.0 themselves, from their released sources, without the engines.

`load` imports a layer's module and the kernels that it calls as they are; everything else that they import is a
stand-in which does nothing. A layer is then an object with the attributes that its forward method reads, and metadata
as the engine's scheduler makes it. So the convolutions, the order of tokens, the pools and the kernels are the engine's
own; projections, the scheduler and CUDA graphs of the whole model are not run.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kda_kernels import registry
from kda_kernels.engines import sglang, vllm
from kdacli.peers import vllm_step

H, D, WIDTH = 12, 128, 4  # Kimi K3's heads on one of 8 GPUs; its convolution
CHANNELS = 3 * H * D
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

REAL = {
    "vllm": (
        "vllm.models.kimi_k3.nvidia.kda",
        "vllm.models.kimi_k3.nvidia.ops.third_party.kda",
        "vllm.models.glm5next.common.kda",
        "vllm.models.glm5next.nvidia.ops.third_party.kda",
        "vllm.model_executor.models.bailing_moe_v3",
        "vllm.third_party.flash_linear_attention.ops.",
        "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn",
        "vllm.model_executor.layers.mamba.ops.causal_conv1d",
        "vllm.model_executor.layers.mamba.ops.gather_initial_states",
        "vllm.model_executor.layers.mamba.kda_checkpoint",
        "vllm.model_executor.layers.mamba.checkpoint",
    ),
    "sglang": (
        "sglang.srt.layers.attention.linear.kda_backend",
        "sglang.srt.layers.attention.linear.kernels.kda_triton",
        "sglang.srt.layers.attention.linear.kernels.kernel_backend",
        "sglang.srt.layers.attention.linear.utils",
        "sglang.srt.arg_groups.choices",
        "sglang.kernels.ops.attention.fla.",
        "sglang.kernels.ops.attention.kda_fused_decode",
        "sglang.kernels.ops.attention.kda_packed_decode",
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent",
        "sglang.kernels.ops.attention.linear.fused_kda_conv_recurrent_verify",
        "sglang.kernels.ops.mamba.causal_conv1d_triton",
    ),
}


class Nothing:
    """False, and whatever is done with it gives it again; as a decorator it leaves a function as it is."""

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType | type) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


NOTHING = Nothing()


class _Stand(type):
    """A class of a stand-in module: a base to inherit from, a type to annotate with, and a function to call."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return NOTHING(*args, **kwargs) if cls.__module__ == "stand-in" else super().__call__(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return NOTHING


class StandIn(types.ModuleType):
    """A module that has every name; those of modules below it that are more than stand-ins are imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        finder = getattr(self.__spec__, "loader", None)
        if isinstance(finder, Finder) and finder.has(below := f"{self.__name__}.{name}"):
            return importlib.import_module(below)
        made = _Stand(name, (), {"__module__": "stand-in"})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an engine's real modules in its sources, and stand-ins for all others.

    Args:
        engine: vllm or sglang. root: the folder that holds its package. given: attributes of stand-ins.
    """

    def __init__(self, engine: str, root: Path, given: dict[str, dict[str, Any]]) -> None:
        self.engine, self.root, self.given = engine, root, given

    def has(self, name: str) -> bool:
        """Whether a module is more than a stand-in with nothing given."""
        return name in self.given or name in REAL[self.engine]

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != self.engine:
            return None
        file = self.root.joinpath(*name.split("."))
        if name not in self.given and any(
            name == real or name.startswith(real.rstrip(".") + ".") for real in REAL[self.engine]
        ):
            found = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
            bare = name + "." in REAL[self.engine]  # its own __init__ imports too much
            if found.is_file() and not bare:
                return importlib.util.spec_from_file_location(
                    name, found, submodule_search_locations=[str(file)] if file.is_dir() else None
                )
        spec = importlib.machinery.ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(file)]
        return spec

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(self.given.get(module.__name__, {}))


@contextlib.contextmanager
def load(engine: str, root: Path) -> Iterator[None]:
    """Inside, an engine's modules can be imported; nothing of them is left behind."""
    given = _of_vllm() if engine == "vllm" else _of_sglang(root)
    finder = Finder(engine, root, given)
    added = [
        "transformers",
        "transformers.configuration_utils",
        *(name for name in ("einops", "msgspec", "regex") if importlib.util.find_spec(name) is None),
    ]
    before = {name: sys.modules[name] for name in added if name in sys.modules}
    sys.modules.update({name: _small(name) for name in added})
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == engine or name in added]:
            del sys.modules[name]
        sys.modules.update(before)


def _small(name: str) -> types.ModuleType:
    """What the layers use of a package that is not here."""
    module = StandIn(name)
    if name == "einops":
        module.rearrange = lambda x, pattern, d: x.unflatten(-1, (-1, d)).unsqueeze(0)  # "n (h d) -> 1 n h d"
    if name == "msgspec":
        module.Struct = type("Struct", (), {"__init_subclass__": classmethod(lambda cls, **options: None)})
    return module


# --- vLLM


class Norm(torch.nn.Module):
    """vLLM's CustomOp: on a GPU of NVIDIA's it calls forward_cuda."""

    register = staticmethod(lambda name: lambda cls: cls)

    def forward(self, *args: Any) -> Any:
        return self.forward_cuda(*args)


class Workspace:
    """Buffers by their shapes, the same ones for every call."""

    def __init__(self) -> None:
        self.buffers: dict[Any, list[torch.Tensor]] = {}

    def get_simultaneous(self, *specs: Any) -> list[torch.Tensor]:
        if specs not in self.buffers:
            self.buffers[specs] = [torch.empty(shape, dtype=dtype, device=DEVICE) for shape, dtype in specs]
        return self.buffers[specs]


CONTEXT = types.SimpleNamespace(attn_metadata={})


def _of_vllm() -> dict[str, dict[str, Any]]:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    class Platform(Nothing):
        device_name = device_type = "cuda"

        def is_cuda(self) -> bool:
            return True

        def is_arch_support_pdl(self) -> bool:
            return DEVICE == "cuda"

    def next_power_of_2(n: int) -> int:
        return 1 << max(n - 1, 0).bit_length()

    def to_device(values: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    workspace = Workspace()
    mamba = "vllm.model_executor.layers.mamba"
    return {
        "vllm.triton_utils": {"tl": tl, "triton": triton, "tldevice": libdevice, "HAS_TRITON": True},
        "vllm.platforms": {"current_platform": Platform()},
        "vllm.utils.math_utils": {
            "cdiv": lambda a, b: -(-a // b), "next_power_of_2": next_power_of_2, "RCP_LN2": 1.4426950408889634,
        },
        "vllm.utils.torch_utils": {"async_tensor_h2d": to_device},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
        "vllm.v1.attention.backends.utils": {"PAD_SLOT_ID": -1, "NULL_BLOCK_ID": 0},
        "vllm.v1.worker.workspace": {"current_workspace_manager": lambda: workspace},
        "vllm.model_executor.custom_op": {"CustomOp": Norm},
        "vllm.forward_context": {"get_forward_context": lambda: CONTEXT},
        f"{mamba}.mamba_utils": {"is_conv_state_dim_first": lambda: False},
        f"{mamba}.ops.scatter_states": {"scatter_states": _scatter},
        "vllm._custom_ops": {"fused_kda_decode": _fused_kda_decode},
        "vllm.compilation.breakable_cudagraph": {"eager_break_during_capture": lambda function: function},
    }  # fmt: skip


def vllm_fused() -> str | None:
    """Why vLLM's own fused step cannot run here; None if it can."""
    return vllm_step.unsupported()


def _fused_kda_decode(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, conv_state: torch.Tensor, raw_g: torch.Tensor,
    raw_beta: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, state_indices: torch.Tensor,
    state: torch.Tensor, out: torch.Tensor, lower_bound: float | None, output_gate: torch.Tensor,
    norm_weight: torch.Tensor, norm_eps: float,
) -> torch.Tensor:  # fmt: skip
    """What vLLM's own does where `out` is given, as its layer does: `vllm._custom_ops` imports too much."""
    (step,) = vllm_step.LIBRARY.load()
    step(
        x, weight, bias, conv_state, raw_g, raw_beta, A_log, dt_bias, state_indices, state, out, lower_bound,
        output_gate, norm_weight, norm_eps,
    )  # fmt: skip
    return out


def _scatter(pool: torch.Tensor, states: torch.Tensor, slots: torch.Tensor) -> None:
    pool[slots.long()] = states.to(pool.dtype)


@dataclasses.dataclass
class Run:
    """One call of a layer, ready to go, in inference mode as in an engine: `go` changes `state` and writes `out`."""

    go: Callable[[], Any]
    out: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        self.go = torch.inference_mode()(self.go)

    def results(self) -> dict[str, torch.Tensor]:
        """What it leaves, from the same start each time."""
        before = {name: tensor.clone() for name, tensor in self.state.items()}
        self.go()
        left = {name: tensor.clone() for name, tensor in (self.state | {"out": self.out()}).items()}
        for name, tensor in before.items():
            self.state[name].copy_(tensor)
        return left


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def offsets(lens: Any) -> torch.Tensor:
    return torch.tensor([0, *lens], device=DEVICE).cumsum(0).to(torch.int32)


def flashkda() -> bool:
    """Loads vLLM's FlashKDA, if it can be found."""
    from kdacli.peers import flashkda_prefill

    if flashkda_prefill.unsupported() is not None:
        return False
    flashkda_prefill.LIBRARY.load()
    return True


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a scheduler puts together: token counts of prefills and decodes, and drafts with what was accepted of them.

    Attributes:
        lens: tokens of each sequence that is prefilled, or (all 1, `decode`) decoded.
        drafts: tokens of a speculative sequence; accepted: of each such sequence.
        padded: rows of a CUDA graph's bucket that hold no sequence.
        checkpoint: tokens after which the first sequence's state is kept; 0: nowhere.
        fused: a decode as one step with convolution and gated norm, or drafts with the convolution, where there is one.
    """

    lens: tuple[int, ...] = ()
    decode: bool = False
    drafts: int = 0
    accepted: tuple[int, ...] = ()
    padded: int = 0
    checkpoint: int = 0
    fused: bool = False


def k3(batch: Batch, lower_bound: float | None = -5.0, slots: int = 64) -> Run:
    """vLLM's Kimi K3 layer, from behind the projections to behind the gated norm."""
    module = importlib.import_module("vllm.models.kimi_k3.nvidia.kda")
    return _kimi(module.KimiK3DeltaAttention, module.KimiK3KDAMetadata, batch, lower_bound, slots)


def kimi_linear(batch: Batch, lower_bound: float | None = None, slots: int = 64) -> Run:
    """vLLM's Kimi-Linear layer, as `k3`; it has neither fused steps nor checkpoints."""
    module = importlib.import_module("vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn")
    return _kimi(module.KimiGatedDeltaNetAttention, module.GDNAttentionMetadata, batch, lower_bound, slots)


def _kimi(kind: type, metadata: type, batch: Batch, lower_bound: float | None, slots: int) -> Run:
    module = sys.modules[kind.__module__]
    spec_tokens = batch.drafts * len(batch.accepted)
    tokens = spec_tokens + sum(batch.lens) + batch.padded
    layer = object.__new__(kind)
    conv = random(slots, WIDTH - 1 + max(batch.drafts - 1, 0), CHANNELS)
    pool = random(slots, H, D, D, scale=0.3, dtype=torch.float32)
    norm = module.FusedRMSNormGated(D, activation="sigmoid").to(DEVICE)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    fast = lower_bound is not None and flashkda()
    weight = random(CHANNELS, 1, WIDTH, scale=0.5, dtype=torch.float32)
    vars(layer).update(
        prefix="layer", kv_cache=(conv, pool), head_dim=D, local_projection_size=H * D, local_num_heads=H,
        conv1d=types.SimpleNamespace(weight=weight, bias=None),
        A_log=random(H, dtype=torch.float32).abs(), dt_bias=random(H * D, dtype=torch.float32),
        gate_lower_bound=lower_bound, kda_prefill_backend="flashkda" if fast else "triton",
        kda_decode_backend="native" if batch.fused else "triton", kda_spec_decode_backend="triton",
        decode_conv1d_weight=weight.view(3, H * D, WIDTH).mT.contiguous() if batch.fused else None,
        decode_norm_weight=norm.weight.detach().float() if batch.fused else None, use_recoverssm=False,
        o_norm=norm, _flashkda_buffer_specs=_specs(tokens, len(batch.lens)) if fast else None,
    )  # fmt: skip
    if fast and kind.__name__ == "KimiK3DeltaAttention":
        layer._checkpoint_exporter = module.FlashKDAPrefillCheckpointExporter()
    planned = {"layer": _metadata(metadata, batch)}
    projected = random(tokens, CHANNELS + H * D)  # the gate of the norm lies behind q, k and v
    out = torch.zeros(1, tokens, H, D, dtype=torch.bfloat16, device=DEVICE)
    g, beta = random(1, tokens, H, D), random(1, tokens, H)
    gate = projected[:, CHANNELS:].unflatten(1, (H, D))

    def go() -> None:
        CONTEXT.attn_metadata = planned
        out.zero_()
        layer._forward(projected[:, :CHANNELS], g, gate, beta, out)

    return Run(go, lambda: out[:, : tokens - batch.padded], {"conv": conv, "pool": pool})


def _specs(tokens: int, sequences: int) -> tuple:
    size = torch.ops._flashkda_C.get_workspace_size(tokens, H, max(sequences, 1))
    state = ((max(sequences, 1), H, D, D), torch.float32)
    return (((1, tokens, H, D), torch.bfloat16), state, state, ((size,), torch.uint8))


def glm(batch: Batch, lower_bound: float | None = -5.0, slots: int = 64) -> Run:
    """vLLM's GLM-5.3-Flash layer, from behind the projections to before the gated norm."""
    module = importlib.import_module("vllm.models.glm5next.common.kda")
    tokens = batch.drafts * len(batch.accepted) + sum(batch.lens) + batch.padded
    layer = object.__new__(module.Glm5NextLinearAttention)
    conv = random(slots, WIDTH - 1 + max(batch.drafts - 1, 0), CHANNELS)
    pool = random(slots, H, D, D, scale=0.3, dtype=torch.float32)
    fast = lower_bound is not None and flashkda()
    vars(layer).update(
        prefix="layer", kv_cache=(conv, pool), head_dim=D, local_projection_size=H * D, local_num_heads=H,
        _merged_conv_weight=random(CHANNELS, WIDTH, scale=0.5, dtype=torch.float32),
        q_conv1d=types.SimpleNamespace(bias=None), A_log=random(1, 1, H, 1, dtype=torch.float32).abs(),
        dt_bias=random(H * D, dtype=torch.float32), kda_lower_bound=lower_bound, kda_safe_gate=lower_bound is not None,
        kda_prefill_backend="flashkda" if fast else "triton", _conv_state_dim_first=False,
        _checkpoint_exporter=module.FlashKDAPrefillCheckpointExporter(),
        _flashkda_buffer_specs=(lambda o, *rest: (*rest, o))(*_specs(tokens, len(batch.lens))) if fast else None,
    )  # fmt: skip
    planned = {"layer": _metadata(module.GDNAttentionMetadata, batch)}
    projected = random(tokens, CHANNELS + H)
    out = torch.zeros(1, tokens, H, D, dtype=torch.bfloat16, device=DEVICE)
    g, beta = random(1, tokens, H, D), random(1, tokens, H)

    def go() -> None:
        CONTEXT.attn_metadata = planned
        out.zero_()
        layer._forward(projected[:, :CHANNELS], g, beta, out)

    return Run(go, lambda: out[:, : tokens - batch.padded], {"conv": conv, "pool": pool})


def ling(batch: Batch, lower_bound: float | None = -5.0, slots: int = 64) -> Run:
    """vLLM's Ling-3.0-flash layer, from behind the gate's activation to before the gated norm."""
    module = importlib.import_module("vllm.model_executor.models.bailing_moe_v3")
    tokens = batch.drafts * len(batch.accepted) + sum(batch.lens) + batch.padded
    layer = object.__new__(module.BailingMoeV3KimiDeltaAttention)
    conv = random(slots, WIDTH - 1 + max(batch.drafts - 1, 0), CHANNELS)
    pool = random(slots, H, D, D, scale=0.3, dtype=torch.float32)
    vars(layer).update(
        prefix="layer", kv_cache=(conv, pool), head_dim=D, local_num_heads=H, lower_bound=lower_bound,
        safe_gate=lower_bound is not None, A_log=random(1, 1, H, 1, dtype=torch.float32).abs(),
    )  # fmt: skip
    for name in "qkv":
        weight = random(H * D, 1, WIDTH, scale=0.5, dtype=torch.float32)
        setattr(layer, f"{name}_conv1d", types.SimpleNamespace(weight=weight, bias=None))
    planned = {"layer": _metadata(module.GDNAttentionMetadata, batch)}
    qkv = random(tokens, CHANNELS).split(H * D, 1)
    raw, bias = random(tokens, H * D), random(H * D, dtype=torch.float32)
    g = module.fused_kda_gate(raw, layer.A_log, D, g_bias=bias, lower_bound=lower_bound).unsqueeze(0)
    beta = random(1, tokens, H).float().sigmoid()
    out = torch.zeros(1, tokens, H, D, dtype=torch.bfloat16, device=DEVICE)

    def go() -> None:
        CONTEXT.attn_metadata = planned
        out.zero_()
        layer._forward(*qkv, g, beta, out)

    return Run(go, lambda: out[:, : tokens - batch.padded], {"conv": conv, "pool": pool})


def _metadata(kind: type, batch: Batch) -> Any:
    """A layer's metadata as the builder makes it: speculative tokens first, then the others."""
    N, S = len(batch.lens), len(batch.accepted)
    spec_tokens = batch.drafts * S
    found = object.__new__(kind)
    order = torch.arange(spec_tokens + sum(batch.lens), device=DEVICE)
    decodes = N if batch.decode else 0
    rows = [*range(1, N + 1), *[0] * batch.padded]
    start = {"spec_token_start": 0, "non_spec_token_start": spec_tokens} if S and N else {}
    vars(found).update(
        has_initial_state=torch.tensor([n % 2 == 0 for n in range(N)], device=DEVICE),
        non_spec_query_start_loc=offsets(batch.lens), non_spec_state_indices_tensor=ints(*rows),
        spec_sequence_masks=order[:S] if S else None, spec_token_indx=order[:spec_tokens] if S else None,
        non_spec_token_indx=order[spec_tokens:] if S else None,
        spec_state_indices_tensor=ints(*([N + 1 + n * batch.drafts + t for t in range(batch.drafts)] for n in range(S)))
        if S else None,
        spec_query_start_loc=offsets([batch.drafts] * S), num_accepted_tokens=ints(*batch.accepted),
        num_actual_tokens=spec_tokens + sum(batch.lens) + (batch.padded if decodes else 0),
        num_spec_decodes=S, num_spec_decode_tokens=spec_tokens, num_prefills=0 if batch.decode else N,
        num_prefill_tokens=0 if batch.decode else sum(batch.lens), num_decodes=decodes,
        num_decode_tokens=decodes, checkpoint=_checkpoint(batch), nums_dict=None, batch_ptr=None,
        token_chunk_offset_ptr=None, **({"spec_token_start": None, "non_spec_token_start": None} | start),
    )  # fmt: skip
    conv_plan(found, batch.lens)
    return found


def conv_plan(metadata: Any, lens: tuple[int, ...]) -> None:
    """What vLLM's builder makes for its convolution: which 8 tokens of which sequence each program takes."""
    blocks = [(n, block) for n, tokens in enumerate(lens) for block in range(-(-tokens // 8))]
    of, which = (ints(*column) for column in zip(*blocks, strict=True)) if blocks else (ints(), ints())
    plan = {"tot": len(blocks), "mlist": of, "mlist_len": len(blocks), "offsetlist": which}
    metadata.nums_dict = {8: plan | {"batch_ptr": of, "token_chunk_offset_ptr": which}}
    metadata.batch_ptr, metadata.token_chunk_offset_ptr = of, which


def _checkpoint(batch: Batch) -> Any:
    if not batch.checkpoint:
        return None
    N = len(batch.lens)
    return types.SimpleNamespace(
        checkpoint_offsets=ints(batch.checkpoint, *[0] * (N - 1)), state_indices=ints(40, *[0] * (N - 1))
    )


@contextlib.contextmanager
def ours_in_vllm() -> Iterator[None]:
    """Inside, vLLM's functions are replaced, by the entry point that vLLM would call."""
    with mock.patch.dict(os.environ, {vllm.VARIABLE: "1"}):
        vllm.install()
    try:
        yield
    finally:
        vllm._patches.pop().remove()


# --- SGLang

MAMBA = types.SimpleNamespace()


def _of_sglang(root: Path) -> dict[str, dict[str, Any]]:
    import triton

    yes, no = lambda *a, **k: DEVICE == "cuda", lambda *a, **k: False
    asks = dict.fromkeys(("is_cpu", "is_npu", "is_hip", "is_xpu", "is_musa", "cpu_has_amx_support"), no)
    release = tuple(map(int, torch.__version__.partition("+")[0].split(".")[:2]))
    context = types.SimpleNamespace(mamba=MAMBA)
    without = {"sglang.kernels.ops.attention.kda_packed_decode": {"covered": no}} if sglang_cuda(root) else {}
    return without | {
        "sglang.srt.utils": asks | {
            "is_cuda": yes, "next_power_of_2": triton.next_power_of_2, "cdiv": triton.cdiv,
        },
        "sglang.srt.utils.common": {"torch_release": release, "rank0_log": print},
        "sglang.kernels.jit.utils": {
            "is_arch_support_pdl": yes, "is_hip_runtime": no, "get_jit_cuda_arch": no, "cache_once": functools.cache,
            "make_cpp_args": lambda *args: Arguments(map(json.dumps, args)),
            "load_jit": functools.partial(_load_jit, root / "sglang/kernels/jit"),
        },
        "sglang.srt.runtime_context": {"get_exec": lambda: context},
    }  # fmt: skip


class Arguments(list):
    """Template arguments of a C++ class."""

    def __str__(self) -> str:
        return ", ".join(self)


@functools.cache
def sglang_cuda(root: Path) -> str | None:
    """Why SGLang's own CUDA kernels cannot be built here; None if they can."""
    if not (root / "sglang/kernels/jit/csrc/attention/kda_fused_decode.cuh").is_file():
        return "the sources hold no sglang/kernels/jit/csrc"
    if importlib.util.find_spec("tvm_ffi") is None or shutil.which("nvcc") is None or shutil.which("ninja") is None:
        return "no tvm_ffi, nvcc or ninja"
    return None


def _load_jit(
    folder: Path, name: str, *args: str, cuda_files: list[str], cuda_wrappers: list[tuple[str, str]],
    extra_cuda_cflags: list[str],
) -> Any:  # fmt: skip
    """What SGLang's own does on CUDA: its kernel, compiled from the sources of the wheel."""
    from tvm_ffi.cpp import load_inline

    headers = ("container/tensor.h", "dtype.h", "error.h", "extra/c_env_api.h", "function.h")
    lines = [f"#include <tvm/ffi/{header}>" for header in headers]
    lines += [f'#include "{folder / "csrc" / file}"' for file in cuda_files]
    exports = [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({export}, ({kernel}));" for export, kernel in cuda_wrappers]
    major, minor = torch.cuda.get_device_capability()
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-DSGL_CUDA_ARCH={major * 100 + minor * 10}"]
    return load_inline(
        name, cuda_sources="\n".join([*lines, "namespace sglang {", *exports, "}"]),
        extra_cuda_cflags=[*flags, *extra_cuda_cflags], extra_include_paths=[str(folder / "include")],
    )  # fmt: skip


def sglang_layer(batch: Batch, ours: bool, lower_bound: float | None = -5.0, slots: int = 64) -> Run:
    """SGLang's KDA backend, from behind the projections to before the gated norm."""
    N, S = len(batch.lens), len(batch.accepted)
    real = sum(batch.lens) + batch.drafts * S
    tokens = real + batch.padded
    cache = _sglang_cache(batch, slots)
    backend = _sglang_backend(batch, ours, cache, slots)
    layer = _sglang_parameters(batch, lower_bound, tokens)
    mode = types.SimpleNamespace(is_target_verify=lambda: bool(S), is_draft_extend_v2=lambda: False)
    forward = types.SimpleNamespace(
        forward_mode=mode, extend_prefix_lens=ints(*(n % 2 * 9 for n in range(N))),
        extend_seq_lens_cpu=list(batch.lens), req_pool_indices=torch.arange(S, device=DEVICE),
        spec_info=types.SimpleNamespace(draft_token_num=batch.drafts, ragged_verify_layout=None),
    )  # fmt: skip
    mixed, b = random(tokens, CHANNELS + H)[:, :CHANNELS], random(1, tokens, H)
    a = random(tokens, H * D) if batch.decode else random(1, tokens, H * D)
    call = backend.forward_decode if batch.decode else backend.forward_extend
    left: list[torch.Tensor] = []

    def go() -> None:
        left[:] = [call(layer, forward, mixed.clone() if S else mixed, a, b)]

    def out() -> torch.Tensor:
        o = left[0].reshape(1, -1, H, D)[:, :real]
        if batch.fused and batch.decode and not getattr(layer, "_k3_onorm_consumed", False):  # then the model does it
            *_, weight, eps = layer._k3_fused_decode_args
            gate = layer._k3_onorm_gate[:real].view(1, -1, H, D).float()
            o = (torch.nn.functional.rms_norm(o.float(), (D,), weight, eps) * gate.sigmoid()).to(o.dtype)
        return o

    state = {"conv": cache.conv[0], "pool": cache.temporal, "drafts": cache.intermediate_ssm}
    if batch.fused and S:  # the fused verify leaves it as it is; what is committed afterwards sets it
        del state["conv"]
    return Run(go, out, state)


def _sglang_cache(batch: Batch, slots: int) -> types.SimpleNamespace:
    """A layer's states."""
    steps = max(batch.drafts, 1)
    return types.SimpleNamespace(
        conv=[random(slots, WIDTH - 1, CHANNELS)], temporal=random(slots, H, D, D, scale=0.3, dtype=torch.float32),
        replayssm_d=None, replayssm_k=None, replayssm_g=None, replayssm_rawv=None,
        intermediate_ssm=torch.zeros(slots, steps, H, D, D, device=DEVICE),
        intermediate_conv_window=[torch.zeros(slots, steps, WIDTH - 1, CHANNELS, dtype=torch.bfloat16, device=DEVICE)],
    )  # fmt: skip


def _sglang_backend(batch: Batch, ours: bool, cache: types.SimpleNamespace, slots: int) -> Any:
    name = sglang.NAME if ours else "triton"
    vars(MAMBA).update(
        linear_attn_backend=name, linear_attn_decode_backend=None, linear_attn_prefill_backend=None,
        linear_attn_verify_backend=name,
    )  # fmt: skip
    module = importlib.import_module("sglang.srt.layers.attention.linear.kda_backend")
    kinds = importlib.import_module("sglang.srt.layers.attention.linear.utils").LinearAttnKernelBackend
    backend = object.__new__(module.KDAAttnBackend)
    vars(backend).update(
        kernel_dispatcher=module.KDAKernelDispatcher(*[kinds(name)] * 3),
        req_to_token_pool=types.SimpleNamespace(mamba2_layer_cache=lambda layer: cache, size=slots),
        forward_metadata=_sglang_metadata(batch), accept_lens_pool=None,
        _fused_chain_verify_fn=_fused_verify() if batch.fused and batch.drafts and not ours else None,
        verify_intermediate_state_indices=torch.arange(slots, dtype=torch.int32, device=DEVICE),
        _fused_override_notice=None,
        _track_mamba_state_decode=lambda *a: None, _track_mamba_state_extend=_track,
    )  # fmt: skip
    if batch.drafts:
        module.select_verify_intermediate_state_indices = lambda rows, *rest: rows
    return backend


def _sglang_parameters(batch: Batch, lower_bound: float | None, tokens: int) -> types.SimpleNamespace:
    """What a layer has of the model."""
    layer = types.SimpleNamespace(
        layer_id=0, q_dim=H * D, k_dim=H * D, v_dim=H * D, head_q_dim=D, head_k_dim=D, head_v_dim=D, num_q_heads=H,
        num_k_heads=H, num_v_heads=H, bias=None, lower_bound=lower_bound,
        conv_weights=random(CHANNELS, WIDTH, scale=0.5, dtype=torch.float32),
        A_log=random(1, 1, H, 1, dtype=torch.float32).abs(), dt_bias=random(H * D, dtype=torch.float32),
    )  # fmt: skip
    if batch.fused and batch.decode:
        parts = (part.mT.contiguous() for part in layer.conv_weights.split(H * D))
        norm = (layer.A_log.view(-1), 1 + 0.1 * random(D, dtype=torch.float32), 1e-5)
        layer._k3_fused_decode_args = (*parts, torch.zeros(CHANNELS, device=DEVICE), *norm)
        layer._k3_onorm_gate = random(tokens, H * D)
    return layer


def _fused_verify() -> Any:
    name = "sglang.kernels.ops.attention.linear.fused_kda_conv_recurrent_verify"
    return importlib.import_module(name).fused_kda_conv_gating_verify


def _track(forward: Any, h: Any, states: torch.Tensor, m: Any, *, h_track_buf: torch.Tensor) -> None:
    """What the backend's base class does with the snapshots."""
    states[m.track_ssm_h_dst] = h_track_buf[m.track_ssm_h_batch_src].to(states.dtype)


def _sglang_metadata(batch: Batch) -> Any:
    N, S = len(batch.lens), len(batch.accepted)
    rows = [*range(1, N + S + 1), *[-1] * batch.padded]
    lens = [*batch.lens, *[batch.drafts] * S, *[1 if batch.decode else 0] * batch.padded]
    tracked = bool(batch.checkpoint)
    index = ints(0)
    return types.SimpleNamespace(
        query_start_loc=offsets(lens), mamba_cache_indices=ints(*rows),
        logical_num_tokens=sum(batch.lens) if N else None,
        has_mamba_track_mask=tracked, conv_states_mask_indices=ints(40), retrieve_next_token=None,
        retrieve_next_sibling=None, retrieve_parent_token=None, replayssm_write_pos=None, replayssm_force_flush=None,
        track_conv_indices=torch.arange(WIDTH - 1, device=DEVICE)[None] + max(batch.checkpoint - WIDTH + 1, 0),
        track_chunk_idx=ints(batch.checkpoint // 64, *[-1] * (N - 1)) if tracked else None,
        track_ssm_h_src=index, track_ssm_h_dst=ints(41), track_ssm_h_batch_src=index, state_checkpoint_cu_starts=None,
        num_state_checkpoints=None, state_checkpoint_every_n_tokens=None, state_checkpoint_indices=None,
    )  # fmt: skip


@contextlib.contextmanager
def kernels_seen() -> Iterator[set[str]]:
    """Inside, the names of our kernels that calls choose are collected; none goes the way of the call before it."""
    names: set[str] = set()
    choose = registry.kernel_for

    def noted(*args: Any) -> registry.Kernel:
        kernel = choose(*args)
        names.add(kernel.name)
        return kernel

    known = {name: lambda *call: False for name in ("decode_again", "prefill_again")}
    with mock.patch.multiple(registry, kernel_for=noted, **known):
        yield names


@contextlib.contextmanager
def ours_in_sglang() -> Iterator[None]:
    """Inside, the choice "kda" is there, by the entry point that SGLang would call."""
    sglang.install()
    module, _, name = sglang.STEP.partition(":")
    step = getattr(importlib.import_module(module), name)  # replaced once ours are chosen, for as long as SGLang runs
    try:
        yield
    finally:
        sglang._patches.pop().remove()
        setattr(sys.modules[module], name, step)
