"""Reading what LLVM says of an AMD kernel: the metadata at the end of its assembly, and its instructions."""

import collections
import re
from typing import Any

from kda_kernels.variant import Built

_INSTRUCTION = re.compile(r"^\s+([a-z][a-z0-9]*_[a-z0-9_]+)", re.MULTILINE)

# Instructions by what they do: matrix cores, 16-byte accesses of global memory and of LDS, spills, barriers.
_KINDS = {
    "MFMA": re.compile(r"v_s?mfmac?_"),
    "global_x4": re.compile(r"(global|buffer|flat)_(load|store)_dwordx4"),
    "lds_b128": re.compile(r"ds_(read|write)_b128"),
    "scratch": re.compile(r"scratch_(load|store)"),
    "barrier": re.compile(r"s_barrier"),
}


def read(built: Built) -> dict[str, Any]:
    """registers (vector and accumulation registers per lane), spill_bytes, stack_bytes and isa (counts by kind)."""
    text = built.ir["amdgcn"]
    opcodes = collections.Counter(_INSTRUCTION.findall(text.partition(".section\t.rodata")[0]))
    spilled = _said(text, "vgpr_spill_count")
    return {
        "registers": _said(text, "vgpr_count"),  # of both kinds together
        "spill_bytes": None if spilled is None else 4 * spilled,
        "stack_bytes": _said(text, "private_segment_fixed_size"),
        "isa": {"instructions": opcodes.total()}
        | {kind: sum(n for op, n in opcodes.items() if pattern.match(op)) for kind, pattern in _KINDS.items()},
    }


def _said(text: str, name: str) -> int | None:
    """A number of the kernel's metadata."""
    match = re.search(rf"^\s*-?\s*\.{name}:\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None
