"""Looks and matching: blind to contrast, exact on ranks, and knowing of composition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from sgcd_core.box import (
    Box,
    find_box,
    load_box,
    load_composition,
    shape_of,
    start_digest,
)
from sgcd_core.config import load_config
from sgcd_core.diffusion.network import LookEmbedding, build_network, from_cells, to_cells
from sgcd_core.errors import ModelError
from sgcd_core.style.composition import (
    ANATOMY_PART,
    BELIEF,
    KNOTS,
    MAX_SHIFT,
    Composition,
    CompositionModel,
    composition_from_state,
    composition_state,
    match,
    true_shift,
)
from sgcd_core.style.look import (
    DETAIL_SIZE,
    LEVELS,
    LOOK_SIZE,
    PROFILE_SIZE,
    Look,
    blend,
    composition_profile,
    details,
    leave_out,
    mean_look,
    measure_look,
    mirrored_look,
    quantiles,
    restyled,
    voxels,
    with_rim,
)
from sgcd_core.style.rim import LAYERS, RIM_LEVELS, RIM_SIZE, measure_rim
from sgcd_core.style.shading import (
    SHADING_SIZE,
    SIDES,
    estimate_shading,
    mirrored,
    shading_field,
)
from sgcd_core.style.texture import TEXTURE_SIZE, measure_texture
from sgcd_core.volume.condition import LookMatcher


def brain(seed, fluid=0.3, size=24):
    """A ball of fluid, grey and white matter; the part of fluid can be chosen."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes)) + 0.04 * rng.standard_normal((size,) * 3)
    mask = radius < 0.95
    rim = 0.95 * (1 - fluid) ** (1 / 3)
    tissue = np.select([radius < 0.55, radius < rim], [0.85, 0.55], 0.15)
    noisy = tissue + 0.03 * rng.standard_normal(mask.shape)
    return (np.clip(noisy, 0.01, 1) * mask).astype(np.float32), mask


def test_a_profile_does_not_see_a_rising_map_of_the_intensities():
    image, mask = brain(0)
    a = composition_profile(image, mask, 4.0)
    b = composition_profile((300 * image**1.7) * mask, mask, 4.0)
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert (a**2).sum() == pytest.approx(2, abs=1e-4)


def test_a_profile_tells_brains_apart_by_what_is_in_them():
    profiles = {f: [composition_profile(*brain(s, f), 4.0) for s in range(3)] for f in (0.15, 0.35)}
    within = np.abs(profiles[0.15][0] - profiles[0.15][1]).sum()
    between = np.abs(profiles[0.15][0] - profiles[0.35][0]).sum()
    assert between > 1.5 * within


def test_a_profile_is_nearly_the_same_on_a_finer_grid():
    image, mask = brain(1)
    fine, inside = (np.repeat(np.repeat(np.repeat(x, 2, 0), 2, 1), 2, 2) for x in (image, mask))
    np.testing.assert_allclose(
        composition_profile(image, mask, 4.0), composition_profile(fine, inside, 2.0), atol=1e-5
    )


def test_an_empty_mask_gives_an_empty_profile_and_an_empty_match():
    image = np.zeros((8, 8, 8), np.float32)
    mask = np.zeros((8, 8, 8), bool)
    assert not composition_profile(image, mask, 4.0).any()
    look = measure_look(*brain(0), 4.0, "T1w")
    assert not match(image, mask, 4.0, look, look, "T1w").any()


def test_matching_undoes_a_rising_map_of_the_intensities():
    """Shading and all: it is fitted in a contrast of its own, so both scans have the same."""
    image, mask = lumps(2)
    other = (1 - 0.9 * np.exp(-2 * image)) * mask
    look, own = (measure_look(x, mask, 4.0, "T1w") for x in (other, image))
    np.testing.assert_allclose(look.shading, own.shading, atol=1e-3)
    off = np.abs(match(image, mask, 4.0, look, own, "T1w") - other)
    assert np.quantile(off[mask], 0.98) < 0.02
    assert not off[~mask].any()


def test_many_voxels_of_one_value_map_to_one_value():
    image, mask = brain(3)
    steps = np.round(image * 8) / 8
    steps = steps.astype(np.float32)
    look, own = measure_look(image, mask, 4.0, "T1w"), measure_look(steps, mask, 4.0, "T1w")
    flat = [replace(x, shading=np.zeros(SHADING_SIZE)) for x in (look, own)]
    got = match(steps, mask, 4.0, *flat, "T1w")
    for value in np.unique(steps[mask]):
        assert np.ptp(got[mask & (steps == value)]) == 0


def test_the_look_of_the_others_is_the_mean_without_one():
    looks = [measure_look(*brain(s), 4.0, "T1w") for s in range(4)]
    mean = mean_look(looks).vector()
    np.testing.assert_allclose(
        leave_out(mean, 4, looks[0].vector()), mean_look(looks[1:]).vector(), atol=1e-5
    )
    np.testing.assert_array_equal(leave_out(mean, 1, looks[0].vector()), looks[0].vector())
    assert mean.shape == (LOOK_SIZE,)
    np.testing.assert_array_equal(Look.from_vector(mean).vector(), mean)


def lumps(seed, size=40):
    """Three tissues without any symmetry that a smooth field could mimic."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((size,) * 3), 2.0)
    axes = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    mask = np.sqrt(sum(a**2 for a in axes)) < 0.95
    low, high = np.quantile(noise[mask], (0.3, 0.65))
    tissue = np.select([noise < low, noise < high], [0.15, 0.5], 0.85)
    return (tissue + 0.02 * rng.standard_normal(mask.shape)) * mask, mask


def test_a_shading_is_found_and_taken_out():
    image, mask = lumps(1)
    truth = np.zeros(SHADING_SIZE)
    truth[[0, 3, 7]] = 0.2, -0.3, 0.2
    field = shading_field(truth, image.shape, 4.0)
    found = shading_field(estimate_shading(image * field, mask, 4.0), image.shape, 4.0)
    none = shading_field(estimate_shading(image, mask, 4.0), image.shape, 4.0)
    left = np.log(found / field / none)[mask]
    assert np.log(field)[mask].std() > 0.08
    assert left.std() < 0.25 * np.log(field)[mask].std()


def test_a_shading_is_the_same_field_on_a_finer_grid():
    values = np.linspace(-0.1, 0.1, SHADING_SIZE)
    coarse = shading_field(values, (10, 12, 8), 4.0)
    fine = shading_field(values, (20, 24, 16), 2.0)
    means = fine.reshape(10, 2, 12, 2, 8, 2).mean((1, 3, 5))
    np.testing.assert_allclose(means, coarse, atol=2e-3)


def test_a_mirrored_shading_is_the_mirrored_field():
    values = np.linspace(-0.1, 0.1, SHADING_SIZE)
    field = shading_field(values, (10, 12, 8), 4.0)
    np.testing.assert_allclose(
        shading_field(mirrored(values), (10, 12, 8), 4.0), field[::-1], atol=1e-6
    )


def test_too_few_voxels_have_no_shading():
    mask = np.zeros((8, 8, 8), bool)
    mask[2:4, 2:4, 2:4] = True
    assert not estimate_shading(mask.astype(np.float32), mask, 4.0).any()


def test_one_curve_for_all_scans_of_a_site_keeps_what_tells_them_apart():
    """Two subjects of a site with other amounts of fluid: each keeps its own tissue values."""
    scans = [lumps(s) for s in (3, 4)]
    site = mean_look([measure_look(x, m, 4.0, "T1w") for x, m in scans])
    goal = mean_look([measure_look((0.1 + 0.8 * x**1.5) * m, m, 4.0, "T1w") for x, m in scans])
    for x, m in scans:
        got = match(x, m, 4.0, goal, site, "T1w")
        np.testing.assert_allclose(got[m], (0.1 + 0.8 * np.clip(x, 0, 1) ** 1.5)[m], atol=0.06)


def test_a_site_s_look_follows_a_recoloured_scan():
    scans = [brain(s) for s in range(3)]
    site = mean_look([measure_look(*scan, 4.0, "T1w") for scan in scans]).vector()
    image, mask = scans[0]
    moved = restyled(site, image, image**2, mask, "T1w")
    count = len(LEVELS)
    np.testing.assert_allclose(moved[:count], site[:count] ** 2, atol=0.02)
    rest = slice(count, LOOK_SIZE - DETAIL_SIZE)
    np.testing.assert_array_equal(moved[rest], site[rest])
    np.testing.assert_array_equal(moved[-RIM_SIZE:], site[-RIM_SIZE:])


def test_ranks_rise_from_zero_to_one_whatever_the_weights():
    torch.manual_seed(0)
    model = Composition([CompositionModel(2) for _ in range(2)])
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=3.0)
    profiles = [composition_profile(*brain(s), 4.0) for s in (0, 1)]
    ranks = model.ranks(*profiles, np.zeros(len(KNOTS) - 2), 1)
    assert ranks[0] == 0 and ranks[-1] == 1 and (np.diff(ranks) >= 0).all()
    assert np.abs(ranks - LEVELS).max() <= 0.25 + 1e-6


def test_fits_are_believed_as_far_as_they_agree():
    members = [CompositionModel(1, hidden=4) for _ in range(2)]
    for member in members:  # nothing but the linear part, of the profile's first number
        torch.nn.init.zeros_(member.linear)
        torch.nn.init.constant_(member.trust, -30.0)
    inner = len(KNOTS) - 2
    scan, look, identity = np.zeros(PROFILE_SIZE), np.zeros(PROFILE_SIZE), np.zeros(inner)
    scan[0] = 1.0

    def shift(*slopes: float) -> float:
        for member, slope in zip(members, slopes, strict=True):
            member.linear.data[0, 0] = slope
        found = Composition(members).shift(scan, look, identity, 0)
        assert found.shape == (inner,)
        return float(found.mean())

    assert shift(0.1, 0.1) == pytest.approx(BELIEF * MAX_SHIFT * np.tanh(0.1 / MAX_SHIFT), abs=1e-4)
    assert shift(0.1, -0.1) == 0.0
    assert 0 < shift(0.1, 0.04) < 0.9 * BELIEF * 0.07
    state = composition_state(Composition(members))
    again = composition_from_state(state)
    assert again is not None and len(again.members) == 2
    first = Composition(members).shift(scan, look, identity, 0)
    np.testing.assert_array_equal(again.shift(scan, look, identity, 0), first)


def test_what_anatomy_adds_to_a_shading_is_taken_out_of_both_looks():
    image, mask = brain(0)
    look = measure_look(image, mask, 8.0, "T1w")
    slopes = torch.zeros(1, PROFILE_SIZE, SHADING_SIZE)
    slopes[0, 5, 2] = 1.0
    profiles = torch.from_numpy(look.profile)[None]
    model = Composition([CompositionModel(1, hidden=4)], profiles, slopes)
    np.testing.assert_array_equal(model.shading(look, 0), look.shading)  # an average brain
    other = replace(look, profile=look.profile + 0.2 * np.eye(PROFILE_SIZE, dtype=np.float32)[5])
    step = np.eye(SHADING_SIZE, dtype=np.float32)[2]
    change = model.shading(other, 0) - look.shading
    np.testing.assert_allclose(change, -0.2 * ANATOMY_PART * step, atol=1e-7)
    # A source that looks unevenly lit for its anatomy is matched as one that is lit evenly.
    lit = replace(other, shading=other.shading + np.float32(0.2 * ANATOMY_PART) * step)
    known, plain = (match(image, mask, 8.0, look, lit, "T1w", m) for m in (model, None))
    np.testing.assert_allclose(known, match(image, mask, 8.0, look, look, "T1w"), atol=2e-3)
    assert np.abs(plain - known)[mask].max() > 0.01
    # A model from before it knew anatomy loads, and knows none.
    state = {k: v for k, v in composition_state(model).items() if ".members." in k}
    former = composition_from_state(state)
    assert former is not None and not former.anatomy.any()
    kept = composition_from_state(composition_state(model))
    assert kept is not None and torch.equal(kept.anatomy, slopes)


def test_what_the_packaged_model_knows_of_anatomy_has_no_sides():
    model = load_composition()
    assert model is not None
    assert (model.anatomy.abs().amax((0, 1)).numpy() > 0).tolist() == (SIDES > 0).tolist()


def test_a_fitted_composition_model_spares_another_composition():
    """Fitted to balls of other amounts of fluid; measured on amounts it has not seen."""
    amounts = np.linspace(0.12, 0.42, 16)
    goal = mean_look(
        [measure_look(*brain(90 + i, f), 4.0, "T1w") for i, f in enumerate((0.2, 0.3))]
    )
    rows = [(composition_profile(*brain(i, f), 4.0), quantiles(*brain(i, f)))
            for i, f in enumerate(amounts)]  # fmt: skip
    scan = torch.from_numpy(np.stack([p for p, _ in rows]))
    shift = torch.from_numpy(np.stack([true_shift(q, goal.quantiles) for _, q in rows]))
    look = torch.from_numpy(goal.profile).expand(len(rows), -1)
    sequence = torch.zeros(len(rows), dtype=torch.long)
    strange = torch.full_like(shift, 0.2)  # what another contrast says of ranks: nothing
    torch.manual_seed(0)
    model = CompositionModel(1, hidden=8)
    torch.nn.init.constant_(model.trust, -20.0)
    optimizer = torch.optim.Adam([model.linear], lr=1e-3)
    for _ in range(300):
        loss = (model(scan, look, strange, sequence) - shift).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors = {"plain": 0.0, "composition": 0.0}
    for seed, amount in ((51, 0.15), (52, 0.38)):
        image, mask = brain(seed, amount)
        shown = (image**1.8) * mask
        for name, helper in (("plain", None), ("composition", Composition([model]))):
            got = match(
                shown, mask, 4.0, goal, measure_look(shown, mask, 4.0, "T1w"), "T1w", helper
            )
            errors[name] += float(np.abs(got - image)[mask].mean())
    assert errors["composition"] < 0.6 * errors["plain"]
    assert len(KNOTS) == shift.shape[1] + 2


def test_cells_hold_every_voxel():
    x = torch.randn(2, 3, 8, 12, 4)
    cells = to_cells(x, 4)
    assert cells.shape == (2, 192, 2, 3, 1)
    assert torch.equal(from_cells(cells, 4), x)


def test_a_fresh_residual_network_copies_its_content_and_does_not_see_the_noise():
    config = load_config("tiny", settings=["prepare.shape=[16, 16, 16]"])
    network = build_network(config).eval()
    x = torch.rand(1, 3, 16, 16, 16) * 2 - 1
    labels = LookEmbedding.labels_of(torch.tensor([0]), *torch.zeros(2, 1, LOOK_SIZE))
    with torch.no_grad():
        out = network(x, torch.tensor([999]), labels)
        x[:, :1] += 3
        again = network(x, torch.tensor([999]), labels)
    assert out.shape == (1, 1, 16, 16, 16)
    torch.testing.assert_close(out, again)


def test_a_box_keeps_its_weights_and_fits_only_the_settings_it_was_made_with():
    config = load_config("tiny", settings=["prepare.shape=[16, 16, 16]"])
    network = build_network(config)
    box = Box(network.state_dict(), {"shape": shape_of(config), "steps": 3})
    back = Box.from_bytes(box.to_bytes())
    assert back.meta == box.meta
    for name, value in network.state_dict().items():
        torch.testing.assert_close(back.network[name], value, atol=1e-3, rtol=1e-3)
    other = load_config("tiny", settings=["network.channels=[16, 32, 64]"])
    assert find_box(other) is None
    with pytest.raises(ModelError, match="MODEL-MISSING"):
        load_box(other)


def test_the_packaged_composition_model_knows_a_scan_of_the_look_s_own_scanner():
    """Digital subjects it was not fitted to; plain matching changes what should stay as it is."""
    from pipelines.box.scans import random_site
    from pipelines.cohort import list_anatomies, load_anatomy

    model = load_composition()
    assert model is not None
    anatomy = load_anatomy(list_anatomies(None)[0])
    errors = {"plain": 0.0, "composition": 0.0}
    for site in random_site([anatomy], np.random.default_rng(5), subjects=4):
        images, masks = site.images["tiny"], site.masks["tiny"]
        looks = [measure_look(i, m, 4.0, site.sequence) for i, m in zip(images, masks, strict=True)]
        for k in range(4):
            goal = mean_look([look for j, look in enumerate(looks) if j != k])
            for name, helper in (("plain", None), ("composition", model)):
                got = match(images[k], masks[k], 4.0, goal, looks[k], site.sequence, helper)
                errors[name] += float(np.abs(got - images[k])[masks[k]].mean())
    assert errors["composition"] < 0.95 * errors["plain"]


def blurred_and_noisy(sigma, noise):
    """Lumps as a scanner of some sharpness and noise shows them."""
    image, mask = lumps(4)
    rng = np.random.default_rng(5)
    image = ndimage.gaussian_filter(image, sigma) + noise * rng.standard_normal(image.shape)
    return image * mask, mask


def test_texture_tells_blur_from_noise_and_along_which_axis():
    plain = measure_texture(*blurred_and_noisy((0, 0, 0), 0.02))
    thick = measure_texture(*blurred_and_noisy((0, 0, 1.2), 0.02))
    noisy = measure_texture(*blurred_and_noisy((0, 0, 0), 0.1))
    # neighbours along the thick axis become far more alike than along the others
    assert (thick - plain)[8] < min(0, (thick - plain)[0], (thick - plain)[4]) - 0.3
    # noise bends flat tissue along every axis
    bends = [3, 7, 11]
    assert (noisy[bends] > plain[bends] + 0.5).all()


def test_texture_is_blind_to_gain_and_offset():
    image, mask = blurred_and_noisy((0.5, 0, 0), 0.05)
    np.testing.assert_allclose(
        measure_texture(3 * image + 2, mask), measure_texture(image, mask), atol=1e-3
    )


def test_a_mirrored_look_is_the_look_of_mirrored_scans():
    image, mask = lumps(6)
    field = shading_field(np.linspace(-0.1, 0.1, SHADING_SIZE), image.shape, 4.0)
    image = (image * field).astype(np.float32)
    mirror = measure_look(image[::-1].copy(), mask[::-1].copy(), 4.0, "T1w").vector()
    expected = mirrored_look(measure_look(image, mask, 4.0, "T1w").vector())
    # a shading is fitted to a sample of voxels, which is another one in the mirror
    np.testing.assert_allclose(mirror, expected, atol=0.03)


def test_a_recoloured_scan_gives_its_site_its_own_texture():
    image, mask = lumps(7)
    image = np.clip(image, 0, 1).astype(np.float32)
    look = measure_look(image, mask, 4.0, "T1w").vector()
    soft = (ndimage.gaussian_filter(image, 1.0) * mask).astype(np.float32)
    got = restyled(look, image, soft, mask, "T1w")
    got, own, before = (
        details(x)[:TEXTURE_SIZE]
        for x in (got, measure_look(soft, mask, 4.0, "T1w").vector(), look)
    )
    np.testing.assert_allclose(got, own, atol=1e-5)
    assert np.abs(got - before).max() > 0.5


def test_a_rim_is_told_layer_by_layer_from_the_surface_inwards():
    _, mask = lumps(8)
    depth = ndimage.distance_transform_cdt(mask, "taxicab")
    layers = np.where(mask, 0.2 + 0.1 * np.minimum(depth, 6), 0).astype(np.float32)
    rim = measure_rim(layers, mask).reshape(LAYERS, -1)
    np.testing.assert_allclose(rim, np.repeat([[0.3], [0.4], [0.5], [0.6]], 5, 1), rtol=1e-6)
    ramp = np.linspace(0, 1, mask.shape[0], dtype=np.float32)[:, None, None] * mask
    rim = measure_rim(ramp, mask).reshape(LAYERS, -1)
    assert (np.diff(rim, axis=1) > 0).all()
    np.testing.assert_allclose(rim[0], np.quantile(ramp[depth == 1], RIM_LEVELS), rtol=1e-6)
    mirror = measure_rim(ramp[::-1], mask[::-1])  # no side is told
    np.testing.assert_array_equal(mirror, rim.ravel())


def test_a_rim_is_where_the_brain_ends_and_not_where_it_is_cut():
    _, mask = lumps(8)
    middle = mask.shape[0] // 2
    half, image = mask[:middle], np.zeros(mask[:middle].shape, np.float32)
    image[-1] = 1.0  # the cut, bright
    cut = measure_rim(image * half, half).reshape(LAYERS, -1)
    share = (half[-1] & (ndimage.distance_transform_cdt(mask, "taxicab")[middle - 1] == 1)).sum()
    assert share and not cut[0].any()
    thin = np.zeros((5, 5, 5), bool)
    thin[2, 2, 1:4] = True
    line = np.where(thin, 0.7, 0).astype(np.float32)
    np.testing.assert_allclose(measure_rim(line, thin), 0.7, rtol=1e-6)  # no second layer
    for nothing in (np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)):
        assert not measure_rim(np.ones((4, 4, 4)), nothing).any()


def test_a_scan_s_rim_is_that_of_what_it_was_matched_to():
    image, mask = lumps(9)
    look = measure_look(image, mask, 4.0, "T1w").vector()
    got = with_rim(look, image**2 * mask, mask)
    np.testing.assert_array_equal(got[:-RIM_SIZE], look[:-RIM_SIZE])
    np.testing.assert_allclose(got[-RIM_SIZE:], measure_rim(image**2, mask), rtol=1e-6)
    assert not np.array_equal(got[-RIM_SIZE:], look[-RIM_SIZE:])


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_box_of_each_preset_fits_it_and_is_small(preset):
    config = load_config(preset)
    box = load_box(config)
    build_network(config).load_state_dict(box.network)
    assert len(box.to_bytes()) <= 16 * 2**20
    assert preset == "small" or box.meta["steps"] > 0  # the U-Net of `small` is at rest
    assert box.meta["filter_volumes"] >= 1500
    assert float(box.network["look_filter.perceptron.4.weight"].abs().max()) > 0
    # what the package holds is part of what tells two trainings apart
    digests = {start_digest(config, init) for init in ("box", "scratch")}
    assert len(digests) == 2 and None not in digests
    assert start_digest(load_config(preset, settings=["condition.match=none"]), "scratch") is None


def test_weights_are_those_of_the_sequence_whatever_a_model_s_sequences_are():
    model = load_composition()
    assert model is not None
    image, mask = brain(3, 0.2)
    looks = [measure_look(x * mask, mask, 4.0, "T2w").vector() for x in (image**1.5, 1 - image)]
    wanted, source = (torch.from_numpy(look)[None] for look in looks)
    scan, inside = (torch.from_numpy(x)[None, None] for x in ((1 - image) * mask, mask))
    found = [
        LookMatcher("composition", 4.0, names, model)(
            scan.float(), inside, wanted, source, torch.tensor([names.index("T2w")])
        )
        for names in (("T1w", "T2w"), ("T2w",), ("T2w", "T1w"))
    ]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)
    only_t1w = Composition([CompositionModel(1)])
    assert only_t1w.index_of("T1w") == 0 and only_t1w.index_of("T2w") is None


def test_a_voxel_side_that_is_not_known_is_the_other_one():
    sides = [np.zeros(LOOK_SIZE, np.float32) for _ in range(2)]
    known, unknown = sides
    voxel = int(np.flatnonzero(voxels(np.arange(LOOK_SIZE)) == np.arange(LOOK_SIZE))[0])
    known[voxel] = 2
    assert voxels(blend(known, unknown, 0.3)) == voxels(blend(unknown, known, 0.3)) == 2
    assert voxels(blend(known, 2 * known, 0.25)) == 2.5
