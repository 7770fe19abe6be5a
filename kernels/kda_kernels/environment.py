"""Environment variables: what each of them may hold. An empty one counts as not set.

`kda` looks at all of them before it does anything, the library at one when it reads it. docs/environment.md says what
they are for.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from kda_kernels.errors import InputError
from kda_kernels.variant import SHARED_KIB

Rule = Callable[[str], str | None]  # what the text should be; None where it is that


def _one_of(*words: str) -> Rule:
    wanted = f"it should be one of {', '.join(words)}"
    return lambda text: None if text in words else wanted


def _like(pattern: str, wanted: str) -> Rule:
    return lambda text: None if re.fullmatch(pattern, text) else wanted


def _folder(text: str) -> str | None:
    """One that is there, or may be made."""
    return None if Path(text).is_dir() or not Path(text).exists() else "it should be a folder"


def _command(text: str) -> str | None:
    try:
        shlex.split(text)
    except ValueError as error:
        return f"it should be a command line ({error})"
    return None


RULES: dict[str, Rule] = {
    "CC": _command,
    "KDA_CACHE_DIR": _folder,
    "KDA_CAUSAL": _one_of("0", "1"),
    "KDA_CHECK_VALUES": _one_of("0", "1"),
    "KDA_CUTE_CACHE_SIZE": _like("0*[1-9][0-9]{0,8}", "it should be a whole number from 1 on"),
    "KDA_SANITIZE": _one_of("0", "1"),
    "KDA_TRITON_ARCH": _one_of(*SHARED_KIB),
    "KDA_VLLM": _one_of("0", "1"),
    "TRITON_CACHE_DIR": _folder,
    "TRITON_INTERPRET": _one_of("0", "1"),
    "TRITON_OVERRIDE_ARCH": _like("sm[0-9]+", "it should be sm and a number: sm80"),
    "XDG_CACHE_HOME": _folder,
}


def read(name: str) -> str | None:
    """What the variable holds; None if it is not set, or empty.

    Raises:
        InputError: it may not hold that.
    """
    check({name: RULES[name]})
    return os.environ.get(name) or None


def check(rules: Mapping[str, Rule] = RULES) -> None:
    """Raises `InputError` for the first variable that holds what it may not."""
    for name, rule in rules.items():
        if (text := os.environ.get(name)) and (wanted := rule(text)) is not None:
            raise InputError(name, f"is {text}", wanted)
