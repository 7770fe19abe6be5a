"""A named compile variant of a CuTe kernel, as `kda compile` asks for it (`kda_kernels.variant.Variant`)."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

from kda_kernels.cute import cache
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.errors import UnavailableError
from kda_kernels.variant import Built


@dataclasses.dataclass(frozen=True)
class CuteVariant:
    """One specialisation of a kernel.

    Attributes:
        name: unique within its module.
        compile: (architecture, options of the DSL's compiler) -> what `cute.compile` returns.
        label: architecture -> what the compile cache knows the result by.
        num_warps: of a CTA. shared_bytes: of a CTA.
    """

    name: str
    compile: Callable[[str, str], Any]
    label: Callable[[str], str]
    num_warps: int
    shared_bytes: int

    def missing(self, arch: str) -> str | None:
        """Its label, if a launch on that architecture would have to compile it though there is a cache on disk."""
        label = self.label(arch)
        return label if cache.lacks(label) else None

    def build(self, arch: str) -> Built:
        """Compiles it, and leaves it where a launch on that architecture looks first.

        Raises:
            UnavailableError: the architecture is older than sm_90, or the DSL is missing.
        """
        if (reason := missing_packages()) is not None:
            raise UnavailableError(reason)
        if not arch.startswith("sm_") or int(arch[3:].rstrip("af")) < 90:
            raise UnavailableError(f"CuTe DSL kernels are for sm_90a and newer, not {arch}")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="kda-cute-") as folder:
            compiled = cache.compiled(lambda: self.compile(arch, f"--keep-cubin --keep-ptx --dump-dir {folder}"))
        seconds = time.perf_counter() - began
        cache.keep(compiled, self.label(arch))
        return Built(
            cubin=compiled.__cubin__,
            ptx=compiled.__ptx__,
            ir={"mlir": str(compiled.ir_module)},
            shared_bytes=self.shared_bytes,
            num_warps=self.num_warps,
            compile_s=seconds,
        )
