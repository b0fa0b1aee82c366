"""The build puts the pinned viewer into the package, or says that it could not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = """
[project]
name = "small"
version = "1"
[tool.setuptools]
packages = ["pipelines.viewer"]
[tool.setuptools.package-data]
"*" = ["static/*"]
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The build file with the viewer's package and nothing else."""
    static = tmp_path / "pipelines" / "viewer" / "static"
    static.mkdir(parents=True)
    (static.parent / "__init__.py").touch()
    (static / "viewer.js").write_text("// ours")
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def build(tree: Path, *folders: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": os.pathsep.join(map(str, folders)), **more}
    return subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", "out"],
        cwd=tree, capture_output=True, text=True, env=environment,
    )  # fmt: skip


def fake_npm(tree: Path) -> Path:
    """A program that packs something else under the pinned name."""
    folder = tree / "bin"
    folder.mkdir()
    packed = tree / "other.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tree / "setup.py", "package/dist/index.js")
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\nfor last; do :; done\n/bin/cp "{packed}" "$last"\n')
    npm.chmod(0o755)
    return folder


def test_without_npm_the_package_is_built_and_says_so(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    assert "built without the 3D viewer (npm is not installed)" in done.stderr
    assert (tree / "out" / "pipelines" / "viewer" / "static" / "viewer.js").is_file()


def test_a_release_is_not_built_without_it(tree: Path) -> None:
    assert build(tree, SGCD_VIEWER="required").returncode != 0


def test_another_package_under_the_name_is_refused(tree: Path) -> None:
    done = build(tree, fake_npm(tree))
    assert done.returncode != 0 and "is not the package that was pinned" in done.stderr
    assert not (tree / "pipelines" / "viewer" / "static" / "niivue.js").exists()


def test_what_is_there_is_not_fetched_again(tree: Path) -> None:
    code = (tree / "setup.py").read_text()
    name = code.partition('PACKAGE = "')[2].partition('"')[0]
    library = tree / "pipelines" / "viewer" / "static" / "niivue.js"
    library.write_text(f"// {name}\nexport const kept = true;\n")
    assert build(tree, SGCD_VIEWER="required").returncode == 0  # npm is not even looked for
    assert "kept" in (tree / "out" / library.relative_to(tree)).read_text()
