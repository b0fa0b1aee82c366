"""The Python names that a user may rely on, as Markdown from their docstrings."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

#: What notebooks and other programs may use; everything else may change without notice.
DOOR = (
    "pipelines.catalog:Catalog",
    "pipelines.catalog:Catalog.query",
    "pipelines.catalog:Catalog.rows",
    "pipelines.catalog:Catalog.history",
    "pipelines.catalog:Catalog.frame",
    "pipelines.catalog:Catalog.tables",
    "pipelines.query:QueryLimits",
    "pipelines.prepare:load_prepared",
    "sgcd_core.io.nifti:read_nifti",
    "sgcd_core.io.nifti:to_ras",
    "sgcd_core.config:load_config",
    "sgcd_core.modelpack:load_modelpack",
    "sgcd_core.harmonizer:Harmonizer",
    "sgcd_core.harmonizer:Harmonizer.harmonize",
    "sgcd_core.metrics:measure_all",
)

_INTRO = """\
## Python

Reading needs no cluster and starts none. Errors are `sgcd_core.errors.SgcdError`, with `.code`.
"""


def python_door() -> str:
    """A section for each name in `DOOR`."""
    return "\n".join([_INTRO, *(_one(address) for address in DOOR)])


def _one(address: str) -> str:
    module, _, path = address.partition(":")
    thing: Any = importlib.import_module(module)
    for name in path.split("."):
        thing = getattr(thing, name)
    lines = [f"### {path}", "", f"`{_signature(path, thing)}`", ""]
    if "." not in path:
        lines += [f"From `{module}`.", ""]
    return "\n".join([*lines, *_markdown(inspect.getdoc(thing) or "")])


def _signature(path: str, thing: Any) -> str:
    """Name and arguments without their types, which the text below says in words."""
    given = list(inspect.signature(thing).parameters.values())
    shown = [p.replace(annotation=p.empty) for p in given if p.name != "self"]
    return f"{path}{inspect.Signature(shown)}"


def _markdown(text: str) -> Iterator[str]:
    """A docstring in Google style as paragraphs and lists."""
    listed = False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Raises):", line):
            listed = line != "Returns:"
            yield from (f"*{line[:-1]}*", "")
        elif listed and (item := re.match(r"    (\w+): (.*)", line)):
            yield f"- `{item[1]}`: {_plain(item[2])}"
        else:
            yield ("  " if listed and line else "") + _plain(line.strip())
            listed = listed and bool(line)
    yield ""


def _plain(text: str) -> str:
    return re.sub(r"([*<>\[\]])", r"\\\1", text)
