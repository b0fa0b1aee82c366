"""Imports point one way: ray_jobs → pipelines → sgcd_core. Read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: What each package must not import, at any depth of any function.
FORBIDDEN = {
    "sgcd_core": {
        "pipelines", "ray_jobs", "ray", "mlflow", "deltalake", "duckdb", "argparse", "pandas",
    },
    "pipelines": {"ray_jobs", "ray"},
    "ray_jobs": set(),
}  # fmt: skip


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level module of every absolute import, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.partition(".")[0]


def breaches(package: str) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for line, module in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if module in FORBIDDEN[package]:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package: str) -> None:
    assert list((ROOT / package).rglob("*.py")), f"{package} is empty: nothing was checked"
    assert breaches(package) == []


def test_the_check_sees_an_import_inside_a_function() -> None:
    tree = ast.parse("def f():\n    from ray.train import report\n    import mlflow.client\n")
    assert {module for _, module in imported(tree)} == {"ray", "mlflow"}


def test_no_module_uses_relative_imports() -> None:
    """A relative import would slip past the check above."""
    for package in FORBIDDEN:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}:{node.lineno}"


@pytest.mark.parametrize(("modules", "heavy"), [
    ("pipelines.check, pipelines.manifest", "torch ray mlflow SimpleITK monai nilearn pandas"),
    # four seconds and 600 MB in each of many processes
    ("pipelines.prepare, pipelines.training_data, ray_jobs.volume_stream, sgcd_core.style.look, "
     "sgcd_core.style.outlier", "torch"),
], ids=["checking", "preparing and measuring"])  # fmt: skip
def test_nobody_pays_for_a_heavy_library_that_is_not_used(modules: str, heavy: str) -> None:
    code = f"import sys, {modules}; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
