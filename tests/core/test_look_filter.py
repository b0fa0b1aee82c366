"""The filter between the resolutions of two looks."""

import pytest
import torch

from pipelines.box.filters import set_limits
from sgcd_core.batch import make_batch
from sgcd_core.box import load_box
from sgcd_core.config import load_config
from sgcd_core.diffusion.look_filter import KNOTS, LOWEST, LookFilter, offset_groups
from sgcd_core.diffusion.network import LookEmbedding, build_network
from sgcd_core.global_stage import GlobalStage
from sgcd_core.style.look import LOOK_SIZE, voxels
from sgcd_core.volume.condition import LookMatcher, build_condition, filter_strength

FEATURES = 7


def brain(seed: int = 0) -> torch.Tensor:
    """(1, 1, 12, 14, 10) in [-0.8, 0.8] with -1 around it, the outside of a brain."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((1, 1, 12, 14, 10), -1.0)
    out[..., 3:9, 3:11, 2:8] = 1.6 * torch.rand((6, 8, 6), generator=generator) - 0.8
    return out


def with_coefficients(values: torch.Tensor, radius: int = 2) -> LookFilter:
    """A filter whose coefficients are `values`, whatever the looks."""
    out = LookFilter(FEATURES, radius)
    with torch.no_grad():
        out.perceptron[-1].bias.copy_(values)
    return out


def one(radius: int = 2, **at: float) -> torch.Tensor:
    """Coefficients that are 0 but for those named: `w`, `u` or `v` with the distances, `curve0`."""
    groups = offset_groups(radius)
    names = [f"{kind}{i}{j}{k}" for kind in "wuv" for i, j, k in groups]
    names += [f"curve{knot}" for knot in range(KNOTS)]
    assert set(at) <= set(names)
    return torch.tensor([at.get(name, 0.0) for name in names])


def test_a_fresh_filter_changes_nothing() -> None:
    content = brain()
    changed = LookFilter(FEATURES, 2)(content, torch.randn(1, FEATURES))
    torch.testing.assert_close(changed, content)


@pytest.mark.parametrize("radius", [1, 2])
def test_the_filter_is_the_sum_of_its_basis(radius: int) -> None:
    look_filter = LookFilter(FEATURES, radius)
    torch.nn.init.normal_(look_filter.perceptron[-1].weight, std=0.02)
    content, features = torch.cat([brain(1), brain(2)]), torch.randn(2, FEATURES)
    changed = look_filter(content, features)
    for before, after, found in zip(
        content, changed, look_filter.coefficients(features), strict=True
    ):
        wanted = before + torch.einsum("k,kxyz->xyz", found, look_filter.basis(before))
        inside = before > -1
        torch.testing.assert_close(after[inside], wanted.clamp(min=LOWEST)[inside])
        assert (after[~inside] == -1).all()


def test_a_weight_moves_a_voxel_towards_the_mean_of_its_neighbours_in_the_brain() -> None:
    content = brain()
    changed = with_coefficients(one(w100=1.0))(content, torch.zeros(1, FEATURES))
    x = content[0, 0]
    torch.testing.assert_close(changed[0, 0, 5, 5, 5], (x[4, 5, 5] + x[6, 5, 5]) / 2)
    # at the brain's border the one neighbour that is brain counts, for its half
    torch.testing.assert_close(changed[0, 0, 3, 5, 5], (x[3, 5, 5] + x[4, 5, 5]) / 2)


def test_what_is_outside_acts_on_the_rim_alone() -> None:
    content = brain()
    x = content[0, 0]
    level = with_coefficients(one(u010=-0.1))(content, torch.zeros(1, FEATURES))[0, 0]
    torch.testing.assert_close(level[5, 3, 5], x[5, 3, 5] - 0.05)
    slope = with_coefficients(one(v002=0.5))(content, torch.zeros(1, FEATURES))[0, 0]
    torch.testing.assert_close(slope[5, 5, 3], 1.25 * x[5, 5, 3])
    for changed in (level, slope):
        torch.testing.assert_close(changed[5:7, 5:9, 4:6], x[5:7, 5:9, 4:6])


def test_a_curve_acts_on_the_intensity_alone() -> None:
    content = brain()
    content[..., 5, 5, 5] = 0.0
    changed = with_coefficients(one(curve4=0.25))(content, torch.zeros(1, FEATURES))
    assert changed[0, 0, 5, 5, 5].item() == pytest.approx(0.25)


def test_no_side_is_preferred() -> None:
    generator = torch.Generator().manual_seed(3)
    size = len(one())
    look_filter = with_coefficients(0.05 * torch.randn(size, generator=generator))
    content, features = brain(), torch.zeros(1, FEATURES)
    for axis in (2, 3, 4):
        mirrored = look_filter(content.flip(axis), features).flip(axis)
        torch.testing.assert_close(mirrored, look_filter(content, features))


def test_the_border_of_a_window_is_not_the_rim_of_a_brain() -> None:
    """A window cut from the middle of a brain, as in training: its border gains no rim."""
    look_filter = with_coefficients(one(u100=-0.1, u200=-0.1))
    window = torch.zeros(1, 1, 8, 8, 8)
    torch.testing.assert_close(look_filter(window, torch.zeros(1, FEATURES)), window)


def test_the_network_corrects_what_the_filter_gives() -> None:
    """A fresh U-Net adds nothing, so the output is what the filter changed."""
    config = load_config("tiny", settings=["prepare.shape=[16, 16, 16]"])
    network = build_network(config)
    with torch.no_grad():
        network.look_filter.perceptron[-1].bias[: 3 * len(offset_groups(2))] = 0.02
    x = 2 * torch.rand((1, 3, 16, 16, 16), generator=torch.Generator().manual_seed(2)) - 1
    labels = LookEmbedding.labels_of(torch.tensor([1]), *torch.zeros(2, 1, LOOK_SIZE))
    out = network(x, torch.tensor([999]), labels)
    features = network.network.class_embedding.features(labels)
    changed = network.look_filter(x[:, 2, None], features)
    torch.testing.assert_close(out, changed - x[:, 2, None], atol=1e-6, rtol=0)
    assert out.abs().max() > 0.01
    out.square().sum().backward()
    assert network.look_filter.perceptron[-1].bias.grad.abs().max() > 0


def test_scans_of_fine_voxels_are_given_a_part_of_what_the_filter_does() -> None:
    config = load_config("small", settings=["prepare.shape=[16, 16, 16]", "global_stage.crop=null"])
    looks = torch.zeros(6, LOOK_SIZE)
    voxels(looks)[:] = torch.tensor([0.0, 0.9, 1.3, 1.3 * 1.075, 1.5, 2.2])
    wanted = looks[1].expand(6, -1)
    found = filter_strength(wanted, looks, config.condition)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.5, 0.75, 1.0, 1.0]))
    assert (filter_strength(looks, wanted, config.condition) == found).all()
    assert (filter_strength(wanted, looks, load_config("tiny").condition) == 1).all()

    network = build_network(config)
    with torch.no_grad():
        network.look_filter.perceptron[-1].bias[: 3 * len(offset_groups(2))] = 0.02
    x = (torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(2)) + 0.5) / 2
    mask = x < 2
    matcher = LookMatcher("none", 2.0, config.sequences)

    def changed(voxel_mm: float) -> torch.Tensor:
        look = torch.zeros(1, LOOK_SIZE)
        voxels(look)[:] = voxel_mm
        batch = make_batch(
            [x[0, 0].numpy()], [mask[0, 0].numpy()], ["T2w"], [0], config.sequences,
            look.numpy(), look.numpy(),
        )  # fmt: skip
        condition = build_condition(batch, config.condition, matcher, batch["look"])
        labels = LookEmbedding.labels_of(
            batch["sequence"], batch["look"], condition.source, condition.strength
        )
        noisy = torch.cat([x, condition.channels], 1)
        with torch.no_grad():
            return network(noisy, torch.tensor([999]), labels)

    assert changed(2.0).abs().mean() > 0.005
    torch.testing.assert_close(changed(1.0), changed(2.0) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(changed(0.0), changed(2.0))


def test_a_training_from_fresh_weights_leaves_the_filter_at_rest() -> None:
    config = load_config("tiny")
    box = load_box(config)
    assert box is not None
    for start, trained in ((None, False), (box, True)):
        stage = GlobalStage(config, 1, box=start)
        look_filter = stage.network.look_filter
        assert {p.requires_grad for p in look_filter.parameters()} == {trained}
    assert look_filter.perceptron[-1].weight.abs().max() > 0


def test_other_predictions_have_no_such_filter() -> None:
    for kind in ("x0", "v", "epsilon"):
        config = load_config("tiny", settings=[f"network.prediction={kind}"])
        assert build_network(config).look_filter is None
    off = load_config("tiny", settings=["network.look_filter_radius=0"])
    assert build_network(off).look_filter is None
    assert build_network(load_config("tiny")).look_filter is not None


def test_looks_unlike_those_it_was_fitted_to_do_not_run_away() -> None:
    look_filter = LookFilter(FEATURES, 2)
    torch.nn.init.normal_(look_filter.perceptron[-1].weight, std=0.1)
    known = torch.randn(50, FEATURES, generator=torch.Generator().manual_seed(1))
    set_limits(look_filter, known)
    inside = look_filter.coefficients(known)
    torch.testing.assert_close(inside, look_filter.perceptron(known))
    far = look_filter.coefficients(100 * known)
    assert not torch.equal(far, look_filter.perceptron(100 * known))
    assert (far <= inside.max(0).values).all() and (far >= inside.min(0).values).all()
