"""The command line: `python -m jaxnum tour`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jaxnum.tour import STOPS
from jaxnum.tour.run import load, run, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; without any, print the help.

    Args:
      arguments: what follows `python -m jaxnum`; None takes it from the command line.

    Returns:
      The exit status.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    if given.list:
        for name in STOPS:
            print(f"{name:<12} {summary(load(name))}")
        return 0
    try:
        run(given.only or STOPS, given.out, say=lambda line: print(line, flush=True))
    except ImportError as error:
        if not str(error).startswith("The tour needs"):
            raise
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxnum", description="Functional numerics for JAX.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    help_ = "show the library at work on real data, offline, and write pictures and a page"
    tour = commands.add_parser("tour", help=help_, description=help_[0].upper() + help_[1:] + ".")
    tour.add_argument("--only", action="append", choices=STOPS, metavar="NAME", help="run this stop (may be repeated)")
    tour.add_argument("--out", default="jaxnum-tour", metavar="DIR", help="folder to write to (default: %(default)s)")
    tour.add_argument("--list", action="store_true", help="list the stops and leave")
    return parser


if __name__ == "__main__":
    sys.exit(main())
