"""The errors that a user of kda can meet, and how any error becomes one line."""

from collections.abc import Mapping


class KdaError(Exception):
    """Base of every error raised on purpose. The message is one line a person can act on."""


class CheckFailedError(KdaError):
    """A check ran and the kernel did not pass it."""


class InputError(KdaError, ValueError):
    """An argument, file or option is wrong: `InputError("q", "has 0 heads", "it should have at least 1")`.

    The message is "q has 0 heads: it should have at least 1". An error that is about no single argument is given as one
    text, which is then `found`.

    Attributes:
        argument: the name of what is wrong; None where the error is one text.
        found: what it is, as the rest of a sentence that begins with the name.
        wanted: what it should be, as a sentence; None where the error is one text.
    """

    def __init__(self, argument: str, found: str | None = None, wanted: str | None = None) -> None:
        super().__init__(*(text for text in (argument, found, wanted) if text is not None))
        self.argument = None if found is None else argument
        self.found = argument if found is None else found
        self.wanted = wanted

    def __str__(self) -> str:
        return self.found if self.argument is None else f"{self.argument} {self.found}: {self.wanted}"

    def renamed(self, names: Mapping[str, str]) -> "InputError":
        """The same error about an argument that its caller calls `names[argument]`."""
        if self.argument is None:
            return self
        return InputError(names.get(self.argument, self.argument), self.found, self.wanted)


class UnavailableError(KdaError, RuntimeError):
    """This machine lacks something: the message says what, and how to get it."""


def one_line(error: object, limit: int | None = None) -> str:
    """An error, or any text, in one line of at most `limit` characters; an error that is not ours with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and not isinstance(error, KdaError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."
