"""A command as one step of a longer one: printed as a user would type it, run, its end printed."""

from __future__ import annotations

import sys

from ray_jobs.context import quoted
from ray_jobs.outcome import Outcome


def step(quiet: bool, *words: str) -> Outcome:
    """Run `sgcd WORDS…` in this process; errors are raised.

    Args:
        quiet: Keep stdout free, for a command that ends with one JSON document there.
        words: The command and its arguments.
    """
    from ray_jobs.cli import execute, print_outcome

    stream = sys.stderr if quiet else sys.stdout
    print(f"\n$ sgcd {' '.join(quoted(word) for word in words)}", file=stream, flush=True)
    args, outcome = execute(words)
    if not quiet:
        print_outcome(args, outcome)
    return outcome
