"""`kda capture`: runs a program and writes dumps of its KDA calls."""

from typing import TYPE_CHECKING

import click

from kda_kernels.errors import CheckFailedError, InputError
from kdacli import options
from kdacli.values import Count, Lens

if TYPE_CHECKING:
    from kdacli.capture.launch import Result
    from kdacli.capture.settings import Settings

FEW = 8  # calls, of which kda compare's table each is not too long to read
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Bytes(click.ParamType):
    """A size: 500M, 2G, 1.5G."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("b")
        try:
            return int(float(text.rstrip("kmgt")) * _UNITS.get(text[-1:], 1))
        except (ValueError, OverflowError):
            self.fail(f"{value} is not a size such as 500M or 2G", param, ctx)


@click.command("capture")
@click.option(
    "--target",
    "targets",
    multiple=True,
    required=True,
    metavar="TARGET",
    help="module:function, or all of sglang's, vllm's, fla's or (kda) ours; repeatable.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder for the dumps, made if it is not there.")
@click.option("--calls", type=Count(), default=1, help="How many calls of each target to take. Default: 1.")
@click.option("--skip", type=Count(0), default=0, help="Leave out so many calls first.")
@click.option("--every", type=Count(), default=1, help="Then take one call in so many.")
@click.option("--ranks", type=Lens(), metavar="N,N,...", help="Only these ranks. Default: all.")
@click.option("--layers", type=Lens(), metavar="N,N,...", help="Only these layers; calls are then counted for each.")
@click.option("--max-bytes", type=Bytes(), default="1G", help="Write no more than this in all. Default: 1G.")
@click.option("--pool", type=click.Choice(["used", "whole"]), default="used", help="Slots to write. Default: used.")
@click.option("--replays", type=Lens(), metavar="N,N,...", help="Of CUDA graphs, write these replays; 1 is the first.")
@click.option("--graph-bytes", type=Bytes(), default="1G", help="GPU memory for copies in graphs. Default: 1G.")
@click.option("--name", "names", multiple=True, metavar="THEIRS=OURS", help="What an argument means; repeatable.")
@options.force_option
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM ...")
def command(
    targets: tuple[str, ...],
    out: str,
    calls: int,
    skip: int,
    every: int,
    ranks: tuple[int, ...] | None,
    layers: tuple[int, ...] | None,
    max_bytes: int,
    pool: str,
    replays: tuple[int, ...] | None,
    graph_bytes: int,
    names: tuple[str, ...],
    force: bool,
    program: tuple[str, ...],
) -> None:
    """Run PROGRAM and write the inputs and outputs of its KDA calls.

    PROGRAM is any command: python serve.py, torchrun ..., vllm serve ...; or just a Python file or -m MODULE. All
    Python processes that it starts record, each with a count of its own. A target is replaced where it lives and
    where it was imported to; of targets that call each other the outermost is recorded. Results do not change: inputs
    are copied before the call, on its stream, and what the target raises passes through (the dump then has no outputs).

    Dumps are .pt files, one for each call, that `kda compare DIR` reads. Of a state pool they hold the slots that the
    call uses, before and after it, numbered anew (--pool whole: all slots). Argument names are matched with those of
    FLA, SGLang and vLLM; for others use --name.

    Calls under CUDA graphs are recorded with --replays: copies of their tensors become part of each graph, within
    --graph-bytes on the GPU, and after the replays that are named another thread writes them out. Of each graph the
    first --calls calls of each target are taken, of the layers that --layers names.

    Speculative calls are recorded with their slots, accepted tokens and the states of their tokens, and fused steps
    with their convolution and norm. Counted and told, but not recorded: trees of drafts, states that are kept as
    records, and vLLM's step that projects its gate too.
    Code compiled by torch.compile never calls the target: turn that off in the engine (vLLM: --enforce-eager).

    Exits with the program's exit code if that is not 0, and with 1 if nothing was recorded.

    \b
    Examples:
      kda capture --target fla.ops.kda:chunk_kda --calls 3 --out dumps -- python serve.py
      kda capture --target vllm --ranks 0 --layers 0,3 --out dumps -- vllm serve MODEL --enforce-eager
      kda capture --target sglang --layers 0 --replays 1,10,100 --out dumps -- sglang serve ...
      kda capture --target mine.kernels:kda --name gates=g --out dumps -- torchrun --nproc-per-node 2 train.py
    """
    from kdacli.capture import launch
    from kdacli.capture.session import prepare
    from kdacli.capture.settings import Settings

    settings = Settings(
        targets=targets,
        out=_absolute(out),
        calls=calls,
        skip=skip,
        every=every,
        ranks=ranks,
        layers=layers,
        max_bytes=max_bytes,
        whole_pool=pool == "whole",
        replays=replays or (),
        graph_bytes=graph_bytes,
        names=_names(names),
    )
    prepare(settings.out, force)
    result = launch.run(program, settings)
    _report(out, settings, result)
    if result.exit_code:
        raise click.exceptions.Exit(result.exit_code if result.exit_code > 0 else 128 - result.exit_code)
    if not result.files:
        raise CheckFailedError(_why_nothing(settings, result))


def _absolute(out: str) -> str:
    from pathlib import Path

    return str(Path(out).absolute())


def _names(pairs: tuple[str, ...]) -> dict[str, str]:
    from kdacli.dumps.names import INPUTS, OPTIONS, ours

    names = {}
    for pair in pairs:
        theirs, equals, known = pair.partition("=")
        if not equals or not (ours(known, INPUTS) or ours(known, OPTIONS)):
            raise InputError(f"--name {pair} is not THEIRS=OURS, with one of {', '.join((*INPUTS, *OPTIONS))}")
        names[theirs] = known
    return names


def _report(out: str, settings: "Settings", result: "Result") -> None:
    from kdacli.output import fmt_bytes, say

    if result.exit_code < 0:
        say(f"the program was ended by signal {-result.exit_code}", stderr=True)
    elif result.exit_code:
        say(f"the program ended with exit code {result.exit_code}", stderr=True)
    for (target, reason), calls in result.left_out.items():
        say(f"not recorded: {calls} or more calls of {target}: {reason}", stderr=True)
    if result.files:
        count, total = len(result.files), sum(size for _, size in result.files)
        reader = "kda compare" if count <= FEW else "kda verify --dump"  # which has a table of all calls
        say(f"{count} call{'s' if count > 1 else ''}, {fmt_bytes(total)}, in {out}: {reader} {out}")


def _why_nothing(settings: "Settings", result: "Result") -> str:
    from kdacli.capture.sites import SITES

    what = " or ".join(settings.targets)
    if result.left_out:
        return "nothing was recorded: no call that was seen can be"
    if result.notes:
        return f"nothing was recorded: {result.notes[0]}"
    if result.found:
        filters = " on these ranks and layers" if settings.ranks or settings.layers else ""
        after = f" more than {settings.skip} times" if settings.skip else ""
        return f"nothing was recorded: {' and '.join(result.found)} was never called from Python{after}{filters}"
    if result.missing:
        site = SITES.get(result.missing[0])
        known = f" (it is in releases {site.releases})" if site and site.releases else ""
        return f"nothing was recorded: {result.missing[0]} is not there, or is no function{known}"
    return f"nothing was recorded: the program never imported {what}"
