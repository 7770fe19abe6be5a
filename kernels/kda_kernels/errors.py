"""The errors a user of kda can meet, and the exit code each one means on the command line."""


class KdaError(Exception):
    """Base of every error raised on purpose. The message is one line a person can act on."""

    exit_code = 1


class CheckFailedError(KdaError):
    """A check ran and the kernel did not pass it (exit 1)."""

    exit_code = 1


class InputError(KdaError, ValueError):
    """An argument, file or option is wrong: the message names it, what it is and what it should be (exit 2)."""

    exit_code = 2


class UnavailableError(KdaError, RuntimeError):
    """This machine lacks something: the message says what, and how to get it (exit 3)."""

    exit_code = 3
