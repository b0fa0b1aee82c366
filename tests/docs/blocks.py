"""The examples of README.md and docs/: every fenced block, found by itself, and what it is.

A block is run, checked, or marked with a reason in an HTML comment on the line above it:

    <!-- not run: WHY -->        its commands are still parsed, its Python compiled
    <!-- not an example: WHY --> output, a sketch; nothing is checked
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])

_FENCE = re.compile(
    r"^ *(?P<fence>```+|~~~+)(?P<info>[^\n`]*)\n(?P<body>.*?)^ *(?P=fence)\s*$", re.M | re.S
)
_MARK = re.compile(r"<!--\s*(not run|not an example|measured:begin):?\s+(\S.*?)-->\s*\Z", re.S)
_SHELL = {"", "bash", "sh", "shell", "console"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Path below the checkout.
        line: Of the fence, counted from 1.
        language: What stands behind the fence.
        body: The text between the fences.
        mark: `not run`, `not an example` or nothing.
    """

    page: str
    line: int
    language: str
    body: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def kind(self) -> str:
        """shell, python, sql, yaml, json, ini, folder (a listing of a lake), or unknown."""
        if self.mark == "not an example":
            return "marked"
        if self.language in _SHELL:
            commands = list(self.commands())
            if commands and all(is_command(words) for words in commands):
                return "shell"
            listed = [line for line in self.body.splitlines() if line[:1].strip()]
            return "folder" if all(re.match(r"[\w./-]+  +\w", one) for one in listed) else "unknown"
        known = {"python", "sql", "yaml", "json", "ini"}
        return self.language if self.language in known else "unknown"

    def commands(self) -> list[list[str]]:
        """The words of each command, comments and prompts off, over several lines where quoted."""
        found: list[list[str]] = []
        held = ""
        for line in self.body.replace("\\\n", " ").splitlines():
            if self.language == "console" and not held and not line.startswith("$ "):
                continue  # what the command printed
            held += (line.removeprefix("$ ") if not held else line) + "\n"
            try:
                words = shlex.split(held, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            held = ""
            if words:
                found.append(words)
        return [*found, ["?", held]] if held else found


def is_command(words: list[str]) -> bool:
    """Whether the line starts as a command does that the documentation may use."""
    return words[0] in PROGRAMS or bool(re.match(r"[A-Z_]+=", words[0]))


#: What may stand at the start of a line of a shell example. `sgcd` and `make` are checked.
PROGRAMS = {
    "sgcd", "make", "export", ".", "cd", "cat", "git", "pip", "python", "ray", "kubectl", "docker",
    "aws", "curl", "ssh", "mlflow", "crontab", "jupyter", "apptainer", "sbatch", "promtool",
}  # fmt: skip


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page but directives of the site's builder."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        info = match["info"].strip()
        if info.startswith("{"):
            continue
        mark = _MARK.search(text[: match.start()])
        kind = mark[1] if mark else ""
        found.append(
            Block(
                str(page.relative_to(ROOT)), text.count("\n", 0, match.start()) + 1,
                info.split(" ")[0], textwrap.dedent(match["body"]),
                "not an example" if kind == "measured:begin" else kind,
            )
        )  # fmt: skip
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
