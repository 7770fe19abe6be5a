"""What every `--plot` asks before the work that would be lost. matplotlib is an extra."""

from pathlib import Path

from kda_kernels.errors import InputError, UnavailableError

FORMATS = (".png", ".svg", ".pdf")


def require(path: str) -> None:
    """Raises before anything is drawn.

    Raises:
        InputError: the file's format is none that can be written.
        UnavailableError: matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise InputError(f"--plot is {path}: it should end in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UnavailableError("--plot needs matplotlib: pip install matplotlib, or kdacli[plot]") from None
