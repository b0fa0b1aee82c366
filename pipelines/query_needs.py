"""What a SELECT needs to be given: which tables, and of these which partitions.

Works on the syntax tree that DuckDB writes as JSON. It may only ever ask for too much: what it does
not understand counts as unfiltered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.catalog_rows import nearest
from sgcd_core.errors import UsageError

#: Column → values; a row with another value cannot matter to the statement.
Filters = dict[str, list[str]]
Node = dict[str, Any]

#: Functions that make rows out of their arguments alone. Every other one in FROM is refused: most
#: read files, and `query` hides a statement in a string.
ROW_FUNCTIONS = ("range", "generate_series", "unnest", "json_each", "json_tree")


def find_needs(tree: Mapping[str, Any], views: Mapping[str, Sequence[str]]) -> dict[str, Filters]:
    """View → filters, for every view the statement reads.

    Args:
        tree: One statement, as `json_serialize_sql` gives it.
        views: View → its partition columns.

    Raises:
        UsageError: QUERY-INVALID for an unknown table; QUERY-REFUSED for a file, an address, or a
            function that does not belong in FROM.
    """
    nodes = list(_walk(tree))
    named = {str(c["key"]).lower() for n in nodes for c in _ctes(n)}
    filters: dict[int, Filters] = {}
    for node in nodes:
        if node.get("type") == "SELECT_NODE":
            filters |= _where(node)
    needs: dict[str, list[Filters]] = {}
    for node in nodes:
        kind = node.get("type")
        if kind == "TABLE_FUNCTION":
            _check_function(node)
        elif kind == "BASE_TABLE":
            name = _view(node, views, named)
            if name is not None:
                needs.setdefault(name, []).append(filters.get(id(node), {}))
    return {name: _any_of(found, views[name]) for name, found in needs.items()}


def _walk(tree: Any) -> Iterator[Node]:
    """Every object of the tree, without recursion: the depth is the statement's choice."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _ctes(node: Node) -> list[Node]:
    found: list[Node] = (node.get("cte_map") or {}).get("map") or []
    return found


def _check_function(node: Node) -> None:
    name = str((node.get("function") or {}).get("function_name", "")).lower()
    if name not in ROW_FUNCTIONS:
        raise UsageError(
            f"{name or 'this function'}() may not be used in FROM.", code="QUERY-REFUSED",
            hint=f"Read the catalog's tables; functions there: {', '.join(ROW_FUNCTIONS)}.",
        )  # fmt: skip


def _view(node: Node, views: Mapping[str, Sequence[str]], named: set[str]) -> str | None:
    """The view a table reference means; None for one of the statement's own or a list of columns.

    A statement's own table may hide a view: then the view is needed too, which costs only time.
    """
    name, schema = str(node.get("table_name", "")), str(node.get("schema_name", "")).lower()
    if schema == "information_schema" and name.lower() in ("tables", "columns"):
        return None
    if node.get("at_clause"):
        raise UsageError(
            "AT (VERSION …) cannot be used here.", code="QUERY-REFUSED",
            hint="Give the version or date beside the statement: --as-of.",
        )  # fmt: skip
    if schema in ("", "main") and name.lower() in views:
        return name.lower()
    if schema == "" and name.lower() in named:
        return None
    if any(sign in name for sign in "./\\:*?"):
        raise UsageError(
            "files and addresses cannot be read.", code="QUERY-REFUSED",
            hint=f"Tables: {', '.join(views)}.",
        )  # fmt: skip
    shown = f"{schema}.{name}" if schema else name
    raise UsageError(
        f"there is no table {shown!r}{nearest(name, views)}.", code="QUERY-INVALID",
        hint=f"Tables: {', '.join(views)}.",
    )  # fmt: skip


def _any_of(found: list[Filters], partitions: Sequence[str]) -> Filters:
    """The filters that hold for every reference to one view."""
    return {
        column: sorted({value for filters in found for value in filters[column]})
        for column in partitions
        if all(column in filters for filters in found)
    }


def _where(select: Node) -> dict[int, Filters]:
    """Reference (by id) → filters, from the terms `column = 'text'` and `column IN ('text', …)`.

    Only such terms, and only beside plain joins: they refuse a missing value, so that a row left
    out could at most have made a row that the term refuses.
    """
    tables = None if select.get("sample") else _tables(select.get("from_table") or {})
    if not tables:
        return {}
    by_name = {str(t.get("alias") or t.get("table_name", "")).lower(): t for t in tables}
    found: dict[int, Filters] = {}
    for term in _terms(select.get("where_clause")):
        names, values = _membership(term)
        if not names or values is None:
            continue
        table = by_name.get(names[0]) if len(names) == 2 else None
        if len(names) == 1 and len(tables) == 1:
            table = tables[0]
        if table is not None:
            mine = found.setdefault(id(table), {})
            before = mine.get(names[-1])
            mine[names[-1]] = values if before is None else [v for v in before if v in values]
    return found


def _tables(source: Node) -> list[Node] | None:
    """The tables of a FROM; None where leaving out rows of one could change what another gives."""
    if source.get("type") == "JOIN":
        plain = source.get("ref_type") in ("REGULAR", "CROSS")
        plain = plain and source.get("join_type") in ("INNER", "LEFT", "RIGHT")
        left, right = _tables(source.get("left") or {}), _tables(source.get("right") or {})
        return left + right if plain and left is not None and right is not None else None
    if source.get("sample") or source.get("column_name_alias"):
        return None
    return [source]


def _terms(clause: Any) -> Iterator[Node]:
    """The terms of a conjunction."""
    waiting = [clause] if isinstance(clause, dict) else []
    while waiting:
        node = waiting.pop()
        if node.get("type") == "CONJUNCTION_AND":
            waiting.extend(node.get("children") or [])
        else:
            yield node


def _membership(term: Node) -> tuple[list[str], list[str] | None]:
    """Column and values of `column = 'text'` or `column IN (…)`; values None for other terms."""
    if term.get("type") == "COMPARE_EQUAL":
        sides = [term.get("left") or {}, term.get("right") or {}]
        if sides[1].get("type") == "COLUMN_REF":
            sides.reverse()
    elif term.get("type") == "COMPARE_IN":
        sides = term.get("children") or [{}]
    else:
        return [], None
    column, *constants = sides
    texts = [_text(constant) for constant in constants]
    values = [text for text in texts if text is not None]
    if column.get("type") != "COLUMN_REF" or len(values) != len(texts):
        return [], None
    return [str(name).lower() for name in column.get("column_names") or []], values


def _text(constant: Node) -> str | None:
    """The text of a string literal, as DuckDB 1.4 and 2.0 write it."""
    if constant.get("class") != "CONSTANT":
        return None
    literal, value = constant.get("literal") or {}, constant.get("value") or {}
    if literal.get("kind") == "STRING":
        return str(literal.get("text"))
    if (value.get("type") or {}).get("id") == "VARCHAR" and not value.get("is_null"):
        return str(value.get("value"))
    return None
