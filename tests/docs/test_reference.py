"""docs/reference.md is what the code says today, and every setting explains itself."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from ray_jobs.parser import COMMANDS
from ray_jobs.reference_docs import reference_markdown
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import CODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def test_the_page_is_up_to_date() -> None:
    again = "python -m ray_jobs.reference_docs docs/reference.md"
    assert PAGE.read_text() == reference_markdown(), f"run: {again}"


def test_nothing_is_left_out() -> None:
    page = PAGE.read_text()
    groups = {k: f.default for k, f in SgcdConfig.model_fields.items()}
    keys = [
        f"{group}.{key}" if isinstance(value, BaseModel) else group
        for group, value in groups.items()
        for key in (type(value).model_fields if isinstance(value, BaseModel) else [group])
    ]
    names = [*(f"### sgcd {name}\n" for name in COMMANDS), *(f"| `{k}` |" for k in [*keys, *CODES])]
    assert [name for name in names if name not in page] == []


def test_every_setting_has_a_description() -> None:
    groups = [SgcdConfig, *(type(f.default) for f in SgcdConfig.model_fields.values())]
    silent = [
        f"{kind.__name__}.{name}"
        for kind in groups
        if issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items()
        if not field.description and not isinstance(field.default, BaseModel)
    ]
    assert silent == []
