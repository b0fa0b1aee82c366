"""Segmenters find clear tissues, feel a change of contrast, and fail with a code."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_lake import brain
from scipy.ndimage import gaussian_filter

from pipelines.segment import (
    CSF,
    GREY,
    STEM,
    WHITE,
    CommandSegmenter,
    labels_on_grid,
    make_segmenter,
    tissues_of_freesurfer,
    tissues_of_truth,
)
from sgcd_core.errors import ConfigError, InputError, UsageError
from sgcd_core.metrics import dice

GRID = np.diag([4.0, 4.0, 4.0, 1.0])
LEVELS = {"T1w": {CSF: 0.15, GREY: 0.5, WHITE: 0.75}, "T2w": {CSF: 0.9, GREY: 0.5, WHITE: 0.3}}


def phantom(sequence="T1w", seed=0):
    """Image, mask and the tissue each voxel was made of."""
    image, mask = brain(seed, sequence, (32, 36, 32))
    tissues, levels = zip(*LEVELS[sequence].items(), strict=True)
    nearest = np.abs(image[..., None] - np.array(levels)).argmin(-1)
    return image, mask, np.where(mask, np.array(tissues)[nearest], 0)


@pytest.mark.parametrize("name", ["gmm", "kmeans"])
@pytest.mark.parametrize("sequence", ["T1w", "T2w"])
def test_clear_tissues_are_found_in_both_sequences(name, sequence):
    image, mask, truth = phantom(sequence)
    labels = make_segmenter(name).segment(image, mask, sequence, GRID)
    assert labels.dtype == np.uint8 and not labels[~mask].any()
    for tissue in (CSF, GREY, WHITE):
        assert dice(labels == tissue, truth == tissue) > 0.98


@pytest.mark.parametrize("name", ["gmm", "kmeans"])
def test_gain_and_place_do_not_matter_and_contrast_does(name):
    image, mask, _ = phantom()
    # Blurred, so that voxels of every intensity lie at the borders for a curve to move.
    image = np.where(mask, gaussian_filter(image, 1.2), 0).astype(np.float32)
    segment = make_segmenter(name).segment
    labels = segment(image, mask, "T1w", GRID)
    np.testing.assert_array_equal(labels, segment(image, mask, "T1w", GRID))
    mirrored = segment(image[::-1], mask[::-1], "T1w", GRID)
    np.testing.assert_array_equal(mirrored, labels[::-1])
    dimmer = segment(0.1 + 0.5 * image, mask, "T1w", GRID)
    assert dice(dimmer == GREY, labels == GREY) > 0.995
    curved = segment(image**3, mask, "T1w", GRID)
    assert dice(curved == GREY, labels == GREY) < 0.9


@pytest.mark.parametrize("name", ["gmm", "kmeans"])
def test_a_brighter_voxel_is_never_a_darker_tissue(name):
    """A wide class must not claim both ends of the scale."""
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(0.5, 0.3, (20, 20, 20)), 0, 1).astype(np.float32)
    mask = np.ones(image.shape, bool)
    labels = make_segmenter(name).segment(image, mask, "T1w", GRID)
    order = np.argsort(image, axis=None)
    assert (np.diff(labels.reshape(-1)[order].astype(int)) >= 0).all()


def test_an_unknown_sequence_and_an_empty_brain_are_said():
    image, mask, _ = phantom()
    with pytest.raises(InputError) as caught:
        make_segmenter("gmm").segment(image, mask, "FLAIR", GRID)
    assert caught.value.code == "SCAN-SEQUENCE"
    with pytest.raises(InputError) as caught:
        make_segmenter("kmeans").segment(np.ones_like(image), mask, "T1w", GRID)
    assert caught.value.code == "SCAN-EMPTY"


# programs of others


def program(folder: Path, body: str) -> str:
    """A command line that runs `body` with paths `i`, `o` and `m`."""
    script = folder / "tool.py"
    script.write_text(
        "import sys\nimport nibabel as nib\nimport numpy as np\ni, o, m = sys.argv[1:]\n" + body
    )
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))} {{input}} {{output}} {{mask}}"


BY_LEVEL = """
scan, mask = nib.load(i), nib.load(m)
x = scan.get_fdata()
labels = np.where(mask.get_fdata() > 0, 1 + (x > 0.3) + (x > 0.62), 0).astype(np.uint8)
"""
SAVE = "nib.save(nib.Nifti1Image(labels, scan.affine), o)\n"


def test_a_program_gets_brain_and_mask_and_its_labels_come_back(tmp_path):
    image, mask, truth = phantom()
    segmenter = make_segmenter(program(tmp_path, BY_LEVEL + SAVE))
    labels = segmenter.segment(image, mask, "T1w", GRID)
    assert (labels == truth).mean() > 0.999
    assert segmenter.name.startswith(f"{Path(sys.executable).name}-")


def test_two_commands_of_one_program_have_two_names():
    python = shlex.quote(sys.executable)
    commands = [f"{python} {x} {{input}} {{output}}" for x in ("a.py", "b.py", "  'a.py'")]
    names = [make_segmenter(command).name for command in commands]
    assert names[0] == names[2] != names[1]
    assert [make_segmenter(name).name for name in ("gmm", "kmeans")] == ["gmm", "kmeans"]


def test_labels_of_freesurfer_and_of_another_grid_are_understood(tmp_path):
    image, mask, _ = phantom()
    plain = make_segmenter(program(tmp_path, BY_LEVEL + SAVE)).segment(image, mask, "T1w", GRID)
    body = BY_LEVEL + (
        "labels = np.array([0, 24, 42, 41], np.int16)[labels]\n"
        "labels = labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)\n"
        "affine = scan.affine @ np.diag([0.5, 0.5, 0.5, 1])\n"
        "affine[:3, 3] -= scan.affine[:3, :3] @ [0.25, 0.25, 0.25]\n"
        "nib.save(nib.Nifti1Image(labels, affine), o)\n"
    )
    fine = make_segmenter(program(tmp_path, body)).segment(image, mask, "T1w", GRID)
    for tissue in (CSF, GREY, WHITE):
        assert dice(fine == tissue, plain == tissue) > 0.9


@pytest.mark.parametrize(
    "body",
    [
        "sys.exit('Name of Patient')\n",
        "pass\n",
        "open(o, 'wb').write(b'no image')\n",
        "scan = nib.load(i)\nlabels = np.zeros(scan.shape, np.uint8)\n" + SAVE,
    ],
    ids=["exit code", "no output", "no image", "no labels"],
)
def test_a_program_that_fails_has_its_code_and_is_not_quoted(body, tmp_path):
    image, mask, _ = phantom()
    with pytest.raises(InputError) as caught:
        make_segmenter(program(tmp_path, body)).segment(image, mask, "T1w", GRID)
    assert caught.value.code == "SEGMENTER-FAILED"
    assert "Patient" not in str(caught.value)


def test_a_program_that_hangs_is_stopped(tmp_path):
    image, mask, _ = phantom()
    segmenter = CommandSegmenter(program(tmp_path, "import time; time.sleep(60)\n"), timeout=0.5)
    with pytest.raises(InputError) as caught:
        segmenter.segment(image, mask, "T1w", GRID)
    assert caught.value.code == "SEGMENTER-FAILED"


def test_a_program_that_is_not_there_is_the_settings_fault(tmp_path):
    image, mask, _ = phantom()
    with pytest.raises(ConfigError) as caught:
        make_segmenter(f"{tmp_path}/none {{input}} {{output}}").segment(image, mask, "T1w", GRID)
    assert caught.value.code == "SEGMENTER-FAILED"


def test_no_shell_reads_the_command(tmp_path):
    image, mask, _ = phantom()
    trap = tmp_path / "trap"
    command = program(tmp_path, BY_LEVEL + SAVE).replace("sys.argv[1:]", "sys.argv[1:4]")
    with pytest.raises(InputError):  # the program gets the words; it takes three
        make_segmenter(f"{command} ; touch {trap}").segment(image, mask, "T1w", GRID)
    assert not trap.exists()


@pytest.mark.parametrize("spec", ["fast", "mytool {input}", "mytool 'x {input} {output}"])
def test_a_command_without_its_files_is_a_usage_error(spec):
    with pytest.raises(UsageError):
        make_segmenter(spec)


# labels


def test_every_class_of_the_truth_has_its_tissue():
    from pipelines.cohort.tissues import TRUTH

    found = dict(zip(TRUTH, tissues_of_truth(np.array(list(TRUTH))), strict=True))
    words = {"CSF": CSF, "ventricles": CSF, "grey": GREY, "white": WHITE, "stem": STEM}
    for number, (name, _) in TRUTH.items():
        assert found[number] == next(t for word, t in words.items() if word in name)
    assert tissues_of_truth(np.zeros(1))[0] == 0


def test_freesurfers_numbers_have_their_tissue():
    numbers = {0: 0, 2: WHITE, 46: WHITE, 3: GREY, 17: GREY, 4: CSF, 24: CSF, 16: STEM}
    numbers |= {1035: GREY, 2012: GREY, 508: 0, 3001: 0}
    found = tissues_of_freesurfer(np.array(list(numbers)))
    assert dict(zip(numbers, found, strict=True)) == numbers


def test_a_coarse_voxel_takes_what_fills_most_of_it():
    fine = np.zeros((32, 32, 32), np.uint8)
    fine[4:28, 4:28, 4:28] = WHITE
    fine[4:28, 4:28, 4:13] = GREY  # the border cuts a coarse voxel 1 to 3
    affine = np.eye(4)
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = 1.5  # the same field of view
    out = labels_on_grid(fine, affine, coarse, (8, 8, 8))
    wanted = np.zeros((8, 8, 8), np.uint8)
    wanted[1:7, 1:7, 1:7] = WHITE
    wanted[1:7, 1:7, 1:3] = GREY
    np.testing.assert_array_equal(out[2:6, 2:6, 2:6], wanted[2:6, 2:6, 2:6])
    assert (out != wanted).mean() < 0.06  # corners of the cube are less than half full
    np.testing.assert_array_equal(labels_on_grid(wanted, coarse, coarse, (8, 8, 8)), wanted)
