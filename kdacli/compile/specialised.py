"""One specialisation of a Triton kernel, as a launch asked for it: built with no GPU, into the cache of launches."""

import contextlib
import dataclasses
import hashlib
import io
import re
from typing import TYPE_CHECKING, Any

from kda_kernels.errors import UnavailableError
from kda_kernels.variant import Built

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, CompiledKernel
    from triton.runtime.jit import JITFunction

IR = ("ttir", "ttgir", "llir", "amdgcn")  # besides PTX, what Triton keeps on the way to a binary


@dataclasses.dataclass(frozen=True)
class Specialised:
    """What Triton's own binder made of a launch's arguments (see `kda_kernels.variant.Variant`).

    Attributes:
        name: unique among those of a call.
        fn: the function decorated with `triton.jit`.
        signature, constexprs, attrs, options: as Triton's compiler takes them.
        tuned: it is one of several configurations, which the name ends in, and which only a GPU can choose from.
    """

    name: str
    fn: "JITFunction"
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[tuple[int, ...], list]
    options: dict[str, Any]
    tuned: bool = False

    def source(self) -> "ASTSource":
        """As Triton's compiler takes it."""
        from triton.compiler import ASTSource

        return ASTSource(self.fn, self.signature, self.constexprs, self.attrs)

    def key(self, arch: str) -> str:
        """What Triton's cache knows it by."""
        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key

        backend = make_backend(target_of(arch))
        options = backend.parse_options(dict(self.options))
        said = get_cache_key(self.source(), backend, options, get_cache_invalidating_env_vars())
        return hashlib.sha256(said.encode()).hexdigest()

    def missing(self, arch: str) -> str | None:
        """Its key, if a launch would not find it in Triton's cache; None if it would."""
        from triton.runtime.cache import get_cache_manager

        key, name = self.key(arch), f"{self.source().name[:150]}.json"
        return None if name in (get_cache_manager(key).get_group(name) or {}) else key

    def build(self, arch: str) -> Built:
        """Compiles it for sm_90a, gfx942, ..., by way of Triton's cache: a launch there of the same finds it.

        Raises:
            UnavailableError: `arch` is none that Triton knows.
            Exception: Triton's or ptxas's, when they refuse.
        """
        import triton

        said: list[tuple[bool, int]] = []  # was it in the cache, microseconds
        log = io.StringIO()
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
            triton.knobs.compilation.listener = lambda *, cache_hit, times, **_: said.append((cache_hit, times.total))
            triton.knobs.nvidia.dump_ptxas_log = True
            target = target_of(arch)
            compiled = triton.compile(self.source(), target=target, options=dict(self.options))
            ((cached, microseconds),) = said
            if cached and target.backend == "cuda" and "ptx" in compiled.asm:
                _assemble(compiled, target)  # for the log alone: the cache holds none
        return Built(
            cubin=compiled.asm["cubin" if target.backend == "cuda" else "hsaco"],
            shared_bytes=compiled.metadata.shared,
            num_warps=compiled.metadata.num_warps,
            ptx=compiled.asm.get("ptx"),
            ir={name: compiled.asm[name] for name in IR if name in compiled.asm},
            log=log.getvalue() or None,
            compile_s=None if cached else microseconds / 1e6,
            cached=cached,
            tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        )


def target_of(arch: str) -> "GPUTarget":
    """Triton's name of an architecture: what its driver would say of the GPU.

    Raises:
        UnavailableError: it is neither NVIDIA's nor AMD's.
    """
    from triton.backends.compiler import GPUTarget

    if match := re.fullmatch(r"sm_(\d+)a?", arch):
        return GPUTarget("cuda", int(match[1]), 32)
    if arch.startswith("gfx9"):
        return GPUTarget("hip", arch, 64)
    raise UnavailableError(f"Triton has no architecture {arch}")


def _assemble(compiled: "CompiledKernel", target: "GPUTarget") -> None:
    from triton.compiler import make_backend

    backend = make_backend(target)
    options = backend.parse_options(compiled.metadata._asdict())
    backend.make_cubin(compiled.asm["ptx"], {}, options, target.arch)
