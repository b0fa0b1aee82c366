"""The gradient map against plain NumPy, and style kept out of the condition."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from sgcd_core.batch import make_batch
from sgcd_core.config import ConditionConfig
from sgcd_core.style.look import mean_look, measure_look
from sgcd_core.style.rim import RIM_SIZE, measure_rim
from sgcd_core.volume.condition import (
    INTERPOLATED,
    ONE_SUBJECT,
    LookMatcher,
    augment_contrast,
    believed,
    build_condition,
    from_network,
    gradient_map,
    masked_quantiles,
    through_voxels,
    to_network,
)


def brain(seed=0, size=16):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    mask = np.sqrt((grid**2).sum(0)) < 0.95
    # folds, not shells: no smooth shading looks like them
    folds = ndimage.gaussian_filter(rng.standard_normal((size,) * 3), 1.5)
    low, high = np.quantile(folds[mask], (0.3, 0.65))
    tissue = np.select([folds < low, folds < high], [0.15, 0.5], 0.85)
    tissue = np.clip(tissue + 0.01 * rng.standard_normal(mask.shape), 0, 1)
    return (tissue * mask).astype(np.float32), mask


def tensors(images, masks):
    return torch.from_numpy(np.stack(images))[:, None], torch.from_numpy(np.stack(masks))[:, None]


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def test_gradient_map_equals_forward_differences_in_numpy():
    image, mask = brain()
    raw = np.zeros_like(image)
    raw[:-1] += np.diff(image, axis=0)
    raw[:, :-1] += np.diff(image, axis=1)
    raw[:, :, :-1] += np.diff(image, axis=2)
    raw /= 3
    scale = np.quantile(np.abs(raw[mask]), 0.99)
    expected = np.clip(raw / scale, -1, 1)
    got = gradient_map(*tensors([image], [mask]))[0, 0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_one_outlier_voxel_does_not_set_the_scale():
    image, mask = brain()
    spiked = image.copy()
    spiked[8, 8, 8] = 50
    a = gradient_map(*tensors([image], [mask]))
    b = gradient_map(*tensors([spiked], [mask]))
    far = torch.ones_like(a, dtype=torch.bool)
    far[..., 6:10, 6:10, 6:10] = False
    kept = float(b[far].abs().mean() / a[far].abs().mean())
    assert kept > 0.7  # scaled by the maximum it would be below 0.03


def test_network_scaling_is_a_bijection():
    x = torch.linspace(0, 1, 11)
    assert to_network(x).min() == -1 and to_network(x).max() == 1
    torch.testing.assert_close(from_network(to_network(x)), x)


def test_masked_quantiles_equal_numpy():
    image, mask = brain(3)
    got = masked_quantiles(*tensors([image], [mask]), (0.1, 0.5, 0.99))[0].numpy()
    np.testing.assert_allclose(got, np.quantile(image[mask], (0.1, 0.5, 0.99)), atol=1e-5)


def test_augmented_style_is_the_same_for_a_seed_whatever_the_batch():
    (a, m), (b, n) = brain(0), brain(1)
    config = ConditionConfig()
    both = augment_contrast(*tensors([a, b], [m, n]), config, generators(5, 6), 4.0)
    alone = augment_contrast(*tensors([b], [n]), config, generators(6), 4.0)
    torch.testing.assert_close(both[1:], alone)
    assert float((both[:1] - tensors([a], [m])[0]).abs().mean()) > 0.01


def wave(count=40, period=4.0):
    return torch.cos(2 * np.pi / period * torch.arange(count, dtype=torch.float32))


def test_what_other_voxels_take_depends_on_where_they_lie():
    there, back = through_voxels(40, 1.0, 0.0)
    torch.testing.assert_close(back @ (there @ wave()), wave())
    there, back = through_voxels(40, 1.0, 0.5)
    halfway = (back @ (there @ wave()))[4:-4]  # the mean of two neighbours half a voxel away
    torch.testing.assert_close(halfway, np.cos(np.pi / 4) * wave()[4:-4], rtol=0, atol=0.02)


@pytest.mark.parametrize("ratio", [0.75, 1.0, 1.3])
def test_other_voxels_leave_what_is_smooth(ratio):
    there, back = through_voxels(40, ratio, 0.3)
    assert there.shape == (back.shape[1], 40) and back.shape[0] == 40
    torch.testing.assert_close(
        (there.sum(1), back.sum(1)), (torch.ones(len(there)), torch.ones(40))
    )
    ramp = torch.linspace(0, 1, 40)
    torch.testing.assert_close((back @ (there @ ramp))[4:-4], ramp[4:-4], rtol=0, atol=0.01)


def test_interpolating_blurs_in_the_mean_by_what_is_taken_back():
    kept = []
    for offset in np.linspace(0, 1, 41)[:-1]:
        there, back = through_voxels(64, 1.0, float(offset))
        slow = wave(64, 16.0)
        kept.append(float((back @ (there @ slow))[8:-8] @ slow[8:-8] / slow[8:-8].square().sum()))
    variance = -2 * np.log(np.mean(kept)) / (2 * np.pi / 16) ** 2
    assert variance == pytest.approx(INTERPOLATED, rel=0.05)


def test_other_voxels_are_of_the_scans_seed_and_stay_inside_the_brain():
    (a, m), (b, n) = brain(0), brain(1)
    config = ConditionConfig(other_voxels=1.0, remap_strength=0, bias_strength=0, noise_std=0)
    both = augment_contrast(*tensors([a, b], [m, n]), config, generators(5, 6), 2.0)
    alone = augment_contrast(*tensors([b], [n]), config, generators(6), 2.0)
    torch.testing.assert_close(both[1:], alone)
    assert not both[~tensors([a, b], [m, n])[1]].any()
    assert np.corrcoef(both[0, 0].numpy()[m], a[m])[0, 1] > 0.9
    some = ConditionConfig(other_voxels=0.5, noise_std=0)
    never = some.model_copy(update={"other_voxels": 1e-9})  # draws alike and stays where it is
    image, mask = tensors([a], [m])
    changed = [
        not torch.equal(
            *(augment_contrast(image, mask, c, generators(k), 2.0) for c in (some, never))
        )
        for k in range(40)
    ]
    assert 10 < sum(changed) < 30


def condition_of(image, mask, config, seeds=None):
    """Condition with every scan brought to the mean look of all."""
    images, masks = image[:, 0].numpy(), mask[:, 0].numpy()
    own = [measure_look(a, m, 4.0, "T1w") for a, m in zip(images, masks, strict=True)]
    count, vectors = len(images), [look.vector() for look in own]
    known = ("T1w",)
    batch = make_batch(images, masks, ["T1w"] * count, [0] * count, known, vectors, vectors)
    wanted = torch.from_numpy(mean_look(own).vector()).expand(count, -1)
    return build_condition(batch, config, LookMatcher(config.match, 4.0, known), wanted, seeds)


def test_inference_sees_the_scan_as_it_is():
    image, mask = tensors(*[[x] for x in brain()])
    condition = condition_of(image, mask, ConditionConfig(match="none"))
    torch.testing.assert_close(condition.content, to_network(image))
    assert condition.channels.shape[1] == 2
    bare = condition_of(image, mask, ConditionConfig(content_channel=False))
    assert bare.content is None and bare.channels.shape[1] == 1


@pytest.mark.parametrize("seeds", [None, (3, 4)])
def test_the_source_look_holds_the_rim_of_what_the_scan_was_matched_to(seeds):
    pairs = [brain(0), brain(1)]
    image, mask = tensors([x**0.5 for x, _ in pairs], [m for _, m in pairs])
    image[1] = image[1] ** 3
    made = generators(*seeds) if seeds else None
    condition = condition_of(image, mask, ConditionConfig(match="histogram"), made)
    content = from_network(condition.content)
    for k in range(2):
        look = measure_look(image[k, 0].numpy(), mask[k, 0].numpy(), 4.0, "T1w").vector()
        rim = condition.source[k, -RIM_SIZE:].numpy()
        np.testing.assert_allclose(
            rim, measure_rim(content[k, 0].numpy(), mask[k, 0].numpy()), atol=1e-6
        )
        assert np.abs(rim - look[-RIM_SIZE:]).max() > 0.02
        if seeds is None:
            np.testing.assert_array_equal(condition.source[k, :-RIM_SIZE], look[:-RIM_SIZE])


def site_accuracy(config, augment, gammas=(2.0, 0.5), scans=120):
    """Accuracy of a linear site classifier on G alone; two sites that differ by their gamma."""
    pairs = [brain(seed) for seed in range(scans)]
    sites = [seed % 2 for seed in range(scans)]
    images = [image ** gammas[site] for (image, _), site in zip(pairs, sites, strict=True)]
    image, mask = tensors(images, [m for _, m in pairs])
    seeds = generators(*range(scans)) if augment else None
    gradient = condition_of(image, mask, config, seeds).channels[:, :1]
    levels = tuple(np.linspace(0.05, 0.95, 10))
    features = 10 * masked_quantiles(gradient, mask, levels).numpy()
    fit = scans * 2 // 3
    model = LogisticRegression(max_iter=2000).fit(features[:fit], sites[:fit])
    return float(model.score(features[fit:], sites[fit:]))


def test_a_gradient_map_gives_the_site_away_and_matching_hides_it_in_training_and_in_use():
    """Chance is 0.5 of 40 scans; augmentation alone leaves 0.9 at these gammas, by measurement."""
    assert site_accuracy(ConditionConfig(match="none"), augment=False) >= 0.95
    assert site_accuracy(ConditionConfig(), augment=True) <= 0.65
    assert site_accuracy(ConditionConfig(), augment=False) <= 0.65


def test_augmentation_alone_hides_much_of_a_milder_difference():
    config = ConditionConfig(match="none", remap_strength=1.0, bias_strength=0.25, noise_std=0.04)
    assert site_accuracy(config, augment=False, gammas=(1.25, 0.8)) >= 0.9
    assert site_accuracy(config, augment=True, gammas=(1.25, 0.8)) <= 0.85


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="remap_strength"):
        ConditionConfig(remap_strength=1.5)


def brought_to_a_look(source, wanted):
    """A scan that is nearly in the wanted look and one far from it: as they are, and matched.

    The looks are of `source` and `wanted` people; None: not known.
    """
    image, mask = brain(1)
    near, far = (0.98 * image).astype(np.float32), (image**3).astype(np.float32)
    looks = [measure_look(x, mask, 4.0, "T1w").vector() for x in (near, far)]
    known, count = ("T1w",), 2
    batch = make_batch(
        [near, far], [mask] * count, ["T1w"] * count, [0] * count, known, looks, looks, source
    )
    goal = torch.from_numpy(measure_look(image, mask, 4.0, "T1w").vector()).expand(count, -1)
    people = None if wanted is None else torch.tensor([float(wanted)] * count)
    matcher = LookMatcher("histogram", 4.0, known)
    config = ConditionConfig(match="histogram")
    told = build_condition(batch, config, matcher, goal, subjects=people).content
    return batch["image"], from_network(told)


def test_looks_of_one_person_are_not_believed_in_what_one_person_may_cause():
    scans, full = brought_to_a_look(None, None)
    _, of_many = brought_to_a_look([1000, 1000], 1000)
    _, of_one = brought_to_a_look([1, 1], 1)
    torch.testing.assert_close(of_many, full, atol=1e-4, rtol=0)
    torch.testing.assert_close(of_one[0], scans[0])  # moved by less than one person may account for
    moved = (full[1] - scans[1]).square()[scans[1] > 0].mean()
    assert moved > 100 * ONE_SUBJECT**2
    part = (of_one[1] - scans[1]).norm() / (full[1] - scans[1]).norm()
    assert 0.98 < part < 1


def test_what_is_believed_rises_with_the_number_of_people_on_either_side():
    def part(source, wanted):
        scans, some = brought_to_a_look([source, source], wanted)
        return float((some[0] - scans[0]).norm())

    assert part(2, 2) < part(2, 4) < part(4, 4)
    assert part(2, 4) == pytest.approx(part(4, 2), rel=1e-4)


def test_where_nothing_is_matched_nothing_changes_whoever_was_seen():
    image, mask = tensors(*[[x] for x in brain()])
    inf = torch.tensor([float("inf")])
    assert float(believed(image, image, mask, inf, inf)) == 1
    assert torch.isfinite(believed(image, image, mask, torch.ones(1), torch.ones(1))).all()
