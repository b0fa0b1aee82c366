"""Which voxels are brain: the mask a scan brings along, or deepbet's.

deepbet (Fisch et al. 2024, Computers in Biology and Medicine 179:108845) runs in a process of its
own: its wheel installs a top-level package `data` and pulls a GUI toolkit, and a worker should hold
neither.
`python -m sgcd_core.volume.strip IN.npy OUT.npy` is that process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.child import python_path
from sgcd_core.config import PrepareConfig
from sgcd_core.errors import InputError
from sgcd_core.volume.resample import bounding_box, voxel_ml, voxel_sides

Array = NDArray[Any]

#: A brain with its inner fluid, ml. A head is at least 2900 ml of voxels that are not background.
EXTRACTED_ML = (500.0, 2300.0)
#: Longest side a brain's bounding box may have, mm.
EXTRACTED_SIDE_MM = 210.0
#: Of an extracted brain so little is darker than a tenth of its bright tissue (measured: brains
#: ≤ 0.02, z-scored ≤ 0.05, heads ≥ 0.20, where skull and air are dark).
EXTRACTED_DARK = 0.30
#: A region of the brain has at least this part of the largest one's voxels.
SPECK = 1e-3
TIMEOUT_S = 600.0
_NO_DEEPBET = 3


def background(data: Array) -> float:
    """The value that most of the eight corner voxels hold."""
    corners = data[np.ix_([0, -1], [0, -1], [0, -1])]
    values, counts = np.unique(corners, return_counts=True)
    return float(values[counts.argmax()])


def nonzero_brain(data: Array, value: float = 0.0) -> Array:
    """What differs from `value`, without specks, its holes filled; (X, Y, Z) bool."""
    return _whole(*_regions(data != value))


def _regions(foreground: Array) -> tuple[Array, Array]:
    """Number of the connected region at each voxel, 0 outside, and voxels of each; `[0]` is 0."""
    labels, _ = ndimage.label(foreground)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels, sizes


def _whole(labels: Array, sizes: Array) -> Array:
    """The regions that are no specks, their holes filled: a cerebellum may be apart."""
    foreground = (sizes >= max(1, SPECK * sizes.max()))[labels]
    out = np.zeros(labels.shape, bool)
    if sizes.any():
        box = bounding_box(foreground)
        out[box] = ndimage.binary_fill_holes(foreground[box])
    return out


def extracted_mask(data: Array, affine: Array) -> Array | None:
    """The brain mask of a scan that is already brain-extracted, None for a head.

    A scan is taken as extracted when all that differs from one constant background is, but for a
    twentieth, a single compact region with the volume and size of a brain and without the dark
    skull and air of a head.

    Args:
        data: (X, Y, Z) float32.
        affine: (4, 4) voxel → mm.

    Returns:
        (X, Y, Z) bool, or None.
    """
    sides, ml = voxel_sides(affine), voxel_ml(affine)
    value = background(data)
    foreground = data != value
    if not EXTRACTED_ML[0] * 0.8 <= foreground.sum() * ml <= EXTRACTED_ML[1]:
        return None
    labels, sizes = _regions(foreground)
    mask = _whole(labels, sizes)
    compact = sizes.max() >= 0.95 * sizes.sum()
    box = bounding_box(labels == sizes.argmax())
    extent = np.array([side.stop - side.start for side in box]) * sides
    plausible = EXTRACTED_ML[0] <= mask.sum() * ml <= EXTRACTED_ML[1]
    small = plausible and extent.max() <= EXTRACTED_SIDE_MM
    if compact and small and _dark_share(data[foreground] - value) <= EXTRACTED_DARK:
        return mask
    return None


def _dark_share(inside: Array) -> float:
    """Which part of the foreground is darker than a tenth of its bright tissue.

    Black is the background, or the darkest tissue where that lies below: so it does of z-scores.

    Args:
        inside: (N,) float32, intensities less the background.
    """
    darkest, bright = np.percentile(inside, (1, 95))
    black = min(float(darkest), 0.0)
    return float((inside < black + 0.1 * (float(bright) - black)).mean())


def brain_mask(
    data: Array, affine: Array, config: PrepareConfig, *, where: str | None = None
) -> tuple[Array, str]:
    """Which voxels are brain, and how that was found.

    Args:
        data: (X, Y, Z) float32, RAS+ axis order, finite.
        affine: (4, 4) voxel → mm.
        config: `brain_extraction` chooses the way.
        where: Address for messages.

    Returns:
        ((X, Y, Z) bool, "given" or "deepbet").

    Raises:
        InputError: As `run_deepbet`.
    """
    if config.brain_extraction == "none":
        return nonzero_brain(data), "given"
    if config.brain_extraction == "auto":
        mask = extracted_mask(data, affine)
        if mask is not None:
            return mask, "given"
    return run_deepbet(data, where=where), "deepbet"


def run_deepbet(data: Array, *, where: str | None = None, timeout_s: float = TIMEOUT_S) -> Array:
    """deepbet's brain mask, from a process of its own.

    Args:
        data: (X, Y, Z) float32, RAS+ axis order; deepbet scales it to its own grid.
        where: Address for messages.
        timeout_s: The process is ended after this long.

    Returns:
        (X, Y, Z) bool.

    Raises:
        InputError: SCAN-NEEDS-STRIPPING when deepbet is not installed, SCAN-NO-BRAIN when it fails,
            SCAN-STRIP-ENDED when time or memory ran out, which says nothing about the scan.
    """
    if importlib.util.find_spec("deepbet") is None:
        raise _needs_stripping(where)
    with tempfile.TemporaryDirectory(prefix="sgcd-strip-") as folder:
        source, target = Path(folder) / "in.npy", Path(folder) / "out.npy"
        np.save(source, np.asarray(data, np.float32))
        command = [sys.executable, "-m", "sgcd_core.volume.strip", str(source), str(target)]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, timeout=timeout_s, check=False,
                env={**os.environ, "PYTHONPATH": python_path()},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise InputError(
                f"brain extraction took more than {timeout_s:.0f} s and was ended.",
                code="SCAN-STRIP-ENDED", where=where, hint=_AGAIN,
            ) from error  # fmt: skip
        if done.returncode == _NO_DEEPBET:
            raise _needs_stripping(where)
        if done.returncode < 0:
            raise InputError(
                f"brain extraction was ended by signal {-done.returncode}.",
                code="SCAN-STRIP-ENDED", where=where, hint=_AGAIN,
            )  # fmt: skip
        if done.returncode != 0 or not target.is_file():
            raise InputError(
                f"brain extraction found no brain (deepbet ended with {done.returncode}).",
                code="SCAN-NO-BRAIN", where=where,
                hint="Look at the scan: is it a head, T1w or T2w, and is the contrast sound?",
            )  # fmt: skip
        mask: Array = np.load(target).astype(bool)
        return mask


#: Advice where the machine, not the scan, is at fault.
_AGAIN = "Run the same command again with fewer workers, or on a machine with more memory."


def _needs_stripping(where: str | None) -> InputError:
    return InputError(
        "this is a whole head, and deepbet is not installed.",
        code="SCAN-NEEDS-STRIPPING", where=where,
        hint="Install it with `pip install 'sgcd-lake[strip]'`, or give brain-extracted scans.",
    )  # fmt: skip


def _process(source: str, target: str) -> int:
    """Body of the child process; its exit code tells the parent what went wrong."""
    try:
        import torch
        from deepbet.bet import BrainExtraction
    except ImportError:
        return _NO_DEEPBET
    torch.set_num_threads(min(os.cpu_count() or 1, 4))
    # On the CPU always: the same scan has the same mask on every worker.
    tool = BrainExtraction(no_gpu=True)
    mask = tool.postprocess(tool.run_model(np.load(source)) > 0.5)
    np.save(target, np.asarray(mask, dtype=np.uint8))
    return 0


if __name__ == "__main__":
    sys.exit(_process(sys.argv[1], sys.argv[2]))
