"""Both training stages on two small synthetic sites: they learn, repeat and resume."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from sgcd_core import target_stage
from sgcd_core.batch import make_batch, sample_seed
from sgcd_core.config import load_config
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.errors import InputError, ModelError
from sgcd_core.global_stage import GlobalStage, _window, learning_rate, planned_steps
from sgcd_core.harmonizer import Harmonizer
from sgcd_core.inversions import Inversions, content_key
from sgcd_core.modelpack import load_modelpack, save_modelpack
from sgcd_core.style.encoder import load_encoder
from sgcd_core.style.look import DETAIL_SIZE, blend, mean_look, measure_look
from sgcd_core.style.outlier import OutlierModel, style_features
from sgcd_core.target_stage import TargetStage
from sgcd_core.volume.condition import Goals

SIDE = 16
SETTINGS = [
    f"prepare.shape=[{SIDE}, {SIDE}, {SIDE}]",
    "network.channels=[8, 16]",
    "network.attention_levels=[false, true]",
    "network.head_channels=8",
    "condition.match=histogram",  # the composition model knows brains, not balls
    "network.patch=1",
    "network.curve_knots=5",
    "network.norm_groups=4",
    "global_stage.warmup_steps=0",
    "global_stage.learning_rate=0.003",
    "global_stage.precision=fp32",
    "target_stage.precision=fp32",
    "target_stage.encoder=statistics",
    "target_stage.learning_rate=0.003",
]


pytestmark = pytest.mark.usefixtures("one_thread")


def config(*more):
    return load_config("tiny", settings=[*SETTINGS, *more])


def scan(seed, gamma):
    """A ball of three tissues, its folds set by `seed`, its contrast by `gamma`."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, SIDE)] * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes)) + 0.08 * rng.standard_normal((SIDE,) * 3)
    mask = radius < 0.9
    tissue = np.select([radius < 0.3, radius < 0.6], [0.1, 0.9], 0.5) ** gamma
    return (tissue * mask).astype(np.float32), mask


@functools.cache
def site_look(gamma):
    """The look of a site from four scans that no batch holds."""
    looks = [measure_look(*scan(900 + i, gamma), 4.0, "T1w") for i in range(4)]
    return mean_look(looks).vector()


def looks(*gammas):
    return Goals(torch.from_numpy(np.stack([site_look(g) for g in gammas])))


def batch(gammas, first=0, sequences=None):
    pairs = [scan(first + i, g) for i, g in enumerate(gammas)]
    return make_batch(
        [p[0] for p in pairs],
        [p[1] for p in pairs],
        sequences or ["T1w"] * len(pairs),
        [sample_seed(0, first, i) for i in range(len(pairs))],
        ("T1w", "T2w"),
        [site_look(g) for g in gammas],
        [site_look(g) for g in gammas],
    )


def trained(cfg, steps):
    stage = GlobalStage(cfg, steps)
    losses = [stage.step(batch((0.5, 2.0), first=2 * i)) for i in range(steps)]
    features = [style_features(*scan(i, g)) for i in range(4) for g in (0.5, 2.0)]
    outliers = OutlierModel.fit(features, [0] * len(features))
    common = Goals(looks(0.5, 2.0).looks.mean(0).expand(2, -1))
    return (
        stage,
        losses,
        stage.pack(outliers, common, {"name": "global", "training_sites": ["A", "B"]}),
    )


def test_every_loss_is_logged_on_its_own_and_the_denoising_error_falls():
    cfg = config("network.prediction=x0")
    fresh = GlobalStage(cfg, 24)
    check = batch((0.5, 2.0, 0.5, 2.0), first=300)
    before = float(fresh._losses(check)[0]["noise"].detach())
    stage, losses, _ = trained(cfg, 24)
    assert set(losses[0]) == {"loss", "noise", "gradient", "record", "learning_rate"}
    after = float(stage._losses(check)[0]["noise"].detach())
    assert after < 0.9 * before


def test_the_same_seed_gives_the_same_weights():
    one, two = (trained(config(), 3)[2].weights_digest() for _ in range(2))
    other = trained(config("seed=1"), 3)[2].weights_digest()
    assert one == two != other


def test_a_resumed_run_equals_an_unbroken_one():
    whole, _, _ = trained(config(), 4)
    first_half, resumed = GlobalStage(config(), 4), GlobalStage(config("seed=9"), 4)
    for i in range(2):
        first_half.step(batch((0.5, 2.0), first=2 * i))
    resumed.load_state_dict(first_half.state_dict())
    for i in range(2, 4):
        resumed.step(batch((0.5, 2.0), first=2 * i))
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert torch.equal(whole.record.values, resumed.record.values)


@pytest.mark.parametrize("start", ["noise", "inversion"])
def test_a_resumed_stage_two_equals_an_unbroken_one(start, tmp_path):
    """What was measured of the target and what is kept of Stage 1 go on as well."""
    settings = (f"target_sampler.start={start}", "target_stage.style_every=2")
    parent = trained(config(), 4)[2]

    def begun(name):
        kept = Inversions(str(tmp_path / name))
        return TargetStage(parent, config(*settings), "A", load_encoder("statistics"),
                           looks(0.5, 0.5), inversions=kept)  # fmt: skip

    def steps(stage, numbers):
        return [stage.step(batch((2.0,), first=i % 2), batch((0.5,), first=200 + i % 2))
                for i in numbers]  # fmt: skip

    whole, half, resumed = begun("whole"), begun("broken"), begun("broken")
    for stage in (whole, half):
        stage.measure_target([batch((0.5, 0.5), first=100)])
    losses = steps(whole, range(4))
    steps(half, range(2))
    resumed.load_state_dict(half.state_dict())
    assert resumed.done == 2 and steps(resumed, (2, 3)) == losses[2:]
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_step_in_bfloat16_is_close_to_one_in_float32():
    """Weights and optimizer stay float32; what autocast rounds is a percent."""
    losses, weights = {}, {}
    for precision in ("fp32", "bf16"):
        stage = GlobalStage(config(f"global_stage.precision={precision}"), 2)
        losses[precision] = [stage.step(batch((0.5, 2.0), first=2 * i)) for i in range(2)]
        weights[precision] = list(stage.network.parameters())
        assert {w.dtype for w in weights[precision]} == {torch.float32}
    exact, rounded = (losses[name][-1]["noise"] for name in ("fp32", "bf16"))
    assert exact != rounded, "the first step predicts 0 in both, the second does not"
    assert rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_prediction_trains(prediction):
    _, losses, _ = trained(config(f"network.prediction={prediction}"), 8)
    assert losses[-1]["noise"] < losses[0]["noise"]


def test_stage_two_moves_a_scan_to_the_target_and_leaves_stage_one_alone(tmp_path):
    cfg = config("target_stage.style_every=4", "condition.remap_strength=0.5")
    _, _, pack = trained(cfg, 30)
    save_modelpack(str(tmp_path / "global"), pack)
    before = pack.weights_digest()
    stage = TargetStage(
        load_modelpack(str(tmp_path / "global")), cfg, "A", load_encoder("statistics"),
        looks(0.5, 0.5),
    )  # fmt: skip
    stage.measure_target([batch((0.5, 0.5), first=100)])
    history = [stage.step(batch((2.0,), first=i), batch((0.5,), first=200 + i)) for i in range(40)]
    assert {"denoising", "style", "reconstruction", "anatomy"} <= set(history[0])
    assert "style" not in history[1]
    result = stage.pack({"name": "target-A"})
    assert result.meta["parent_weights"] == before == pack.weights_digest()
    save_modelpack(str(tmp_path / "target"), result)
    model = Harmonizer(load_modelpack(str(tmp_path / "target")))
    image, mask = scan(500, 2.0)
    truth, _ = scan(500, 0.5)
    got = model.harmonize(image, mask, "T1w", "scan-500").image
    raw_error = np.abs(image - truth)[mask].mean()
    assert np.abs(got - truth)[mask].mean() < 0.5 * raw_error
    assert not got[~mask].any()


def test_the_whole_chain_and_the_paper_s_printed_steps_also_run():
    printed = config(
        "target_sampler.t_start=35", "target_sampler.t_reverse=25", "target_sampler.steps=3",
        "target_sampler.invert_steps=3", "target_sampler.start=inversion",
        "target_sampler.kind=anchored", "target_stage.backprop=chain",
        "target_stage.target_denoising=0", "target_stage.style_every=1",
    )  # fmt: skip
    _, _, pack = trained(printed, 4)
    stage = TargetStage(pack, printed, "A", load_encoder("statistics"), looks(0.5, 0.5))
    stage.measure_target([batch((0.5,), first=100)])
    weights = [p.detach().clone() for p in stage.network.parameters()]
    stage.step(batch((2.0,)), batch((0.5,), first=200))
    moved = sum(
        float((a - b).abs().sum()) for a, b in zip(weights, stage.network.parameters(), strict=True)
    )
    assert moved > 0
    image, mask = scan(1, 2.0)
    out = Harmonizer(stage.pack({})).harmonize(image, mask, "T1w", "x").image
    assert np.isfinite(out).all()


INVERTED = [
    "target_sampler.start=inversion", "target_sampler.t_start=180", "target_sampler.steps=3",
    "target_sampler.invert_steps=4", "target_stage.style_every=1",
]  # fmt: skip


def test_what_the_frozen_network_makes_of_a_scan_is_computed_once(tmp_path):
    cfg = config(*INVERTED)
    _, _, pack = trained(cfg, 4)
    folder = tmp_path / "inversions"

    def tuned(inversions, steps=3):
        stage = TargetStage(
            pack, cfg, "A", load_encoder("statistics"), looks(0.5, 0.5), inversions=inversions
        )
        calls = []
        stage.frozen.register_forward_hook(lambda *_: calls.append(1))
        stage.measure_target([batch((0.5,), first=100)])
        losses = [stage.step(batch((2.0,)), batch((0.5,), first=100)) for _ in range(steps)]
        return losses, len(calls), stage.pack({}).weights_digest()

    anew, calls, weights = tuned(None)
    evaluations = cfg.global_sampler.steps + 4
    assert calls == (1 + 2 * 3) * evaluations  # one target scan, then two scans a step
    kept, calls, same = tuned(Inversions(str(folder)))
    assert (calls, kept, same) == (2 * evaluations, anew, weights)
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert tuned(Inversions(str(folder)))[1:] == (0, weights)
    files[0].write_bytes(files[0].read_bytes()[:100])  # a crash of the store, not of the training
    assert tuned(Inversions(str(folder)))[1:] == (evaluations, weights)


def test_an_aligned_scan_is_what_the_global_model_makes_of_it():
    """But for the noise, which is seeded by what identifies the scan."""
    _, _, pack = trained(config(), 8)
    stage = TargetStage(pack, config(), "A", load_encoder("statistics"), looks(0.5, 0.5))
    one = batch((2.0,), first=7)
    aligned, latent = stage._inverted(one)
    assert latent is None  # generation starts from noise
    key = content_key(one["image"], one["mask"], one["sequence"], one["look"])
    image, mask = scan(7, 2.0)
    model = Harmonizer(pack)
    made = model.harmonize(image, mask, "T1w", key, site_look=site_look(2.0), seed=config().seed)
    np.testing.assert_allclose(aligned[0, 0].numpy(), made.image, atol=1e-6)


def test_a_sequence_the_target_lacks_is_an_error_before_any_step():
    _, _, pack = trained(config(), 2)
    stage = TargetStage(pack, config(), "A", load_encoder("statistics"), looks(0.5, 0.5))
    stage.measure_target([batch((0.5,), first=100)])
    with pytest.raises(InputError) as caught:
        stage.step(batch((2.0,), sequences=["T2w"]), batch((0.5,), first=200))
    assert caught.value.code == "TARGET-SEQUENCE"
    assert stage.done == 0


def test_harmonizing_depends_on_scan_and_seed_alone():
    _, _, pack = trained(config(), 4)
    image, mask = scan(7, 2.0)
    model = Harmonizer(pack)
    one = model.harmonize(image, mask, "T1w", "s1", samples=3)
    model.harmonize(*scan(8, 0.5), "T1w", "s2")
    again = Harmonizer(pack).harmonize(image, mask, "T1w", "s1", samples=3)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.uncertainty, again.uncertainty)
    assert one.uncertainty.max() > 0
    assert (model.harmonize(image, mask, "T1w", "s1").image != one.image).any()


def test_the_output_has_the_distribution_of_the_matched_scan():
    _, _, pack = trained(config(), 8)
    image, mask = scan(7, 2.0)
    drawn = dataclasses.replace(pack, config=config("global_sampler.distribution=network"))
    ours, own = (
        Harmonizer(p).harmonize(image, mask, "T1w", "s").image[mask] for p in (pack, drawn)
    )
    model = Harmonizer(pack)
    content = model._denoisers(model._batch(image, mask, "T1w", None)).common.content
    wanted = np.sort((content.numpy()[0, 0][mask] + 1) / 2)
    distance, before = (np.abs(np.sort(x) - wanted).mean() for x in (ours, own))
    assert distance < 0.002 < 0.005 < before
    ranks = own.argsort()
    assert (np.diff(ours[ranks]) > -1e-6).all()


def test_what_does_not_fit_the_model_is_a_clear_error():
    _, _, pack = trained(config(), 1)
    model = Harmonizer(pack)
    image, mask = scan(0, 1.0)
    with pytest.raises(InputError, match="SCAN-SEQUENCE"):
        model.harmonize(image, mask, "FLAIR", "x")
    with pytest.raises(ModelError, match="MODEL-GRID"):
        model.harmonize(image[:8], mask[:8], "T1w", "x")
    with pytest.raises(InputError, match="SCAN-EMPTY"):
        model.harmonize(image, np.zeros_like(mask), "T1w", "x")


def test_divergence_is_said_and_not_saved():
    stage = GlobalStage(config(), 4)
    for weight in stage.network.parameters():
        weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="TRAIN-DIVERGED"):
        stage.step(batch((0.5,)))
    assert stage.done == 0


def test_a_scan_from_elsewhere_scores_as_an_outlier():
    _, _, pack = trained(config(), 1)
    model = Harmonizer(pack)
    usual = model.outlier_score(*scan(9, 0.5), "T1w")
    image, mask = scan(9, 0.5)
    strange = model.outlier_score((1 - image) * mask, mask, "T1w")
    assert usual < 2 < strange
    assert model.outlier_score(image, mask, "T2w") == float("inf")


def test_learning_rate_warms_up_and_falls_to_zero():
    stage = config("global_stage.warmup_steps=10").global_stage
    rates = [learning_rate(stage, i, 100) for i in range(101)]
    assert rates[0] < rates[5] < rates[9] == pytest.approx(0.003)
    assert rates[50] < rates[10] and rates[100] < 1e-6
    assert planned_steps(50, None, 7, 2) == 50
    assert planned_steps(50, 3, 7, 2) == 12


@pytest.mark.parametrize(
    ("order", "calls"),
    [("compare_then_update", ["loss", "update"]), ("update_then_compare", ["update", "loss"])],
)
def test_a_step_compares_with_the_record_and_updates_it_in_the_order_that_is_set(
    order, calls, monkeypatch
):
    stage = GlobalStage(config(f"record.order={order}"), 1)
    seen = []
    for name in ("loss", "update"):
        method = getattr(stage.record, name)

        def noted(*given, name=name, method=method):
            seen.append(name)
            return method(*given)

        monkeypatch.setattr(stage.record, name, noted)
    stage.step(batch((0.5, 2.0)))
    assert seen == calls


def test_losses_on_the_estimate_count_by_its_trust_and_flat_counts_all_alike(monkeypatch):
    monkeypatch.setattr(Schedule, "clean_weight", lambda self, kind, t: torch.zeros(t.shape))
    found = {}
    for weight in ("snr", "flat"):
        cfg = config("network.prediction=epsilon", f"global_stage.x0_weight={weight}")
        stage = GlobalStage(cfg, 1)
        losses, _, trust = stage._losses(batch((0.5, 2.0)))
        found[weight] = float(losses["gradient"].detach()), trust.tolist()
    assert found["snr"] == (0.0, [0.0, 0.0])
    assert found["flat"][0] > 0 and found["flat"][1] == [1.0, 1.0]


def test_the_record_is_part_of_the_model():
    stage, _, pack = trained(config(), 2)
    kept = {k.removeprefix("record."): v for k, v in pack.state.items() if k.startswith("record.")}
    for name, value in stage.record.state_dict().items():
        assert torch.equal(kept[name], value)
    assert float(kept["values"].abs().sum()) > 0


def test_stage_two_walks_anchored_where_that_is_asked_for(monkeypatch):
    """Each step of `_stepwise` starts from the aligned image, as `generate_anchored` does."""
    settings = ("target_sampler.kind=anchored", "target_sampler.t_start=40",
                "target_sampler.steps=3", "target_stage.last_k=3")  # fmt: skip
    parent = trained(config(), 2)[2]
    stage = TargetStage(parent, config(*settings), "A", load_encoder("statistics"), looks(0.5, 0.5))
    stage.measure_target([batch((0.5,), first=100)])
    bases = []
    step = target_stage.ddim_step

    def noted(schedule, x0, eps, t):
        bases.append(x0.clone())
        return step(schedule, x0, eps, t)

    monkeypatch.setattr(target_stage, "ddim_step", noted)
    stage.step(batch((2.0,)), batch((0.5,), first=200))
    walks = [bases[i : i + 3] for i in range(0, len(bases), 3)]
    assert walks and all(torch.equal(walk[0], x) for walk in walks for x in walk[1:])


def test_models_know_how_many_people_their_looks_are_of():
    cfg = config()
    stage, _, _ = trained(cfg, 2)
    common = Goals(looks(0.5, 2.0).looks.mean(0).expand(2, -1), torch.tensor([9.0, 8.0]))
    outliers = OutlierModel.fit([style_features(*scan(i, 0.5)) for i in range(3)], [0, 0, 0])
    pack = stage.pack(outliers, common, {"name": "global"})
    goals = Goals(looks(0.5, 0.5).looks, torch.tensor([1.0, 4.0]))
    tuned = TargetStage(pack, cfg, "A", load_encoder("statistics"), goals).pack({"name": "A"})
    for made, wanted in ((pack, [9, 8]), (tuned, [1, 4])):
        assert Harmonizer(made).goals.subjects.tolist() == wanted
    assert Harmonizer(tuned).common.subjects.tolist() == [9, 8]


def test_a_site_of_one_person_is_harmonized_less_than_one_of_many():
    cfg = config()
    _, _, pack = trained(cfg, 2)
    goals = Goals(looks(0.55, 0.55).looks, torch.tensor([1.0, 1.0]))
    model = Harmonizer(TargetStage(pack, cfg, "A", load_encoder("statistics"), goals).pack({}))
    image, mask = scan(7, 0.5)

    def moved(**known):
        made = model.harmonize(image, mask, "T1w", "s", site_look=site_look(0.5), **known).image
        return float(np.sqrt(((made - image)[mask] ** 2).mean()))

    assert moved(site_subjects=1) < moved(site_subjects=2) < moved(site_subjects=4)
    assert moved(site_subjects=1000) == pytest.approx(moved(), rel=1e-5)
    alone = model.harmonize(image, mask, "T1w", "s").image
    of_one = model.harmonize(
        image, mask, "T1w", "s", site_look=measure_look(image, mask, 4.0, "T1w").vector(),
        site_subjects=1,
    ).image  # fmt: skip
    np.testing.assert_array_equal(alone, of_one)


def test_what_stage_2_keeps_of_a_scan_does_not_depend_on_who_asked_first():
    cfg = config("condition.fine_voxel_mm=1.3")
    _, _, pack = trained(cfg, 2)
    stage = TargetStage(pack, cfg, "A", load_encoder("statistics"), looks(0.5, 0.5))
    image, mask = scan(7, 2.0)

    def kept(part):
        own = measure_look(image, mask, 4.0, "T1w", voxel_mm=1.0).vector()
        far = np.where(np.arange(len(own)) == len(own) - DETAIL_SIZE - 1, 1.5, own)
        one = make_batch(
            [image], [mask], ["T1w"], [0], cfg.sequences, [far], [blend(far, own, part)],
            voxel=[1.0],
        )  # fmt: skip
        return stage._invert(one, "key")["aligned"]

    torch.testing.assert_close(kept(0.1), kept(0.9), rtol=0, atol=0)


def test_a_look_filter_that_was_never_fitted_stays_at_rest_in_stage_2():
    cfg = config(
        "target_stage.learning_rate=0.01", "network.prediction=residual",
        "network.look_filter_radius=1",
    )  # fmt: skip
    _, _, pack = trained(cfg, 1)
    stage = TargetStage(pack, cfg, "A", load_encoder("statistics"), looks(0.5, 0.5))
    assert stage.network.look_filter.at_rest
    stage.measure_target([batch((0.5, 0.5), 200, ["T1w", "T2w"])])
    before = {k: v.clone() for k, v in stage.network.state_dict().items()}
    for i in range(3):
        stage.step(batch((0.5, 2.0), 10 * i), batch((0.5, 0.5), 100 + 10 * i))
    after = stage.network.state_dict()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert stage.network.look_filter.at_rest and changed
    with torch.no_grad():
        stage.network.look_filter.perceptron[-1].weight[0, 0] = 1
    assert not stage.network.look_filter.at_rest


def test_every_window_holds_some_brain():
    mask = torch.zeros(24, 24, 24, dtype=torch.bool)
    mask[20:23, 1:3, 11:14] = True
    for seed in range(60):
        window = _window(mask, (6, 8, 5), torch.Generator().manual_seed(seed))
        assert mask[window].any()
        assert [s.stop - s.start for s in window] == [6, 8, 5]
        assert all(s.start >= 0 and s.stop <= 24 for s in window)
