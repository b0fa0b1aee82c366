"""docs/reference.md, generated from the parsers, the settings, the errors and the docstrings.

python -m ray_jobs.reference_docs docs/reference.md     # bring that page up to date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_jobs import outcome
from ray_jobs.bids_parser import build_bids_parser
from ray_jobs.parser import build_parser
from ray_jobs.python_docs import python_door
from sgcd_core.config import PRESETS, SgcdConfig
from sgcd_core.errors import CODES, SgcdError

_HEAD = """\
<!-- Generated: python -m ray_jobs.reference_docs docs/reference.md. Change the code instead. -->

# Reference

Every command, setting, code and Python name that may be relied on, taken from the program itself.
The columns of the tables have a page of their own: [the tables of a lake](catalog.md).
"""

_SETTINGS = """\
## Settings

Order, the later wins: the defaults, a preset, what the lake's scans were prepared with,
`--config FILE` (YAML), `--set group.key=value`. An unknown key or a value out of range is refused
(`CONFIG-KEY`, `CONFIG-VALUE`, exit code 78). The columns `small` and `paper` show only what the
preset changes.
"""

_EXIT_CODES = {
    outcome.DONE: "All done.",
    outcome.WITH_FAILURES: "Finished; scans that failed or were set aside are rows that say why.",
    outcome.STOPPED: "Stopped; the same command again goes on from here.",
}


def reference_markdown() -> str:
    """The whole page."""
    parts = [_HEAD, *commands(), exit_codes(), _SETTINGS, *settings(), error_codes(), python_door()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: on one line, nothing in it taken for markup."""
    return re.sub(r"([|*<>\[\]\\])|(?<!\w)(_)", r"\\\1\2", " ".join(text.split()))


def code(text: str) -> str:
    """Text as code in a cell."""
    return "`" + text.replace("|", "\\|") + "`" if text else ""


def rows(header: list[str], cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]


def commands() -> Iterator[str]:
    """A section for each command, and one for the BIDS App form."""
    yield "## Command line\n"
    yield "`sgcd COMMAND --help` says the same. What is in **bold** must be given.\n"
    parser = build_parser()
    (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    everywhere = set.intersection(
        *(set(one._option_string_actions) for one in sub.choices.values())
    )
    usual = [a for a in sub.choices["status"]._actions if everywhere & set(a.option_strings)]
    yield "\n".join(["Every command takes:", "", *_options(usual, parser._get_formatter()), ""])
    for name, one in sub.choices.items():
        yield _command(f"sgcd {name}", one, everywhere)
    yield _command("BIDS App: sgcd BIDS_DIR OUT_DIR participant", build_bids_parser(), everywhere)


def _command(title: str, parser: argparse.ArgumentParser, known: set[str]) -> str:
    own = [a for a in parser._actions if not known & set(a.option_strings)]
    lines = [f"### {title}", "", parser.description or "", ""]
    lines += [*_options(own, parser._get_formatter()), ""]
    example = (parser.epilog or "").partition(":\n")[2].partition("\n\n")[0]
    if example:
        lines += ["```", *(line.removeprefix("  ") for line in example.splitlines()), "```", ""]
    return "\n".join(lines)


def _options(actions: list[argparse.Action], formatter: argparse.HelpFormatter) -> list[str]:
    """A table of options, those without a name first."""
    cells = []
    for action in sorted(actions, key=lambda a: bool(a.option_strings)):
        shown = code(_spelling(action))
        must = action.required and action.nargs not in ("?", "*", argparse.REMAINDER)
        text, usual = formatter._expand_help(action) if action.help else "", _default(action)
        if usual:  # it has a column of its own
            text = re.sub(rf",?\s*\(?(default: )?{re.escape(usual)}(\.0)?\)?$", "", text)
        cells.append([f"**{shown}**" if must else shown, cell(usual), cell(text)])
    return rows(["option", "default", "meaning"], cells)


def _default(action: argparse.Action) -> str:
    value = action.default
    if value in (None, [], argparse.SUPPRESS) or value is False:
        return ""
    parts = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def _spelling(action: argparse.Action) -> str:
    """`--sites SITE…`, or the name of a positional; of two spellings the one with hyphens."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    value = value or action.dest.upper()
    value = value if isinstance(value, str) else " ".join(value)
    many = action.nargs in ("+", "*", argparse.REMAINDER)
    value = f"{value.rstrip('…')}…" if many else value
    if not action.option_strings:
        return value
    names = ", ".join(n for n in action.option_strings if "_" not in n)
    return names if action.nargs == 0 else f"{names} {value}"


def exit_codes() -> str:
    """Exit codes, from the kinds of errors."""
    found: dict[int, list[str]] = {number: [text] for number, text in _EXIT_CODES.items()}
    kinds: list[type[SgcdError]] = [SgcdError, *SgcdError.__subclasses__()]
    for kind in kinds:
        text = "A fault of this program." if kind is SgcdError else kind.__doc__ or ""
        text = text.partition(" Exit code")[0].strip()
        found.setdefault(kind.exit_code, []).append(text)
    cells = [[str(number), cell(" ".join(found[number]))] for number in sorted(found)]
    return "\n".join(["## Exit codes", "", *rows(["code", "means"], cells), ""])


def settings() -> Iterator[str]:
    """A table for each group of settings."""
    fields = SgcdConfig.model_fields
    plain = {k: f for k, f in fields.items() if not _is_group(f)}
    yield _group("General", "", plain)
    for name, field in fields.items():
        if _is_group(field):
            assert isinstance(field.default, BaseModel)
            kind = type(field.default)
            title = f"{name}: {(kind.__doc__ or '').splitlines()[0].rstrip('.')}"
            yield _group(title, name, kind.model_fields)


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.default, BaseModel)


def _group(title: str, prefix: str, fields: dict[str, FieldInfo]) -> str:
    cells = []
    for name, field in fields.items():
        key = f"{prefix}.{name}" if prefix else name
        changed = [_preset(preset, prefix, name, field) for preset in ("small", "paper")]
        meaning = "; ".join(filter(None, (field.description or "", _allowed(field))))
        cells.append([code(key), code(_text(field.default)), *changed, cell(meaning)])
    header = ["setting", "tiny, the default", "small", "paper", "meaning"]
    return "\n".join([f"### {title}", "", *rows(header, cells), ""])


def _preset(preset: str, prefix: str, name: str, field: FieldInfo) -> str:
    values: dict[str, Any] = PRESETS[preset].get(prefix, {}) if prefix else {"preset": preset}
    return code(_text(values[name])) if name in values and values[name] != field.default else ""


def _text(value: Any) -> str:
    """A value as it is typed after `--set key=`."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _allowed(field: FieldInfo) -> str:
    """Choices and bounds, in words."""
    kinds = [field.annotation, *get_args(field.annotation)]
    choices = [str(c) for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{word} {getattr(limit, sign):g}"
        for limit in field.metadata
        for sign, word in signs.items()
        if hasattr(limit, sign)
    ]
    return "; ".join(filter(None, ("one of " + ", ".join(choices) if choices else "", *bounds)))


def error_codes() -> str:
    """What each code means."""
    lines = ["## Error codes", ""]
    lines += ["Codes are stable. They stand in brackets in messages, and in the column `code`.", ""]
    cells = [[code(name), cell(text)] for name, text in CODES.items()]
    return "\n".join([*lines, *rows(["code", "means"], cells), ""])


def main() -> None:
    """Write the page named on the command line."""
    Path(sys.argv[1]).write_text(reference_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
