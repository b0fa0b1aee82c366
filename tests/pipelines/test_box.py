"""The pool of random sites, and training from it; balls stand for brains."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity

from pipelines.box import make, scans
from pipelines.box.composition import (
    _ROW,
    fit_anatomy,
    fit_composition,
    measure_site,
    read_sites,
    score_composition,
)
from pipelines.box.curve import learning_curve
from pipelines.box.filters import fit_look_filter, normals_of, score_look_filter
from pipelines.box.network import (
    Samples,
    collate,
    filter_normals,
    fixed_samples,
    start_weights,
    train_network,
)
from pipelines.box.scans import GRIDS, Pool, SiteScans, random_site
from pipelines.spawned import end_with_parent
from sgcd_core.batch import make_batch
from sgcd_core.box import Box
from sgcd_core.config import load_config
from sgcd_core.diffusion.network import build_network
from sgcd_core.errors import SgcdError, UsageError
from sgcd_core.global_stage import GlobalStage
from sgcd_core.style.composition import Composition, CompositionModel
from sgcd_core.style.look import LEVELS, LOOK_SIZE, PROFILE_SIZE, measure_look
from sgcd_core.style.shading import SHADING_SIZE, SIDES
from sgcd_core.volume.condition import Condition, from_network, to_network

#: A network that trains in no time.
NARROW = [
    "network.channels=[8, 16]", "network.attention_levels=[false, false]",
    "network.norm_groups=4", "network.head_channels=8", "network.patch=4",
]  # fmt: skip


def ball(seed, shape, gamma):
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes)) + 0.05 * rng.standard_normal(shape)
    mask = radius < 0.9
    tissue = np.select([radius < 0.4, radius < 0.4 + 0.3 * rng.uniform()], [0.8, 0.5], 0.2)
    return (tissue**gamma * mask).astype(np.float32), mask


def site(number, sequence="T1w", subjects=5):
    images, masks = {}, {}
    for grid, (_, shape) in GRIDS.items():
        small = tuple(n // 2 for n in shape) if grid == "small" else shape
        pairs = [ball(10 * number + k, small, 0.5 + 0.2 * number) for k in range(subjects)]
        images[grid] = np.stack([p[0] for p in pairs])
        masks[grid] = np.stack([p[1] for p in pairs])
    return SiteScans(sequence, images, images, masks)


def filled(folder, sites=3):
    pool = Pool(folder, mixed=sites)
    for number in range(sites):
        for sequence in ("T1w", "T2w"):
            pool.add(number, site(number, sequence))
    return pool


def test_a_pool_gives_back_what_was_put_in(tmp_path):
    pool, scans = Pool(tmp_path), site(1)
    pool.add(1, scans)
    (path,) = pool.files()
    image, mask, looks = Pool.read(path, "tiny", 2)
    np.testing.assert_array_equal(mask, scans.masks["tiny"][2])
    np.testing.assert_allclose(image, scans.clean["tiny"][2], atol=1 / 254)
    assert not image[~mask].any()
    own = measure_look(scans.images["tiny"][2], mask, GRIDS["tiny"][0], "T1w").vector()
    np.testing.assert_array_equal(looks[2], own)


def small_model():
    return Composition([CompositionModel(2, hidden=4)])


def take(samples, count):
    return list(itertools.islice(iter(samples), count))


def test_samples_are_the_same_for_a_seed_and_a_number(tmp_path):
    pool, config, model = filled(tmp_path), load_config("tiny"), small_model()
    first, second = take(Samples(pool, config, model, 3), 2)
    (again,) = take(Samples(pool, config, model, 3, start=1), 1)
    assert torch.equal(second["image"], again["image"])
    assert torch.equal(second["look"], again["look"])
    assert torch.equal(second["condition"][0], again["condition"][0])
    assert not torch.equal(first["image"], second["image"])


def test_held_out_samples_stay_and_show_the_error_without_learning(tmp_path):
    pool, config, model = filled(tmp_path), load_config("tiny"), small_model()
    one, two = (fixed_samples(pool, config, model, 2) for _ in range(2))
    assert torch.equal(one[1][0]["image"], two[1][0]["image"])
    assert torch.equal(one[1][1].channels, two[1][1].channels)
    assert one[0][0]["sequence"] != one[1][0]["sequence"]
    stage = GlobalStage(config, 1, composition=model)
    before = {k: v.clone() for k, v in stage.network.state_dict().items()}
    assert stage.error(*one[0]) == stage.error(*two[0]) > 0
    assert all(torch.equal(v, before[k]) for k, v in stage.network.state_dict().items())


def test_a_window_is_cut_from_scan_and_condition_alike(tmp_path):
    pool, model = filled(tmp_path), small_model()
    settings = ["condition.contrast_augmentation=false", "global_stage.crop=[16, 24, 16]"]
    config = load_config("tiny", settings=settings)
    (sample,) = take(Samples(pool, config, model, 3), 1)
    batch, condition = collate([sample, sample])
    assert batch["image"].shape == condition.content.shape == (2, 1, 16, 24, 16)
    image, content = batch["image"][batch["mask"]], condition.content[batch["mask"]]
    assert np.corrcoef(image, content)[0, 1] > 0.9


def test_windows_of_one_scan_go_into_different_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.box.network.TURNS", 3)
    pool, model = filled(tmp_path), small_model()
    config = load_config("tiny", settings=["global_stage.crop=[16, 24, 16]"])
    found = take(Samples(pool, config, model, 3, windows=2), 9)
    seeds = [int(sample["seed"]) for sample in found]
    assert seeds[3:6] == [seed + 1 for seed in seeds[:3]] and len(set(seeds)) == 9
    assert torch.equal(found[0]["look"], found[3]["look"])
    assert not torch.equal(found[0]["image"], found[3]["image"])
    for start in (2, 5, 7):  # they go on wherever they were left
        again = take(Samples(pool, config, model, 3, start=start, windows=2), 9 - start)
        assert [int(sample["seed"]) for sample in again] == seeds[start:]
        assert torch.equal(again[-1]["image"], found[-1]["image"])


def test_no_scan_is_handed_out_twice(tmp_path):
    pool = Pool(tmp_path)
    one, other = pool.take("one", 130), pool.take("other", 250)
    more = Pool(tmp_path).take("one", 230)  # another process, later
    assert more[:130] == one and len(more) == 230
    assert len({*more, *other}) == 480
    assert sorted(pool.take("one", 300) + pool.take("other", 300)) == list(range(600))
    found = [pool.scan(number) for number in range(600)]
    assert len(set(found)) == 600
    assert {path.stem for path, _ in found} == {
        f"{sequence}-{site:07d}" for sequence in ("T1w", "T2w") for site in range(60)
    }
    first = Counter(path.stem for path, _ in found[:100])  # mixed
    assert len(first) == 20 and len({path for path, _ in found[:4]}) > 1
    assert pool.wanted() == 60 + scans.AHEAD
    with pytest.raises(ValueError, match="numbered by"):
        Pool(tmp_path, mixed=7).take("one", 1)


def test_a_scan_serves_the_filter_or_the_network_and_once(tmp_path, monkeypatch):
    """By what is read, over a run that is broken off and goes on."""
    read = []
    usual = Pool.read

    def reading(path, grid, index):
        read.append((path.name, index))
        return usual(path, grid, index)

    monkeypatch.setattr(Pool, "read", staticmethod(reading))
    monkeypatch.setattr(scans, "HANDFUL", 6)
    config, model = load_config("tiny", settings=NARROW), small_model()
    pool = filled(tmp_path / "pool")
    for steps in (2, 4):
        train_network(
            pool, config, model, tmp_path / "tiny", minutes=5, total_steps=steps, beside=False,
            filter_samples=6,
        )  # fmt: skip
    size = config.global_stage.batch_size
    assert len(read) == len(set(read)) == 6 + 4 * size


def test_what_is_usual_follows_from_the_scans_fitted_to_not_from_who_was_quick(
    tmp_path, monkeypatch
):
    quick = functools.partial(fit_look_filter, steps=20)
    monkeypatch.setattr("pipelines.box.network.fit_look_filter", quick)
    config, model, found = load_config("tiny", settings=NARROW), small_model(), []
    for sites in (3, 5):
        pool = filled(tmp_path / f"pool{sites}", sites)
        pool.mixed = 3
        network = train_network(
            pool, config, model, tmp_path / f"tiny{sites}", minutes=5, total_steps=0, beside=False,
            filter_samples=6,
        )  # fmt: skip
        found.append(Box.from_bytes(network.read_bytes()).network)
    assert len(pool.files()) == 10
    assert found[0]["network.class_embedding.detail_mean"].abs().max() > 0
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def idle(seconds):
    raise InterruptedError


def test_a_site_is_the_same_whoever_makes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "load_anatomy", lambda name: name)

    def made(folder, *producers):
        """Anatomies and the first random number of each site, by its number."""
        found = {}

        def random(anatomies, rng):
            drawn.append((tuple(anatomies), float(rng.uniform())))
            yield from (site(1, sequence) for sequence in ("T1w", "T2w"))

        drawn = []
        monkeypatch.setattr(scans, "random_site", random)
        for given in producers:
            with contextlib.suppress(InterruptedError):
                scans.produce(
                    Pool(folder), [*"abcdefg"], 5, **given,
                    measured=lambda number, _: found.update({number: drawn[-1]}),
                )  # fmt: skip
        assert len(drawn) == len(found)  # none twice
        return found

    monkeypatch.setattr(Pool, "add", lambda pool, n, x: pool.path(x.sequence, n).touch())
    monkeypatch.setattr(scans.time, "sleep", idle)
    whole = made(tmp_path / "whole", {"sites": 15})
    assert made(tmp_path / "parts", {"sites": 4}, {"sites": 15}) == whole and len(whole) == 15
    both = [{"worker": n, "workers": 2, "at_least": 15} for n in (1, 0)]
    monkeypatch.setattr(scans, "AHEAD", 0)
    assert made(tmp_path / "both", *both) == whole
    assert len({value for _, value in whole.values()}) == 15
    assert len({names for names, _ in whole.values()}) == 2  # read once for twelve sites
    assert all(names[-1] == "g" for names, _ in whole.values())


def test_producers_stop_when_nobody_wants_more(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "load_anatomy", lambda name: name)
    monkeypatch.setattr(scans, "AHEAD", 5)
    monkeypatch.setattr(
        scans, "random_site", lambda *_: [site(1, sequence) for sequence in ("T1w", "T2w")]
    )
    monkeypatch.setattr(Pool, "add", lambda pool, n, x: pool.path(x.sequence, n).touch())

    monkeypatch.setattr(scans.time, "sleep", idle)
    pool = Pool(tmp_path)
    for goal, at_least in ((5, 0), (7, 7), (15, 0)):
        for worker in range(2):
            with pytest.raises(InterruptedError):
                scans.produce(pool, "ab", 5, worker, 2, at_least=at_least)
        assert len(pool.files()) == 2 * goal
        if goal == 7:
            pool.take("one", 3)


def wait_to_be_ended(told):
    end_with_parent()
    told.send(os.getpid())
    time.sleep(600)


def start_and_wait():
    """What `make box` is to a producer."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=wait_to_be_ended, args=(there,), daemon=True).start()
    print(here.recv(), flush=True)
    time.sleep(600)


def test_a_producer_ends_with_who_started_it_even_killed():
    code = "import test_box; test_box.start_and_wait()"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert not psutil.wait_procs([child], timeout=30)[1]


def test_who_waits_in_vain_is_told_for_what(tmp_path):
    with pytest.raises(SgcdError, match=r"no T1w-0000003\.npz"):
        scans.wait_for(lambda: False, "T1w-0000003.npz", seconds=0.1)
    made = iter(range(8))  # as long as something comes, there is time
    scans.wait_for(lambda: next(made) == 7, "7 files", seconds=0.5, count=lambda: next(made))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--anatomy", "/nowhere"], SgcdError, "STORE-EMPTY"),
        (["--anatomy", ""], SystemExit, "--anatomy"),
        (["--anatomy", ".", "--start", "/nowhere.safetensors"], SystemExit, "/nowhere.safetensors"),
    ],
)
def test_a_wrong_word_makes_nothing(words, code, says, tmp_path, capsys):
    with pytest.raises(code) as error:
        make.main([str(tmp_path / "work"), *words])
    assert says in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "work").exists()


def test_a_wrong_setting_is_said_in_a_line(tmp_path):
    words = [str(tmp_path / "work"), "--anatomy", str(tmp_path), "--set", "nosuch=1"]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.box", *words], capture_output=True, text=True
    )
    assert done.returncode == 78 and done.stderr.startswith("make box: [CONFIG-KEY]"), done.stderr
    assert "Traceback" not in done.stderr


def test_the_box_is_trained_on_from_where_it_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "HANDFUL", 6)
    pool = filled(tmp_path / "pool")
    config = load_config("tiny", settings=NARROW)
    folder = tmp_path / "tiny"
    model = small_model()
    lines = []
    for steps in (2, 4):
        weights = train_network(
            pool,
            config,
            model,
            folder,
            minutes=5,
            total_steps=steps,
            beside=False,
            held=filled(tmp_path / "held", 1),
            filter_samples=6,
            report=lines.append,
        )
    fits = [next(iter(line)) for line in lines if "step" not in line]
    assert fits == ["filter", "filter-held"]  # once: the second run goes on
    lines = [line for line in lines if "step" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["held_out"] > 0 for line in lines)
    assert lines[0]["held_out"] != lines[1]["held_out"]
    assert learning_curve(folder / "losses.jsonl", "tiny").startswith(b"\x89PNG")
    box = Box.from_bytes(weights.read_bytes())
    assert box.meta["steps"] == 4 and box.meta["volumes"] == 8
    assert box.meta["filter_volumes"] == 6
    build_network(config).load_state_dict(box.network)

    # from there, filter and all: the scans it was fitted to are not forgotten
    after = train_network(
        pool, config, model, tmp_path / "after", minutes=5, total_steps=0, beside=False,
        start_from=weights, filter_samples=0,
    )  # fmt: skip
    assert Box.from_bytes(after.read_bytes()).meta["filter_volumes"] == 6


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "HANDFUL", 6)
    quick = functools.partial(fit_look_filter, steps=5)
    monkeypatch.setattr("pipelines.box.network.fit_look_filter", quick)
    pool, model, folder = filled(tmp_path / "pool"), small_model(), tmp_path / "tiny"

    def run(*settings, model=model, samples=6):
        config = load_config("tiny", settings=[*NARROW, *settings])
        return train_network(
            pool, config, model, folder, minutes=5, total_steps=0, beside=False,
            filter_samples=samples,
        )  # fmt: skip

    def refused(file, what, *settings, model=model):
        with pytest.raises(UsageError, match=f"{file} was not made with the same {what}") as error:
            run(*settings, model=model)
        assert error.value.where == str(folder)

    weights = run()
    before = weights.read_bytes()
    other = Composition([CompositionModel(2, hidden=5)])
    for file in ("checkpoint.pt", "filter.pt"):
        refused(file, "settings[.]", "condition.sharpen_mm=0.9")
        refused(file, "composition model[.]", model=other)
        (pool.folder / "anatomies.json").write_text('["another"]')
        refused(file, "anatomies[.]")
        (pool.folder / "anatomies.json").unlink()
        assert weights.read_bytes() == before
        run()
        (folder / "checkpoint.pt").unlink()
    state = torch.load(folder / "filter.pt", weights_only=True)
    run(samples=9)  # the same goes on, with more samples too
    more = torch.load(folder / "filter.pt", weights_only=True)["rows"]
    assert len(more[0]) == 9 and torch.equal(more[2][:6], state["rows"][2])
    torch.save(more, folder / "filter.pt")  # as they were kept before they said what made them
    (folder / "checkpoint.pt").unlink()
    refused("filter.pt", "settings and composition model and anatomies")


def test_a_pool_is_of_the_same_heads_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(scans, "load_anatomy", lambda name: name)
    both = [site(1, sequence) for sequence in ("T1w", "T2w")]
    monkeypatch.setattr(scans, "random_site", lambda *_: both)
    monkeypatch.setattr(Pool, "add", lambda pool, n, x: pool.path(x.sequence, n).touch())
    pool = Pool(tmp_path / "pool")
    scans.produce(pool, ["a", "b", "template"], 5, sites=1)
    scans.produce(pool, ["a", "b", "template"], 5, sites=2)
    with pytest.raises(UsageError, match="not made of the same anatomies"):
        scans.produce(pool, ["a", "b", "c", "template"], 5, sites=3)
    assert pool.anatomies() == ["a", "b", "template"] and len(pool.files()) == 4
    (pool.folder / "anatomies.json").unlink()  # as pools were before they said
    with pytest.raises(UsageError):
        scans.produce(pool, ["a", "b", "template"], 5, sites=3)

    assert make._held_out(tmp_path, []) is None
    held = make._held_out(tmp_path, ["c", "d"])
    assert make._described(held) == ["6 sites of 2 other heads"] and make._described(None) == []
    for trained_on_now in (["d"], []):
        with pytest.raises(UsageError):
            make._held_out(tmp_path, trained_on_now)


def test_the_curve_says_what_is_held_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("pipelines.box.curve.as_png", drawn.append)
    losses = tmp_path / "losses.jsonl"
    losses.write_text('{"step": 1, "noise": 0.1, "held_out": 0.2}\n')
    learning_curve(losses, "tiny", "6 sites of 2 other heads")
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["trained on", "6 sites of 2 other heads"]


@pytest.mark.parametrize("end", [functools.partial(sys.exit, 3), os.abort])
def test_who_waits_for_producers_that_ended_is_told(end, tmp_path):
    pool = Pool(tmp_path)
    producer = multiprocessing.get_context("spawn").Process(target=end, daemon=True)
    producer.start()
    make._watch(pool, 2, producer)
    code = producer.exitcode
    config, model, began = load_config("tiny"), small_model(), time.monotonic()
    with pytest.raises(SgcdError, match=f"and producer 2 ended with exit code {code}[.]"):
        Samples(pool, config, model, 3, "somebody").numbered(0)
    assert time.monotonic() - began < 60
    scans.wait_for(lambda: True, "what is there", ended=pool.ended)


def test_producers_that_are_told_to_end_alarm_nobody(tmp_path):
    pool = Pool(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    make._watch(pool, 0, process)
    assert not pool.ended.exists()


def test_a_composition_model_that_was_fitted_serves_the_same_command_again(tmp_path, monkeypatch):
    quick = functools.partial(fit_composition, members=1, steps=1, hidden=4)
    monkeypatch.setattr(make, "fit_composition", quick)
    pool, folder, rng = Pool(tmp_path / "pool"), tmp_path / "profiles", np.random.default_rng(0)
    folder.mkdir()

    def measured(numbers):
        for number in numbers:
            rows = rng.uniform(size=(2, 5, _ROW)).astype(np.float32)
            rows[..., 0] = [[0], [1]]
            (folder / f"{number:07d}.f32").write_bytes(rows.tobytes())
            for name in ("T1w", "T2w"):
                pool.path(name, number).touch()

    def fitted(sites):
        return make._composition(tmp_path, pool, sites, True).members[0].linear

    measured(range(8))
    first = fitted(8)
    measured([8])  # by producers, while the network was trained
    assert torch.equal(fitted(8), first)
    assert not torch.equal(fitted(7), first)


def test_the_composition_model_is_fitted_to_what_was_measured(tmp_path):
    rows = [
        measure_site(site(number, sequence), load_config().condition, seed=number)
        for number in range(4)
        for sequence in ("T1w", "T2w")
    ]
    assert rows[0].shape == (5, _ROW)
    (tmp_path / "profiles-0.f32").write_bytes(np.stack(rows).tobytes() + b"half a row")
    sites = read_sites([tmp_path / "profiles-0.f32"], 5)
    assert sites.shape == (8, 5, _ROW)
    one, two = (fit_composition(sites, members=2, steps=5, hidden=4) for _ in range(2))
    for mine, same in zip(one.members, two.members, strict=True):
        assert torch.equal(mine.linear, same.linear) and mine.linear.abs().sum() > 0
    assert not torch.equal(one.members[0].linear, one.members[1].linear)
    assert score_composition(one, sites).keys() == {"T1w", "T2w"}
    assert one.anatomy.shape == (2, PROFILE_SIZE, SHADING_SIZE) and one.anatomy.any()


def test_anatomy_is_what_differs_between_the_scans_of_one_site():
    rng = np.random.default_rng(0)
    sites = np.zeros((120, 5, _ROW), np.float32)
    sites[1::2, :, 0] = 1  # every other one is T2w
    slopes = np.zeros((PROFILE_SIZE, SHADING_SIZE))
    slopes[:4] = rng.normal(0, 0.3, (4, SHADING_SIZE))
    profiles = np.zeros((120, 5, PROFILE_SIZE))
    profiles[..., :4] = rng.normal(0, 1, (120, 1, 4)) + rng.normal(0, 1, (120, 5, 4))
    # A coil that goes with the site's mean profile, the other way: it must not be learned.
    shadings = profiles @ slopes - 2 * profiles.mean(1, keepdims=True) @ slopes
    at = 1 + len(LEVELS)
    sites[..., at : at + PROFILE_SIZE] = profiles
    sites[..., at + PROFILE_SIZE : at + PROFILE_SIZE + SHADING_SIZE] = shadings
    means, found = fit_anatomy(sites)
    np.testing.assert_allclose(means[0, :4], profiles[::2, :, :4].mean((0, 1)), atol=1e-5)
    for index in range(2):
        np.testing.assert_allclose(found[index], slopes * (SIDES > 0), atol=2e-3)


def lost_similarity(error, before, image, mask):
    """The mean over windows three voxels apart, their middles in the brain, by its definition."""

    def windowed(volume):
        return ndimage.uniform_filter(volume, 5, mode="constant")

    squares = [windowed(x) ** 2 for x in (error, before, image)]
    spread = [windowed(x**2) - s for x, s in zip((error, before, image), squares, strict=True)]
    lost = squares[0] / (squares[1] + squares[2] + 1e-4)
    lost += spread[0] / (spread[1] + spread[2] + 9e-4)
    middle = np.zeros_like(mask)
    middle[::3, ::3, ::3] = mask[::3, ::3, ::3]
    return lost[middle].mean()


@pytest.mark.parametrize("shape", [(32, 32, 32), (33, 34, 35)])
def test_a_brain_that_fills_the_grid_loses_similarity_at_its_edges_too(shape):
    config = load_config("tiny")
    rng = np.random.default_rng(0)
    before, image = (rng.uniform(0.1, 0.9, shape).astype(np.float32) for _ in range(2))
    mask = np.ones(shape, bool)
    mask[0] = False
    before, image = before * mask, image * mask
    look = measure_look(image, mask, 4.0, "T1w").vector()
    batch = make_batch([image], [mask], ["T1w"], [0], config.sequences, [look], [look])
    content = to_network(torch.from_numpy(before))[None, None]
    condition = Condition(content, content, torch.zeros(1, LOOK_SIZE), torch.ones(1))
    found = normals_of(build_network(config).look_filter, batch, condition).unlike.squares
    before, image = before.astype(np.float64), image.astype(np.float64)
    lost = lost_similarity(before - image, before, image, mask)
    assert float(found) == pytest.approx(lost, rel=1e-3)


def test_the_normals_tell_the_losses_of_any_coefficients(tmp_path):
    config = load_config("tiny")
    (sample,) = take(Samples(filled(tmp_path), config, small_model(), 3), 1)
    batch, condition = collate([sample])
    network = build_network(config)
    torch.nn.init.normal_(network.look_filter.perceptron[-1].bias, std=0.003)
    normals = normals_of(network.look_filter, batch, condition)
    features = network.embedding.features(normals.labels)
    with torch.no_grad():
        changed = network.look_filter(condition.content, features)
        coefficients = network.look_filter.coefficients(features)
    difference = (to_network(batch["image"]) - changed)[batch["mask"]]
    found = normals.error.of(coefficients)
    assert float(found) == pytest.approx(float(difference.square().mean()), rel=1e-3)

    mask = batch["mask"][0, 0].numpy()
    before, after, image = (
        np.where(mask, np.asarray(from_network(x)[0, 0], np.float64), 0)
        for x in (condition.content, changed, to_network(batch["image"]))
    )
    error = after - image
    found = normals.unlike.of(coefficients)
    assert float(found) == pytest.approx(lost_similarity(error, before, image, mask), rel=1e-3)
    for loss in (normals.error, normals.unlike):
        assert float(loss.of(loss.best())) < min(float(loss.squares), float(loss.of(coefficients)))


def test_what_is_lost_is_what_structural_similarity_loses():
    config = load_config("tiny")
    rng = np.random.default_rng(0)
    image, mask = (np.zeros((32, 32, 32), t) for t in (np.float32, bool))
    mask[6:26, 6:26, 6:26] = True
    image[mask] = ndimage.gaussian_filter(rng.uniform(size=mask.shape), 1)[mask] + 0.1
    near = np.where(mask, image + 0.01 * ndimage.gaussian_filter(rng.normal(size=mask.shape), 1), 0)
    look = measure_look(image, mask, 4.0, "T1w").vector()
    batch = make_batch([image], [mask], ["T1w"], [0], config.sequences, [look], [look])
    content = to_network(torch.from_numpy(near.astype(np.float32)))[None, None]
    condition = Condition(content, content, torch.zeros(1, LOOK_SIZE), torch.ones(1))
    found = normals_of(build_network(config).look_filter, batch, condition).unlike.squares
    similar = structural_similarity(
        image.astype(np.float64), near, win_size=5, data_range=1.0, use_sample_covariance=False,
        full=True,
    )[1]  # fmt: skip
    middle = np.zeros_like(mask)
    middle[::3, ::3, ::3] = mask[::3, ::3, ::3]
    assert float(found) == pytest.approx(1 - similar[middle].mean(), rel=0.01)


def test_the_look_filter_is_fitted_to_the_samples_and_goes_on_where_it_stopped(tmp_path):
    config, pool, model = load_config("tiny"), filled(tmp_path / "pool"), small_model()
    few = filter_normals(pool, config, model, tmp_path / "n.pt", 8)
    more = filter_normals(pool, config, model, tmp_path / "n.pt", 12)
    assert len(more) == 12 and torch.equal(more.unlike.targets[:8], few.unlike.targets)
    network = build_network(config)
    fit_look_filter(network.look_filter, network.embedding, more, steps=300)
    scores = score_look_filter(network.look_filter, network.embedding, more)
    assert set(scores) == {"0", "1"}
    for score in scores.values():
        none, found, best = score["unlike"]
        assert none > found > best
        assert score["psnr"][0] < score["psnr"][1]


def test_weights_without_a_look_filter_start_with_a_fresh_output(tmp_path):
    config = load_config("tiny")
    before = build_network(load_config("tiny", settings=["network.look_filter_radius=0"]))
    torch.nn.init.ones_(before.network.out[2].conv.bias)
    network = build_network(config)
    start_weights(network, Box(before.state_dict()))
    assert network.network.out[2].conv.bias.abs().max() == 0
    theirs = before.network.conv_in.conv.weight
    assert torch.equal(network.network.conv_in.conv.weight, theirs)
    torch.nn.init.ones_(network.network.out[2].conv.bias)
    again = build_network(config)
    start_weights(again, Box(network.state_dict()))
    assert again.network.out[2].conv.bias.min() == 1
    other = build_network(load_config("tiny", settings=["network.curve_knots=0"]))
    with pytest.raises((ValueError, RuntimeError)):
        start_weights(network, Box(other.state_dict()))


def test_the_subjects_of_some_sites_are_of_one_anatomy(monkeypatch):
    seen = []
    monkeypatch.setattr(scans, "random_subject", lambda anatomy, rng: seen.append(anatomy))
    volume = (np.zeros((1, 1, 1)),) * 3
    monkeypatch.setattr(scans, "_on_grids", lambda *given: dict.fromkeys(GRIDS, volume))
    alike = 0
    for number in range(100):
        seen.clear()
        next(random_site(list("abcd"), np.random.default_rng(number)))
        assert len(seen) == scans.SUBJECTS
        alike += len(set(seen)) == 1
    assert 25 < alike < 60
