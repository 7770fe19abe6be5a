"""The environment variables of commands, beside those of the library."""

import re
from pathlib import Path

from kda_kernels import environment


def _file(text: str) -> str | None:
    return None if Path(text).is_file() else "there is no such file"


def _folder(text: str) -> str | None:
    return None if Path(text).is_dir() else "there is no such folder"


def _name(text: str) -> str | None:
    return None if re.fullmatch(r"[\w./+-]{1,100}", text) else "it should be a commit: letters, digits, . / + and -"


def _number(text: str) -> str | None:
    return None if re.fullmatch("[0-9]{1,9}", text) else "it should be a whole number"


RULES: dict[str, environment.Rule] = {
    **environment.RULES,
    "KDA_COMMIT": _name,
    "KDA_ENGINE_SOURCES": _folder,
    "KDA_FLASHKDA_LIB": _file,
    "KDA_VLLM_LIB": _file,
    **dict.fromkeys(("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"), _number),  # torchrun's
}


def check() -> None:
    """Raises `InputError` for the first variable that holds what it may not."""
    environment.check(RULES)
