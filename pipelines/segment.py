"""Grey matter, white matter and fluid of a prepared brain, by its contrast alone.

A segmenter that is robust to contrast would hide what a harmonization does to it. The two that are
built in see nothing but intensities, so a change of contrast that moves a border moves it here. Any
other program can be named by its command line.

Labels on the model grid are uint8: 0 outside, 1 CSF, 2 grey matter, 3 white matter, 4 brain stem
(only from anatomical labels; no tissue of its own, so nothing is scored there).
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sgcd_core.errors import ConfigError, InputError, SgcdError, UsageError
from sgcd_core.io.nifti import encode_nifti, read_nifti
from sgcd_core.io.store import sha256_hex
from sgcd_core.volume.resample import lowpass_sigma, sample, voxel_sides

log = logging.getLogger(__name__)

Image = NDArray[np.float32]
Mask = NDArray[np.bool_]
Labels = NDArray[np.uint8]
Affine = NDArray[np.float64]

CSF, GREY, WHITE, STEM = 1, 2, 3, 4
#: Tissues from dark to bright. Source of the order: T1 shortens, T2 too, with myelin.
ORDER = {"T1w": (CSF, GREY, WHITE), "T2w": (WHITE, GREY, CSF)}
#: About what part of an adult brain with its fluid each tissue fills; where a fit starts.
SHARES = {CSF: 0.2, GREY: 0.45, WHITE: 0.35}
#: A program that has not finished a brain after so long is stopped, seconds.
TIMEOUT = 3600.0


class Segmenter(Protocol):
    """Something that labels the tissues of a brain; its `name` is part of the figures' names."""

    name: str

    def segment(self, image: Image, mask: Mask, sequence: str, affine: Affine) -> Labels:
        """Labels of a brain, uint8 (X, Y, Z), 0 outside the mask.

        Args:
            image: (X, Y, Z) float32 in [0, 1], RAS+.
            mask: (X, Y, Z) bool, the brain.
            sequence: T1w or T2w.
            affine: (4, 4), voxel → mm RAS+.

        Raises:
            InputError: SCAN-EMPTY when the brain has too few distinct intensities.
            InputError: SEGMENTER-FAILED.
        """
        ...


class MixtureSegmenter:
    """Three normal distributions of intensity, a border where two of them are equally likely.

    Fitted by expectation maximization to the quantiles of the brain, so the result does not depend
    on where a voxel lies or on a seed. Borders are between the means of neighbours: a wide class
    never claims both ends of the scale. It stops early: fitted on, the classes leave the tissues
    for the mixtures between them (12 digital scans at 4 mm, Dice with the truth at a tolerance of
    1e-4 and of 1e-5: T1w grey 0.778, 0.759, white 0.836, 0.806; T2w grey 0.823, 0.805, white
    0.800, 0.760).
    Source: Wells et al. 1996, IEEE TMI 15(4); scikit-learn's GaussianMixture.
    """

    name = "gmm"

    def segment(self, image: Image, mask: Mask, sequence: str, affine: Affine) -> Labels:
        """See `Segmenter.segment`."""
        from sklearn.mixture import GaussianMixture

        order, values, starts = _starts(image, mask, sequence)
        # On the brain's own scale, so that gain and offset change nothing.
        offset, gain = float(values.mean()), float(values.std())
        values = (values - offset) / gain
        fits = [
            GaussianMixture(
                3, means_init=(start[:, None] - offset) / gain,
                weights_init=[SHARES[t] for t in order],
                precisions_init=np.full((3, 1, 1), 16.0), reg_covar=1e-4, tol=1e-4,
                max_iter=200, random_state=0,
            ).fit(values[:, None])
            for start in starts
        ]  # fmt: skip
        model = max(fits, key=lambda fit: float(fit.lower_bound_))
        rank = np.argsort(model.means_[:, 0])
        means = model.means_[rank, 0]
        borders = []
        for low in (0, 1):
            level = np.linspace(means[low], means[low + 1], 513)
            odds = model.predict_proba(level[:, None])[:, rank]
            nearer = odds[:, low + 1] > odds[:, low]
            borders.append(float(level[int(nearer.argmax())] if nearer.any() else level[-1]))
        return _by_borders(image, mask, order, [offset + gain * b for b in borders])


class KMeansSegmenter:
    """Three classes of intensity with the least spread inside (k-means), as Otsu's thresholds.

    Source: Lloyd 1982, IEEE Trans. Inf. Theory 28(2); scikit-learn's KMeans.
    """

    name = "kmeans"

    def segment(self, image: Image, mask: Mask, sequence: str, affine: Affine) -> Labels:
        """See `Segmenter.segment`."""
        from sklearn.cluster import KMeans

        order, values, starts = _starts(image, mask, sequence)
        fits = [
            KMeans(3, init=start[:, None], n_init=1, random_state=0).fit(values[:, None])
            for start in starts
        ]
        model = min(fits, key=lambda fit: float(fit.inertia_))
        means = np.sort(model.cluster_centers_[:, 0])
        borders = [float(b) for b in (means[:-1] + means[1:]) / 2]
        return _by_borders(image, mask, order, borders)


class CommandSegmenter:
    """A program of the user's: `mytool {input} {output} {mask}`, run without a shell.

    It gets the brain and its mask as NIfTI files and writes a label image: 1 CSF, 2 grey and
    3 white matter, or FreeSurfer's numbers (as SynthSeg does), told by a label above 3. Another
    grid than the input's is resampled. Its name ends in a digest of the command, since two commands
    may start one program (`python a.py …`, `docker run IMAGE …`).
    """

    def __init__(self, template: str, timeout: float = TIMEOUT) -> None:
        try:
            self.words = shlex.split(template)
        except ValueError:
            self.words = []
        if not self.words or any(name not in template for name in ("{input}", "{output}")):
            raise UsageError(
                "a segmentation command names {input} and {output}, and {mask} if it wants one.",
                where="--segmenter", hint='As in --segmenter "mytool {input} {output} {mask}".',
            )  # fmt: skip
        self.timeout = timeout
        self.name = f"{Path(self.words[0]).name}-{sha256_hex(shlex.join(self.words).encode())[:8]}"
        if shutil.which(self.words[0]) is None:  # said before the first brain is read
            raise self._not_runnable("not found")

    def segment(self, image: Image, mask: Mask, sequence: str, affine: Affine) -> Labels:
        """See `Segmenter.segment`."""
        with tempfile.TemporaryDirectory(prefix="sgcd-segment-") as folder:
            files = {name: Path(folder, f"{name}.nii.gz") for name in ("input", "mask", "output")}
            files["input"].write_bytes(encode_nifti(np.where(mask, image, 0), affine))
            files["mask"].write_bytes(encode_nifti(mask, affine, dtype=np.uint8))
            self._run(files)
            try:
                found = read_nifti(str(files["output"]))
            except SgcdError as error:
                raise self._failed(f"its output is {error.code}") from error
        labels = np.rint(found.data).astype(np.int64)
        if labels.min() < 0 or not labels.any():
            raise self._failed("its output holds no labels")
        tissues = tissues_of_freesurfer(labels) if labels.max() > 3 else labels.astype(np.uint8)
        out = labels_on_grid(tissues, found.affine, affine, mask.shape)
        return np.where(mask, out, 0).astype(np.uint8)

    def _run(self, files: dict[str, Path]) -> None:
        words = self.words
        for name, path in files.items():
            words = [word.replace(f"{{{name}}}", str(path)) for word in words]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=self.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"it had not finished after {self.timeout:.0f} s") from error
        except OSError as error:
            # Nothing is wrong with the scan: no other would fare better.
            raise self._not_runnable(type(error).__name__) from error
        if done.returncode != 0:
            # What it printed stays out of messages: it may quote a header.
            raise self._failed(f"it ended with exit code {done.returncode}")

    def _not_runnable(self, found: str) -> ConfigError:
        return ConfigError(
            f"{self.name} cannot be run ({found}).", code="SEGMENTER-FAILED",
            where="--segmenter", hint="Check its name and that it may be executed.",
        )  # fmt: skip

    def _failed(self, found: str) -> InputError:
        return InputError(
            f"{self.name}: {found}.", code="SEGMENTER-FAILED",
            hint="Run the command by hand on a prepared scan to see why.",
        )  # fmt: skip


def make_segmenter(spec: str) -> Segmenter:
    """`gmm`, `kmeans`, or a command line with {input} and {output}.

    Raises:
        UsageError: It is none of these.
        ConfigError: SEGMENTER-FAILED, there is no such program.
    """
    if spec == MixtureSegmenter.name:
        return MixtureSegmenter()
    if spec == KMeansSegmenter.name:
        return KMeansSegmenter()
    return CommandSegmenter(spec)


def _starts(
    image: Image, mask: Mask, sequence: str
) -> tuple[tuple[int, int, int], NDArray[np.float64], list[NDArray[np.float64]]]:
    """Tissues from dark to bright, quantiles of the brain (N,), and two places to start, (3,).

    One start is by the usual shares of the tissues, the other by the range of intensities, for
    brains whose shares are unusual; the better fit is taken.
    """
    from sgcd_core.metrics import intensity_quantiles

    if sequence not in ORDER:
        raise InputError(
            f"the order of tissues is known for {' and '.join(ORDER)} only.", code="SCAN-SEQUENCE"
        )
    order = ORDER[sequence]
    values = intensity_quantiles(image, mask, 1024) if mask.any() else np.zeros(1)
    if len(np.unique(values)) < 4:
        raise InputError("the brain has too few distinct intensities.", code="SCAN-EMPTY")
    ends = np.cumsum([0.0, *(SHARES[t] for t in order)])
    low, high = np.quantile(values, (0.02, 0.98))
    by_range = low + (high - low) * np.array([1, 3, 5]) / 6
    return order, values, [np.quantile(values, (ends[:-1] + ends[1:]) / 2), by_range]


def _by_borders(
    image: Image, mask: Mask, order: tuple[int, int, int], borders: list[float]
) -> Labels:
    """The tissue of every voxel by the two intensities that part the classes."""
    out: Labels = np.array(order, np.uint8)[np.digitize(image, borders)]
    out[~mask] = 0
    return out


def tissues_of_freesurfer(labels: NDArray[np.int64]) -> Labels:
    """FreeSurfer's label numbers (SynthSeg's too) as tissues; parcels of the cortex are grey."""
    from pipelines.cohort.tissues import label_table, truth_table

    table = tissues_of_truth(truth_table()[label_table()])
    out: Labels = table[np.clip(labels, 0, len(table) - 1)]
    out[(labels >= 1000) & (labels < 3000)] = GREY
    return out


def tissues_of_truth(labels: NDArray[Any]) -> Labels:
    """Classes of a digital cohort's truth (`cohort.tissues.TRUTH`) as tissues."""
    table = np.zeros(256, np.uint8)
    table[[1, 5]], table[[2, 4, 6]], table[[3, 7]], table[8] = CSF, GREY, WHITE, STEM
    out: Labels = table[labels.astype(np.uint8)]
    return out


def labels_on_grid(
    labels: Labels, affine: Affine, out_affine: Affine, shape: tuple[int, ...]
) -> Labels:
    """Labels on another grid of the same world: what fills most of each voxel.

    Args:
        labels: (X, Y, Z) uint8; 0 is the outside and competes like a tissue.
        affine: (4, 4), voxel → mm of `labels`.
        out_affine: (4, 4), voxel → mm of the result.
        shape: Of the result.
    """
    size = (int(shape[0]), int(shape[1]), int(shape[2]))
    if labels.shape == size and np.allclose(affine, out_affine, atol=1e-4):
        return labels
    sigma = lowpass_sigma(voxel_sides(affine), float(voxel_sides(out_affine).mean()))
    from_out = np.linalg.inv(affine) @ out_affine
    out, best, rest = np.zeros(size, np.uint8), np.zeros(size, np.float32), np.ones(size)
    for tissue in (int(t) for t in np.unique(labels) if t):
        part = (labels == tissue).astype(np.float32)
        if sigma.any():
            part = ndimage.gaussian_filter(part, sigma, mode="constant", truncate=3.0)
        share = sample(part, from_out, size)
        rest -= share
        wins = share > best
        out[wins] = tissue
        best[wins] = share[wins]
    out[rest > best] = 0
    return out
