"""Prints the score: python -m tests.mutants --suite quick. Exit code 1 if it is under --least."""

import argparse
import json
import sys

from kdacli.device import pick_device
from kdacli.output import bad, console, good, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.0, metavar="SHARE", help="share that must be killed, 0 to 1")
    parser.add_argument("--record", action="store_true", help="hunt anew, and write killers.json")
    args = parser.parse_args()
    device = pick_device(args.device)
    from tests.mutants.score import KILLERS, score

    deaths = score(args.suite, device, args.seed, anew=args.record)
    if args.record:
        KILLERS.write_text(json.dumps({d.mutant.name: d.case for d in deaths if d.case}, indent=1) + "\n")
    killed = [death for death in deaths if death.case is not None]
    rows = [(d.mutant.name, d.mutant.fault, good(d.case) if d.case else bad("survived")) for d in deaths]
    console().print(table(None, ("mutant", "what is wrong with it", "killed by"), rows))
    share = len(killed) / len(deaths)
    print(f"{args.suite} kills {len(killed)} of {len(deaths)} mutants ({share:.0%})")
    return 0 if share >= args.least else 1


sys.exit(main())
