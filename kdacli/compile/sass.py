"""Reading what NVIDIA's tools say of a binary: the log of ptxas, and instruction counts of the disassembly."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

# One line of `nvdisasm -c`: address, an optional predicate, the opcode with its modifiers.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)

# What is counted, by the opcode before its first dot.
COUNTED = (
    "HGMMA", "HMMA", "QGMMA", "QMMA", "OMMA", "IGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA",
    "UBLKCP", "UBLKRED", "UTMALDG", "UTMASTG", "UTMAREDG",
    "LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "BAR", "SYNCS", "MUFU",
)  # fmt: skip
WIDE = (
    "LDG",
    "STG",
    "LDGSTS",
    "LDS",
    "STS",
)  # a ".128" entry counts those of them that move 16 bytes per thread or more
TENSOR = tuple(name for name in COUNTED if "MMA" in name)
RESOURCES = ("registers", "stack_bytes", "spill_bytes", "spill_store_bytes", "spill_load_bytes")  # of a thread
BULK = ("UBLKCP", "UBLKRED", "UTMALDG", "UTMASTG", "UTMAREDG")


def count(disassembly: str) -> dict[str, int]:
    """Static instruction counts of the output of nvdisasm.

    Tensor cores: HMMA, IMMA (sm_80 on), QMMA, OMMA (sm_89, sm_120), HGMMA, QGMMA, IGMMA (sm_90), UTC.MMA (sm_100).
    LDG, STG: global memory; LDGSTS: asynchronous copies into shared memory; UBLKCP, UBLKRED, UTMALDG, UTMASTG,
    UTMAREDG: bulk copies, by the copy engine; LDS, STS, LDSM, STSM: shared memory; LDL, STL: local memory, which is
    where spilled registers go; BAR: barriers of a block; SYNCS: those in shared memory; MUFU: exp, rsqrt and the like.
    A loop's body counts once. `tensor`, `bulk` and `local` are sums.
    """
    opcodes = collections.Counter(INSTRUCTION.findall(disassembly))
    out = {"instructions": opcodes.total()}
    for name in COUNTED:
        mine = {op: n for op, n in opcodes.items() if op.split(".")[0] == name}
        out[name] = sum(mine.values())
        if name in WIDE:
            out[f"{name}.128"] = sum(n for op, n in mine.items() if {"128", "256", "ENL2"} & set(op.split(".")))
    sums = {"tensor": TENSOR, "bulk": BULK, "local": ("LDL", "STL")}
    return out | {what: sum(out[name] for name in names) for what, names in sums.items()}


def disassemble(cubin: bytes, nvdisasm: Path) -> str:
    """The SASS of a cubin.

    Raises:
        OSError, subprocess.CalledProcessError: the tool is not there, or refused the binary.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout


def resources(ptxas_log: str) -> dict[str, int]:
    """Registers a thread, and bytes of stack and of spills a thread, from the output of `ptxas -v`.

    Raises:
        ValueError: the log holds no such lines.
    """
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    registers = re.search(r"Used (\d+) registers", ptxas_log)
    if spills is None or registers is None:
        raise ValueError("the log of ptxas does not say how many registers were used")
    stack, stores, loads = map(int, spills.groups())
    return dict(zip(RESOURCES, (int(registers[1]), stack, stores + loads, stores, loads), strict=True))


def resources_of_binary(cubin: bytes, cuobjdump: Path, counts: dict[str, int] | None) -> dict[str, int | None]:
    """The same as far as a binary says it, where there is no log.

    It does not hold the bytes of spills: they are 0 where it has no access to local memory (`counts`, of its
    disassembly), otherwise None.

    Raises:
        OSError, subprocess.CalledProcessError: the tool is not there, or refused the binary.
        ValueError: it named no registers.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(file)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", said), re.search(r"STACK:(\d+)", said)
    if registers is None or stack is None:
        raise ValueError("cuobjdump does not say how many registers are used")
    spills = 0 if counts is not None and counts["local"] == 0 else None
    return dict(zip(RESOURCES, (int(registers[1]), int(stack[1]), spills, spills, spills), strict=True))
