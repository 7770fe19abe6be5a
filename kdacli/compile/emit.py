"""Writing what a compiler made, and what it made on the way, into a folder."""

import re
from pathlib import Path

from kda_kernels.errors import InputError
from kda_kernels.variant import Built


def prepare(folder: str, force: bool) -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: it is no folder, cannot be made, or holds files and `force` is not set.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from error
    if occupied and not force:
        raise InputError(f"{folder} holds files: use --force to write into it, or name another folder")
    return path.absolute()


def write(folder: Path, stem: str, built: Built, disassembly: str | None, amd: bool) -> list[str]:
    """Names of the files written: the binary, its disassembly, PTX and each IR, as far as there are any."""
    texts = {"ptx": built.ptx, **built.ir} | ({} if amd else {"sass": disassembly})
    files = {f"{safe(stem)}.{kind}": text.encode() for kind, text in texts.items() if text is not None}
    files[f"{safe(stem)}.{'hsaco' if amd else 'cubin'}"] = built.cubin
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(files)


def safe(stem: str) -> str:
    """A file name without the characters that shells and file systems mind: "chain BV=16" -> "chain_BV=16"."""
    return re.sub(r"[^\w.=,+-]+", "_", stem)[-200:]
