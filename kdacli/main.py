"""The command `kda`: a group that knows its commands by name and imports one only when it is called."""

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click

import kdacli
from kda_kernels.errors import InputError, KdaError, UnavailableError, one_line
from kdacli import environment


class Entry(NamedTuple):
    """A command: the group it is listed in, the module that holds it as `command`, and its line in `kda --help`."""

    section: str
    module: str
    help: str


COMMANDS = {
    "run": Entry("Work", "kdacli.commands.run", "Run one kernel and say what came out of it."),
    "verify": Entry("Work", "kdacli.commands.verify", "Check kernels against the fp64 oracle, case by case."),
    "capture": Entry("Work", "kdacli.commands.capture", "Run a program and write dumps of its KDA calls."),
    "compare": Entry("Work", "kdacli.commands.compare", "Run kernels on a dump, or compare two dumps."),
    "profile": Entry("Work", "kdacli.commands.profile", "Time kernels on a GPU: us, GB/s, share of the ceiling."),
    "compile": Entry("Work", "kdacli.commands.compile", "Compile kernels, with no GPU too: registers, spills, sizes."),
    "report": Entry("Look", "kdacli.commands.report", "Make one HTML page from records."),
    "kernels": Entry("Look", "kdacli.commands.kernels", "List the kernels, and say which can run here and why not."),
    "engines": Entry("Look", "kdacli.commands.engines", "List what ours replace in SGLang and vLLM, and why not more."),
}

EPILOG = """\b
Examples:
  kda verify                                      check everything that can run here
  kda run --model kimi-k3 --tp 8 -T 4k            one prefill with Kimi K3's heads on one of 8 GPUs
  kda compare dump.pt                             tensors dumped from a live engine

\b
Exit codes:
  0  good    1  a check failed    2  wrong use or input    3  not possible on this machine
"""


class LazyGroup(click.Group):
    """Lists, suggests and imports `COMMANDS`; turns every error into one line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        entry = COMMANDS.get(name)
        return importlib.import_module(entry.module).command if entry else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {name}: {hint}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl([(name, e.help) for name, e in COMMANDS.items() if e.section == section])

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        words = list(args)  # parsing empties args
        with _unbroken_pipe():
            ctx = super().make_context(info_name, args, *rest, **extra)
        ctx.meta["kdacli.args"] = words
        return ctx

    def main(  # type: ignore[override]  # click spells it as overloads
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Runs the command line and exits with its code. `--debug` may stand anywhere before a "--"."""
        words = list(sys.argv[1:] if args is None else args)
        cut = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:cut]
        words = [word for word in words[:cut] if word != "--debug"] + words[cut:]
        try:
            code = super().main(words, "kda", **{**extra, "standalone_mode": False})
            sys.stdout.flush()
        except (BrokenPipeError, ReaderGoneError):
            # The reader of our output went away, as in `kda kernels | head -1`. Python will flush stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 141
        except Exception as error:
            if debug:
                traceback.print_exc()
            message, code = explain(error)
            click.echo(message, err=True)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        environment.check()
        with _unbroken_pipe():
            return super().invoke(ctx)


class ReaderGoneError(Exception):
    """A broken pipe on its way past click, which would call it exit 1: here that means a failed check."""


@contextlib.contextmanager
def _unbroken_pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def explain(error: Exception) -> tuple[str, int]:
    """The line and the exit code for an error that reached the top."""
    if isinstance(error, click.exceptions.Abort):
        return "Interrupted", 130
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "kda"
        return f"Error: {one_line(error.format_message())} (see {where} --help)", 2
    if isinstance(error, click.ClickException):
        return f"Error: {one_line(error.format_message())}", 2
    if isinstance(error, KdaError):
        return f"Error: {one_line(error)}", exit_code(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"Error: out of memory: {one_line(str(error))}", exit_code(UnavailableError())
    if isinstance(error, OSError):  # a full disk, a library that cannot be loaded
        return f"Error: {one_line(str(error))}", exit_code(UnavailableError())
    return f"Error: internal: {one_line(error)} (rerun with --debug for the traceback)", 1


def exit_code(error: KdaError) -> int:
    """What an error of ours means on the command line: see `EPILOG`."""
    if isinstance(error, InputError):
        return 2
    return 3 if isinstance(error, UnavailableError) else 1


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings=SETTINGS, invoke_without_command=True)
@click.version_option(kdacli.__version__, message="kda %(version)s")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """The workbench for Kimi Delta Attention (KDA) kernels.

    Compiles, runs, verifies, profiles and compares decode, step, prefill and gate kernels, ours and other people's, on
    synthetic tensors or on tensors dumped from a live engine. Every kernel is judged against one fp64 recurrence, every
    time names its gate regime, and what ran is always said. Without a GPU the Triton kernels run in Triton's
    interpreter. Each command explains itself: kda COMMAND --help.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main() -> None:
    """Entry point of the console script."""
    cli.main()
