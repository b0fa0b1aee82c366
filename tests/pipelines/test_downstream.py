"""Task 3: a site that features tell is found, chance is chance, and no subject is on both sides."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from fake_lake import fake_lake

from pipelines.catalog import Catalog
from pipelines.downstream import (
    NONFINITE,
    REPEATS,
    Sample,
    combat_features,
    enough_subjects,
    evaluate_downstream,
    score_sample,
    score_sites,
    splits,
)
from pipelines.features import features_of, load_features
from sgcd_core.errors import ConfigError, ModelError
from sgcd_core.style.slices import cut_slices, plan_slices

SITES = ("A", "B", "C")


def people(each=20, traveling=0):
    """Subjects and sites of scans: `each` at every site, some at all of them."""
    pairs = [(f"d/{site}{i}", site) for site in SITES for i in range(each)]
    pairs += [(f"d/x{i}", site) for i in range(traveling) for site in SITES]
    return pairs


def sample_of(pairs, make, ages=None, methods=("raw",)):
    sample = Sample([p for p, _ in pairs], [s for _, s in pairs])
    sample.ages = [float("nan")] * len(pairs) if ages is None else list(ages)
    for method in methods:
        rng = np.random.default_rng(3)
        sample.features[method] = [
            make(number, site, rng) for number, (_, site) in enumerate(pairs)
        ]
    return sample


def random_features(number, site, rng):
    return rng.normal(size=12)


def telling(number, site, rng):
    return rng.normal(size=12) + 4 * np.eye(12)[SITES.index(site)]


def by_measure(lines):
    return {line.measure: line for line in lines}


def test_no_subject_trains_and_tests_and_every_site_does_both():
    pairs = people(each=5, traveling=3)
    subjects, sites = (np.array(x) for x in zip(*pairs, strict=True))
    seen = set()
    for train, test in splits(subjects, sites, seed=1):
        assert not set(subjects[train]) & set(subjects[test])
        assert (train ^ test).all()
        assert set(sites[train]) == set(sites[test]) == set(SITES)
        assert 0.6 <= len(set(subjects[train])) / len(set(subjects)) <= 0.8
        seen.add(tuple(train))
    assert len(seen) == REPEATS  # the partitions differ
    again = [tuple(train) for train, _ in splits(subjects, sites, seed=1)]
    assert set(again) == seen


def test_people_alone_in_their_stratum_are_parted_together():
    """Sites of one subject each cannot be stratified; ages are still split 70 to 30."""
    subjects = np.array([f"d/{i}" for i in range(10)])
    sites = np.array([f"site{i}" for i in range(10)])
    for train, test in splits(subjects, sites):
        assert (train.sum(), test.sum()) == (7, 3)


def test_features_that_tell_the_site_are_found_out_and_random_ones_are_not():
    found = {}
    for name, make in (("telling", telling), ("random", random_features)):
        lines, notes = score_sample("T1w", sample_of(people(), make))
        assert any("no brain age" in note for note in notes)
        found[name] = by_measure(lines)
    accuracy = found["telling"]["site_balanced_accuracy"]
    assert accuracy.by_method["raw"].mean > 0.95
    assert found["telling"]["site_f1"].by_method["raw"].mean > 0.95
    assert accuracy.chance == pytest.approx(1 / 3)
    assert accuracy.shuffled.mean < 0.5
    assert abs(found["random"]["site_balanced_accuracy"].by_method["raw"].mean - 1 / 3) < 0.15
    assert (accuracy.classes, accuracy.subjects, accuracy.scans) == (3, 60, 60)


def test_combat_takes_the_site_out_of_features_and_leaves_the_age_in_them():
    rng = np.random.default_rng(4)
    pairs = people()
    ages = rng.uniform(20, 80, len(pairs)).tolist()
    shift = {site: rng.normal(0, 3, 6) for _, site in pairs}
    numbers = iter(ages)

    def features(number, site, rng):
        return shift[site] + rng.normal(0, 0.3, 6) + next(numbers) / 20 * np.eye(6)[0]

    sample = sample_of(pairs, features, ages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines, _ = score_sample("T1w", sample, combat=True)
    found = by_measure(lines)
    site, age = found["site_balanced_accuracy"], found["age_mae"]
    assert site.by_method["raw"].mean > 0.95
    assert site.by_method["combat"].mean < 2 * site.chance
    assert age.by_method["combat"].mean < 0.5 * age.chance


def test_combat_learns_from_training_features_alone_and_leaves_lone_scans():
    rng = np.random.default_rng(5)
    sites = np.array(["a"] * 6 + ["b"] * 6 + ["c"])
    x = rng.normal(size=(13, 3)) + 2.0 * (sites == "b")[:, None]
    asked = np.array(["a", "b", "c"])
    x_test = rng.normal(size=(3, 3))
    given, first = combat_features(x, sites, x_test, asked)
    np.testing.assert_array_equal(given[-1], x[-1])
    np.testing.assert_array_equal(first[-1], x_test[-1])
    moved = x_test.copy()
    moved[0] += 100
    _, second = combat_features(x, sites, moved, asked)
    np.testing.assert_array_equal(first[1:], second[1:])
    few = np.array(["a"] * 6 + ["b"])
    same, _ = combat_features(x[:7], few, x_test, asked)
    np.testing.assert_array_equal(same, x[:7])


def test_a_subject_that_is_recognized_does_not_tell_its_site():
    """Features that only name the person help when it is in both parts; here it never is."""
    pairs = [(person, site) for person, site in people(each=8) for _ in range(4)]
    codes = {person: np.random.default_rng(n).normal(size=12) * 5 for n, (person, _) in
             enumerate(dict.fromkeys(pairs))}  # fmt: skip
    sample = sample_of(pairs, lambda n, site, rng: codes[pairs[n][0]] + 0.01 * rng.normal(size=12))
    lines, _ = score_sample("T1w", sample)
    assert by_measure(lines)["site_balanced_accuracy"].by_method["raw"].mean < 0.6


def test_an_age_that_features_tell_is_predicted_better_than_by_the_mean():
    ages = np.random.default_rng(0).uniform(20, 80, 60)

    def aging(number, site, rng):
        return rng.normal(size=12) + ages[number] / 10 * np.eye(12)[5]

    found = {
        name: by_measure(score_sample("T1w", sample_of(people(), make, ages))[0])
        for name, make in (("aging", aging), ("random", random_features))
    }
    error = found["aging"]["age_mae"]
    assert error.chance is not None
    assert error.by_method["raw"].mean < 0.75 * error.chance
    assert error.shuffled.mean > 0.9 * error.chance
    assert found["random"]["age_mae"].by_method["raw"].mean > 0.85 * error.chance
    mse = found["aging"]["age_mse"].by_method["raw"].mean
    assert mse >= error.by_method["raw"].mean ** 2


def test_a_site_of_one_subject_is_left_out_and_named():
    pairs = [*people(each=4), ("d/lone", "Z"), ("d/lone", "Z")]
    subjects, sites = (np.array(x) for x in zip(*pairs, strict=True))
    kept, small = enough_subjects(subjects, sites)
    assert small == ["Z"] and kept.sum() == 12
    lines, notes = score_sample("T1w", sample_of(pairs, lambda n, s, rng: rng.normal(size=3)))
    assert by_measure(lines)["site_recall"].classes == 3
    assert any("Z" in note for note in notes)
    lines, notes = score_sample("T1w", sample_of(pairs[-2:], random_features))
    assert lines == [] and any("two sites" in note for note in notes)


def test_features_that_are_no_numbers_cost_a_method_those_scans_and_no_more():
    ages = np.random.default_rng(0).uniform(20, 80, 60)
    methods = ("raw", "nyul", "sgcd")
    whole, usual = (sample_of(people(), telling, ages, methods) for _ in range(2))
    whole.features["nyul"][3] = np.full(12, np.nan)
    whole.features["nyul"][30][5] = np.inf
    lines, notes = score_sample("T1w", whole)
    before, none = score_sample("T1w", usual)
    assert none == [] and len(notes) == 1
    assert "2 of 60 scans left out for nyul" in notes[0] and NONFINITE in notes[0]
    for line, other in zip(lines, before, strict=True):
        assert line.by_method["raw"] == other.by_method["raw"] == other.by_method["nyul"]
        assert line.by_method["sgcd"] == other.by_method["sgcd"]
        assert np.isfinite(line.by_method["nyul"].mean)
    whole.features["nyul"] = [np.full(12, np.nan)] * 60
    assert set(score_sample("T1w", whole)[0][0].by_method) == {"raw", "sgcd"}
    whole.features["raw"][7] = np.full(12, np.nan)
    lines, _ = score_sample("T1w", whole, combat=True)
    assert {(line.subjects, line.scans) for line in lines} == {(59, 59)}


# a whole lake


@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    lake, config = fake_lake(str(tmp_path_factory.mktemp("lake")), lambda scan, truth: truth)
    scans = Catalog(lake).rows("scans").to_pylist()
    for number, scan in enumerate(scans):
        scan |= {"age": 30.0 + number, "recorded_at": None}
    Catalog(lake).append("scans", scans)
    found = evaluate_downstream(lake, "target-T", 1, config, features="statistics")
    return lake, config, found


def test_sites_are_told_from_raw_scans_and_not_from_perfect_outputs(downstream):
    lake, _, found = downstream
    accuracy = by_measure(found.lines)["site_balanced_accuracy"]
    assert found.features == "statistics" and accuracy.classes == 3
    assert accuracy.by_method["raw"].mean > 0.9
    assert accuracy.by_method["sgcd"].mean < 0.6
    rows = Catalog(lake).frame("site_metrics")
    chosen = rows[rows.metric == "site_balanced_accuracy.statistics"].set_index("method")
    assert set(chosen.index) == {"raw", "nyul", "sgcd", "shuffled", "chance"}
    assert chosen.loc["sgcd", "before"] == chosen.loc["raw", "after"]
    assert chosen.site.isna().all()
    assert "age_mae.statistics" in set(rows.metric)


def test_evaluating_again_adds_nothing(downstream):
    lake, config, first = downstream
    again = evaluate_downstream(lake, "target-T", 1, config, features="statistics")
    assert first.written and not again.written
    assert again.lines == first.lines


def test_a_scan_whose_features_are_no_numbers_has_its_code(tmp_path, monkeypatch):
    lake, config = fake_lake(str(tmp_path), lambda scan, truth: truth)
    usual, seen = features_of, []

    def once_nan(network, image, mask):
        seen.append(image)
        found = usual(network, image, mask)
        return found * np.nan if len(seen) == 2 else found  # the first scan by Nyúl's method

    monkeypatch.setattr("pipelines.downstream.features_of", once_nan)
    found = evaluate_downstream(lake, "target-T", 1, config, features="statistics")
    first = sorted(r["scan_id"] for r in Catalog(lake).rows("results").to_pylist())[0]
    assert found.skipped == {first: NONFINITE}
    assert by_measure(found.lines)["site_f1"].by_method.keys() == {"raw", "nyul", "sgcd"}


# features


@pytest.fixture(scope="module")
def resnet():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return resnet18(weights=None).eval()


@pytest.mark.parametrize("spec", ["{}/net.pth", "resnet18:{}/net.safetensors"])
def test_resnet18_is_read_from_a_file_without_its_last_layer(spec, resnet, tmp_path):
    from safetensors.torch import save_file

    torch.save(resnet.state_dict(), tmp_path / "net.pth")
    save_file(resnet.state_dict(), tmp_path / "net.safetensors")
    network = load_features(spec.format(tmp_path))
    assert network.name.startswith("resnet18-") and len(network.name) == 17
    image = np.random.default_rng(0).random((24, 28, 24), dtype=np.float32)
    mask = np.zeros(image.shape, bool)
    mask[3:20, 3:25, 3:20] = True
    found = features_of(network, image, mask)
    assert found.shape == (512,)
    # The whole network's answer is a linear function of just these features.
    slices = cut_slices(
        torch.from_numpy(np.where(mask, image, 0)), plan_slices(torch.from_numpy(mask), 4), 224
    ).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in
                 ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    with torch.no_grad():
        wanted = resnet((slices - mean) / std).mean(0)
        got = resnet.fc(torch.from_numpy(found).float())
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_other_weights_have_another_name(resnet, tmp_path):
    weights = resnet.state_dict()
    names = []
    for number, scale in enumerate((1, 1, 2)):
        changed = {**weights, "conv1.weight": scale * weights["conv1.weight"]}
        torch.save(changed, tmp_path / f"{number}.pth")
        names.append(load_features(f"resnet18:{tmp_path}/{number}.pth").name)
    assert names[0] == names[1] != names[2]
    assert load_features("statistics").name == "statistics"


def test_what_lies_outside_the_brain_does_not_matter():
    network = load_features("statistics")
    rng = np.random.default_rng(0)
    image, mask = rng.random((20, 20, 20), dtype=np.float32), np.zeros((20, 20, 20), bool)
    mask[4:16, 4:16, 4:16] = True
    other = np.where(mask, image, rng.random(image.shape, dtype=np.float32))
    np.testing.assert_array_equal(
        features_of(network, image, mask), features_of(network, other, mask)
    )


def test_wrong_weights_and_names_are_said(resnet, tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for spec in (f"{tmp_path}/other.pth", f"{tmp_path}/none.pth", "resnet18"):
        with pytest.raises(ModelError) as caught:
            load_features(spec)
        assert caught.value.code == "ENCODER-WEIGHTS"
    with pytest.raises(ConfigError):
        load_features("resnet19")


def test_without_weights_the_statistics_serve(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_features("auto").name == "statistics"


def test_a_site_without_a_test_scan_is_no_mistake():
    x = np.repeat(np.eye(3), 4, axis=0) * 10
    y = np.repeat(np.array(["A", "B", "C"]), 4)
    found = score_sites(x, y, x[:8], y[:8])
    assert set(found.values()) == {1.0}
    wrong = score_sites(x, y, x[:8], np.repeat(np.array(["A", "C"]), 4))  # B is guessed for C
    assert wrong["site_recall"] == wrong["site_balanced_accuracy"] == 0.5
    assert wrong["site_precision"] == pytest.approx(1 / 3)
