"""`sgcd`: parse, run one command, print one summary, leave with an exit code a scheduler can read.

Nothing heavy is imported here: `sgcd --help` must answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray_jobs.bids_parser import build_bids_parser, is_bids_app
from ray_jobs.outcome import STOPPED, Outcome
from ray_jobs.parser import COMMANDS, build_parser
from sgcd_core.errors import SgcdError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sgcd ARGV…` and return its exit code.

    0 all done; 1 finished with failed scans; 2 usage; 65 bad data; 69 storage or cluster out of
    reach; 70 a fault of this program; 75 stopped, run again to resume; 78 bad configuration.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_bids_parser() if is_bids_app(words) else build_parser()
    try:
        if not is_bids_app(words):
            _check_command(parser, words)
        args = parser.parse_args(words)
    except SystemExit as end:  # argparse: --help, --version and usage errors
        return end.code if isinstance(end.code, int) else UsageError.exit_code
    if not getattr(args, "command", None):
        parser.print_help()
        return UsageError.exit_code
    args.debug = getattr(args, "debug", False) or getattr(args, "verbose", 0) > 1
    _logging(args.debug)
    try:
        with _sigterm_stops():
            outcome = _run(args)
    except SgcdError as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        _fail(args, error.code, str(error), error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        text = "stopped; run the same command again to go on from here."
        _fail(args, "STOPPED", text, STOPPED)
        return STOPPED
    except BrokenPipeError:
        _nobody_reads()
        return 0
    except Exception as error:
        if getattr(args, "debug", False):
            traceback.print_exc()
        text = (
            f"[INTERNAL] {type(error).__name__} in `sgcd {args.command}`. "
            "Run again with --debug for the traceback, and please report it."
        )
        _fail(args, "INTERNAL", text, SgcdError.exit_code)
        return SgcdError.exit_code
    try:
        print_outcome(args, outcome)
    except BrokenPipeError:
        _nobody_reads()
    return outcome.exit_code


def _check_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End with the command that was probably meant where there is none of that name."""
    if words and words[0] not in COMMANDS:
        for near in difflib.get_close_matches(words[0], COMMANDS, 1):
            parser.error(f"there is no command {words[0]!r}; did you mean {near}?")


def _nobody_reads() -> None:
    """Let what is still printed go nowhere: the reader of `sgcd … | head` has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def execute(words: Sequence[str]) -> tuple[Any, Outcome]:
    """Parsed arguments and outcome of `sgcd WORDS…`; errors are raised, nothing is printed."""
    args = build_parser().parse_args(list(words))
    return args, _run(args)


def _run(args: Any) -> Outcome:
    where = getattr(args, "run", None) or COMMANDS[args.command]
    module, _, function = where.partition(":")
    run = getattr(importlib.import_module(module), function)
    outcome: Outcome = run(args)
    return outcome


def print_outcome(args: Any, outcome: Outcome) -> None:
    """Tables, the summary line and the next command; or one JSON document."""
    if getattr(args, "json", False):
        from pipelines.query_format import plain_value

        document = {
            "command": args.command, "exit_code": outcome.exit_code,
            "summary": outcome.summary, "next": outcome.next, **outcome.data,
        }  # fmt: skip
        plain = plain_value(document)
        print(json.dumps(plain, default=str, ensure_ascii=False, allow_nan=False), flush=True)
        return
    for line in outcome.lines:
        print(line)
    if outcome.summary:
        print(outcome.summary)
    if outcome.next:
        print(f"next: {outcome.next}")
    sys.stdout.flush()


def _fail(args: Any, code: str, text: str, exit_code: int) -> None:
    """One line on stderr; with --json also the one document on stdout."""
    sys.stdout.flush()
    print(f"sgcd {args.command}: {text}", file=sys.stderr, flush=True)
    if getattr(args, "json", False):
        document = {"command": args.command, "exit_code": exit_code, "code": code, "error": text}
        print(json.dumps(document, ensure_ascii=False), flush=True)


def _logging(debug: bool) -> None:
    level = logging.DEBUG if debug else logging.WARNING
    logging.basicConfig(
        level=logging.INFO if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for name in ("ray_jobs", "pipelines", "sgcd_core"):
        logging.getLogger(name).setLevel(level)


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """While open, SIGTERM stops like Ctrl-C, so that what is finished is still committed.

    It must be KeyboardInterrupt: a waiting `ray.get` swallows every other exception.
    """

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


if __name__ == "__main__":
    sys.exit(main())
