"""What a child process of this program needs to find its packages, wherever those lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def python_path() -> str:
    """PYTHONPATH of a child: this program, then all of `sys.path`, each an absolute path.

    A user's own site-packages, PYTHONPATH and module systems are all in there.
    """
    root = Path(__file__).resolve().parents[1]
    return os.pathsep.join(
        str(path) for path in (root, *(Path(p).resolve() for p in sys.path if p))
    )
