"""Puts the 3D viewer of `sgcd serve` into the package: NiiVue, pinned, from the npm registry.

Without npm the package is built all the same, and `sgcd serve` says that it shows slices only;
SGCD_VIEWER=required makes that an error, for releases. All else is in pyproject.toml.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGE = "@niivue/niivue@0.69.0"
SHA512 = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
MEMBER = "package/dist/index.js"
PLACE = Path(__file__).parent / "pipelines" / "viewer" / "static" / "niivue.js"


def put_viewer() -> None:
    """Write `PLACE` from the npm package, unless this version is there already."""
    mark = f"// {PACKAGE}\n"
    if PLACE.is_file() and PLACE.open(encoding="utf-8").readline() == mark:
        return
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", PACKAGE, "--silent", "--pack-destination", folder],
            check=True, timeout=300, stdout=subprocess.DEVNULL, cwd=folder,
        )  # fmt: skip
        (packed,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
        if found != SHA512:
            raise ValueError(f"{PACKAGE} is not the package that was pinned")
        with tarfile.open(packed) as archive:
            member = archive.extractfile(MEMBER)
            assert member is not None
            code = member.read().decode().partition("//# sourceMappingURL=")[0]
    PLACE.write_text(mark + code, encoding="utf-8")


class BuildWithViewer(build_py):
    """`build_py`, with the viewer beside the code."""

    def run(self) -> None:
        """Fetch, then collect the files as ever."""
        try:
            put_viewer()
        except (OSError, subprocess.SubprocessError) as error:
            if os.environ.get("SGCD_VIEWER") == "required":
                raise
            print(f"sgcd-lake: built without the 3D viewer ({error})", file=sys.stderr)
        super().run()


setup(cmdclass={"build_py": BuildWithViewer})
