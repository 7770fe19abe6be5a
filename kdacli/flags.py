"""The flags that commands share, and how a command's help groups them.

A flag's default is None, which means "not given": only so can a contradiction be told from a default.
"""

from collections.abc import Callable, Sequence
from typing import Any

import click

from kda_kernels.dtypes import STATES
from kda_kernels.errors import InputError
from kda_kernels.problem import ROUNDINGS, Gate, Op
from kdacli.presets import PRESETS
from kdacli.values import Count, DType, Lens

_MAX_SEQS, _MAX_DIM = 1 << 20, 1 << 16


def _choice(flags: str, choices: list[str], text: str) -> Callable:
    return click.option(*flags.split(), type=click.Choice(choices), help=text)


def _switch(name: str, text: str) -> Callable:
    return click.option(name, is_flag=True, default=None, help=text)


def _dtype(name: str, text: str) -> Callable:
    return click.option(name, type=DType(), metavar="DTYPE", help=text)


SECTIONS = {
    "Problem": (
        _choice("--op", [op.value for op in Op], "The operation."),
        click.option("--dump", metavar="FILE", help="Tensors from a .pt or .safetensors file, instead of a shape."),
        click.option("--call", metavar="NAME", help="Which call, in a dump that holds several."),
        click.option("-N", "--seqs", type=Count(1, _MAX_SEQS), help="Sequences."),
        click.option("-T", "--tokens", type=Count(), help="Tokens of each sequence: 8192, 8k, 1M."),
        click.option("--lens", type=Lens(), metavar="N,N,...", help="Length of each sequence, instead of -N and -T."),
        click.option("--model", type=click.Choice(list(PRESETS)), help="Heads and gate of a published model."),
        click.option("--tp", type=int, metavar="GPUS", help="Tensor-parallel GPUs that share the model's heads."),
        click.option("-H", "--heads", type=Count(1, _MAX_DIM), help="Query/key heads."),
        click.option(
            "--v-heads",
            type=Count(1, _MAX_DIM),
            help="Value heads, a multiple of the query/key heads. Default: the same number.",
        ),
        click.option("--head-dim", type=Count(1, _MAX_DIM), help="K, and V unless given. Default: 128."),
        click.option("--v-head-dim", type=Count(1, _MAX_DIM), help="V."),
    ),
    "Gate, beta and scale": (
        _choice("--gate", [gate.value for gate in Gate], "What makes a log decay of g. Default: safe."),
        click.option(
            "--lower-bound", type=float, help="Bound of the safe gate, or of g with none. Default: -5 if safe."
        ),
        _switch("--beta-values", "beta is a value in (0, 1), not a logit."),
        _switch("--allow-neg-eigval", "beta is 2 sigmoid(logit)."),
        _switch("--no-l2norm", "q and k come normalised."),
        click.option("--scale", type=float, help="Factor on q. Default: K^-0.5."),
    ),
    "Types and layouts (DTYPE is bf16, fp16 or fp32)": (
        _dtype("--dtype", "Of q, k, v and the output. Default: bf16."),
        _dtype("--g-dtype", "Of the gate. Default: as q."),
        _dtype("--beta-dtype", "Of beta. Default: as q."),
        _dtype("--param-dtype", "Of A_log and dt_bias. Default: fp32."),
        click.option(
            "--state-dtype",
            type=DType(STATES),
            metavar="DTYPE",
            help="Of the state, a pool's also int16. Default: fp32.",
        ),
        _choice("--state-rounding", list(ROUNDINGS), "Of a pool in two bytes. Default: nearest."),
        click.option("--dense/--packed", default=None, help="[N, T, ..], or [1, total, ..] with cu_seqlens."),
        click.option(
            "--pool",
            type=Count(0),
            metavar="SLOTS",
            help="State pool, updated in place. Decode, and where one is needed: 2N; 0: none.",
        ),
        click.option("--padding", type=Count(0), help="How many sequences have state index -1."),
        _switch("--no-initial-state", "Start from zero."),
        _switch("--no-final-state", "Do not ask for the final state."),
        _switch("--state-k-first", "State [.., K, V] instead of [.., V, K]."),
    ),
    "Parts of a step, and the convolution before a prefill": (
        click.option(
            "--conv-width",
            type=Count(0, 4),
            help="Tokens that the convolution sees; 0: none. Default: 4; before a prefill none, unless said.",
        ),
        _switch("--conv-bias", "The convolution has a bias."),
        _dtype("--conv-dtype", "Of its weight and bias. Default: bf16."),
        _dtype("--conv-state-dtype", "Of its states. Default: bf16."),
        _switch("--channels-first", "Its states are [.., D, L] instead of [.., L, D]."),
        _switch("--no-norm", "o is neither normalised nor gated."),
    ),
    "Random numbers": (
        _choice(
            "--gates", ["bench", "init", "weak"], "Gate regime: short, a new layer's, or long memory. Default: bench."
        ),
        _choice("--keys", ["random", "near-collinear"], "Kind of keys. Default: random."),
        click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), metavar="COUNT", help="Default: 0."),
    ),
}

json_option = click.option("--json", "json_dest", metavar="FILE", help="Write a JSON report to FILE, or - for stdout.")
force_option = click.option("--force", is_flag=True, help="Overwrite files.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Default: a GPU if there is one."
)
kernel_option = click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="NAME",
    help="A kernel, or your own: path.py:function, package.module:function. May be repeated.",
)


def problem_options(command: Callable) -> Callable:
    """Decorator: every flag of `SECTIONS`. The command receives those it does not name itself in **params."""
    for option in reversed([option for section in SECTIONS.values() for option in section]):
        command = option(command)
    return command


def _names() -> dict[str, str]:
    """Each shared parameter's section, by name."""
    found: dict[str, str] = {}
    for title, section in SECTIONS.items():
        command = click.Command(title)
        for option in section:
            option(command)
        found |= {str(parameter.name): title for parameter in command.params}
    return found


_SECTION_OF = _names()
SHAPE_FLAGS = tuple(name for name in _SECTION_OF if name not in ("op", "dump", "call"))


def flag(name: str, value: Any = None) -> str:
    """A parameter as the user types it."""
    return "--packed" if name == "dense" and value is False else "--" + name.replace("_", "-")


_USUAL = ("op", "dump", "model", "tp", "seqs", "tokens", "heads", "gate", "gates", "kernels", "json_dest")


class SectionedCommand(click.Command):
    """A command with many flags: --help shows the usual ones on one screen, --help-all every one in its section.

    Attributes:
        usual: parameters of the command's own that --help shows too.
    """

    def __init__(self, *args: Any, usual: tuple[str, ...] = (), **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.usual = (*usual, *_USUAL)
        whole = "Show every flag, and all there is to say."
        self.params.append(
            click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all, help=whole
            )
        )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """In the short form the first two paragraphs and the examples."""
        text = self.help or ""
        if not ctx.meta.get(_WHOLE):
            paragraphs = text.split("\n\n")
            self.help = "\n\n".join(
                [*paragraphs[:2], *(p for p in paragraphs[2:] if p.lstrip("\b\n ").startswith("Examples:"))]
            )
        try:
            super().format_help_text(ctx, formatter)
        finally:
            self.help = text

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *SECTIONS)}
        left = 0
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                if ctx.meta.get(_WHOLE) or parameter.name in (*self.usual, "help", "help_all"):
                    sections[_SECTION_OF.get(str(parameter.name), "Options")].append(record)
                else:
                    left += 1
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)
        if left:
            formatter.write_paragraph()
            formatter.write_text(f"{left} more flags: {ctx.command_path} --help-all")


_WHOLE = "kdacli.help-all"


def _help_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[_WHOLE] = True
        click.echo(ctx.get_help())
        ctx.exit()


def require_alone(ctx: click.Context, allowed: Sequence[str], beside: str) -> None:
    """Raises `InputError` for a flag of the command line that `beside` has no use for."""
    for parameter in ctx.command.params:
        typed = ctx.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
        if typed and parameter.name not in allowed:
            raise InputError(f"{parameter.opts[0]} is given with {beside}: leave one out")
