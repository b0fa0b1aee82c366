"""Templates into pages: every value escaped, nothing fetched, no script but the page's own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
#: Where `sgcd serve` puts a link to its viewer; anywhere else it is a comment.
VIEWER_PLACE = "<!-- viewer -->"


def render(template: str, script: str | None = None, **content: Any) -> bytes:
    """A page.

    Args:
        template: File in `templates/`.
        script: File in `templates/` that the page runs; its digest is the only one allowed.
        **content: Values of the template.
    """
    code = (TEMPLATES / script).read_text(encoding="utf-8") if script else ""
    # Trailing blanks would change the digest that the browser computes.
    code = "\n" + code.strip() + "\n"
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = _environment().get_template(template).render(
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup(code) if script else None, script_digest=digest,
        viewer_place=Markup(VIEWER_PLACE), **content,
    )  # fmt: skip
    return page.encode()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["as_json"] = as_json
    return environment


def as_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@cache
def templates_digest() -> str:
    """Changes whenever the look of a page does."""
    found = hashlib.sha256()
    for path in sorted(TEMPLATES.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def digest_of(content: Mapping[str, Any]) -> str:
    """Identity of a page: what went into it and how it looks."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256((templates_digest() + text).encode()).hexdigest()[:32]
