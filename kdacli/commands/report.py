"""`kda report`: one HTML page from records."""

import click

from kda_kernels.errors import InputError
from kdacli import options


@click.command("report")
@click.argument("records", nargs=-1, required=True, metavar="RECORD...")
@click.option("--output", "-o", default="report.html", show_default=True, help="The page; - for stdout.")
@click.option("--baseline", metavar="FILE", help="An earlier record of kda profile, to say what changed since.")
@click.option("--title", default="kda report", show_default=True, help="Heading of the page.")
@options.force_option
def command(records: tuple[str, ...], output: str, baseline: str | None, title: str, force: bool) -> None:
    """Make one self-contained HTML page from records of verify, profile, compile and compare.

    RECORD is what --json of these commands wrote. The page needs no network: verdicts with maps of the failing places,
    times with their intervals beside peers, sweeps, registers and spills, and the command of each. Records of kda
    verify --shard become one run; a missing shard is an error.

    \b
    Examples:
      kda report verify.json profile.json -o report.html
      kda report now.json --baseline benchmarks/prefill-h100.json
      kda report shard-*.json -o fleet.html
    """
    from kdacli.output import check_dest, say, write_text
    from kdacli.report import page, parts
    from kdacli.report.records import joined, read, shown

    check_dest(output, force)
    page.require()
    sources = joined([read(path) for path in records])
    found = [part for source in sources for part in shown(source)]
    if baseline:
        profiles = [source for source in sources if source.data["schema"] == "kda.profile/2"]
        if len(profiles) != 1:
            raise InputError(f"--baseline is for one record of kda profile, and there are {len(profiles)}")
        found.append(parts.changes(read(baseline).data, profiles[0].data))
    write_text(page.render(found, title), output, force)
    if output != "-":
        say(f"{output}: {len(found)} sections of {len(records)} records")
