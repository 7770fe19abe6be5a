"""Reading what NVIDIA's tools say of a binary: the log of ptxas, and instruction counts of the disassembly."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

# One line of `nvdisasm -c`: address, an optional predicate, the opcode with its modifiers.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)

# What is counted, by the opcode before its first dot. A ".128" entry counts those of them that move 16 bytes a thread.
COUNTED = (
    "HGMMA", "HMMA", "UTCHMMA", "LDG", "STG", "LDGSTS", "UTMALDG", "LDS", "STS", "LDSM", "LDL", "STL", "BAR", "MUFU",
)  # fmt: skip
WIDE = ("LDG", "STG", "LDS", "STS")


def count(disassembly: str) -> dict[str, int]:
    """Static instruction counts of the output of nvdisasm.

    HGMMA, HMMA, UTCHMMA: tensor cores of sm_90, of sm_80/sm_120, of sm_100. LDG, STG: global memory; LDGSTS, UTMALDG:
    asynchronous copies into shared memory; LDS, STS, LDSM: shared memory; LDL, STL: local memory, which is where
    spilled registers go; BAR: barriers; MUFU: exp, rsqrt and the like. A loop's body counts once.
    """
    opcodes = collections.Counter(INSTRUCTION.findall(disassembly))
    out = {"instructions": opcodes.total()}
    for name in COUNTED:
        mine = {op: n for op, n in opcodes.items() if op.split(".")[0] == name}
        out[name] = sum(mine.values())
        if name in WIDE:
            out[f"{name}.128"] = sum(n for op, n in mine.items() if "128" in op.split("."))
    return out


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
    return {
        "registers": int(registers[1]),
        "stack_bytes": stack,
        "spill_bytes": stores + loads,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
    }
