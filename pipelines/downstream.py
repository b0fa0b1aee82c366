"""Task 3: can the site still be told from a scan, and does its age stay readable?

Site classification by logistic regression and brain age by ridge regression, from the features of
an image network (`features.py`), before and after harmonization; 70/30 by subject, five repeats.
Lower site figures mean that less of the scanner is left, which is good only where age stays
readable: an empty image hides its site perfectly.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.catalog import Catalog
from pipelines.evaluate import MethodImages, usable_results
from pipelines.features import features_of, load_features
from pipelines.lake import Lake
from pipelines.prepare import load_prepared
from pipelines.record_figures import record_figures
from pipelines.verdict import person
from sgcd_core.config import SgcdConfig
from sgcd_core.errors import ConfigError, SgcdError

log = logging.getLogger(__name__)

Row = dict[str, Any]
Array = NDArray[np.float64]
Words = NDArray[np.str_]
Numbers = dict[str, float]

#: A method on features, not on images: fit to the training scans of each partition.
COMBAT = "combat"
#: Random partitions into training and test subjects.
REPEATS = 5
TRAIN_SHARE = 0.7
#: Runs with shuffled labels in each partition.
SHUFFLES = 4
SITE_MEASURES = ("site_balanced_accuracy", "site_f1", "site_precision", "site_recall")
AGE_MEASURES = ("age_mae", "age_mse")
UNITS = dict.fromkeys(SITE_MEASURES, "1") | {"age_mae": "years", "age_mse": "years²"}
#: Code of a scan whose features by a method are not numbers.
NONFINITE = "SCAN-NONFINITE"
#: Fewer subjects with a known age give no figure.
MIN_AGES = 6


@dataclass(frozen=True)
class Repeated:
    """A measure over the repeats: mean and standard deviation."""

    mean: float
    std: float


@dataclass(frozen=True)
class DownstreamLine:
    """One measure of one sequence.

    Attributes:
        sequence: BIDS suffix.
        measure: One of `SITE_MEASURES` or `AGE_MEASURES`.
        by_method: Method → figure; `raw` is before harmonization, `sgcd` after it.
        chance: 1/classes for balanced accuracy and recall, the error of always saying the mean
            age of the training subjects for ages; None where there is no such figure.
        shuffled: The figure from raw features when labels are shuffled.
        subjects: Behind the figure.
        scans: Behind the figure.
        classes: Sites that are told apart; 0 for ages.
    """

    sequence: str
    measure: str
    by_method: dict[str, Repeated]
    chance: float | None
    shuffled: Repeated
    subjects: int
    scans: int
    classes: int


@dataclass(frozen=True)
class DownstreamSummary:
    """What Task 3 found.

    Attributes:
        features: Name of the image network.
        lines: By sequence and measure.
        notes: Sentences about sites and tasks that were left out.
        site_rows: Rows of `site_metrics`; they have no site, since they are about all of them.
        skipped: scan_id → code of scans that could not be read, or lack the features of a method.
        written: False when the same evaluation was in the tables already.
    """

    features: str
    lines: list[DownstreamLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    site_rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    written: bool = False


@dataclass
class Sample:
    """The scans of one sequence: who, where, how old, and features by method.

    Attributes:
        subjects: Data set and label of each scan's subject.
        sites: Site of each scan.
        ages: Years; NaN where not known.
        features: Method → one vector for each scan.
    """

    subjects: list[str] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    features: dict[str, list[Array]] = field(default_factory=dict)


def evaluate_downstream(
    lake: Lake,
    model: str,
    version: int,
    config: SgcdConfig,
    *,
    features: str = "auto",
    methods: Sequence[str] = ("raw", "nyul"),
    progress: Callable[[int, int], None] | None = None,
) -> DownstreamSummary:
    """Classify sites and predict ages of every harmonized scan, before and after; write the tables.

    Args:
        lake: Where results, prepared scans and tables lie.
        model: Name in the registry.
        version: Version in the registry.
        config: Settings of the run; `config.prepare` names the prepared scans.
        features: See `features.load_features`.
        methods: Baselines beside the model, and `combat`; `raw` is always included.
        progress: Called with (scans done, scans in all).

    Raises:
        ConfigError: There is no network of this name, or ComBat is asked for and not installed.
        ModelError: ENCODER-WEIGHTS, or MODEL-MISSING when this version harmonized nothing.
        StorageError: A table or the store cannot be reached.
    """
    network = load_features(features)
    combat = COMBAT in methods
    if combat:
        combat_class()  # missing, it is said before the work and not after
    methods = [m for m in methods if m != COMBAT]
    catalog = Catalog(lake)
    scans = catalog.rows("scans").to_pylist()
    results = usable_results(catalog, model, version)
    target = next((r["target"] for r in results if r["target"]), None)
    recipe = config.prepare.digest()
    images = MethodImages(lake, recipe, scans, target, methods)
    by_id = {s["scan_id"]: s for s in scans}
    samples: dict[str, Sample] = {}
    skipped: dict[str, str] = {}
    for number, result in enumerate(results, 1):
        scan = by_id.get(result["scan_id"])
        if scan is not None and scan["site"] is not None:
            try:
                prepared = load_prepared(lake, recipe, scan["scan_id"])
                found = images.of(scan, result, prepared)
            except SgcdError as error:
                # One scan that cannot be read must not end the evaluation of the others.
                log.warning("downstream=skipped scan=%s code=%s", scan["scan_id"], error.code)
                skipped[scan["scan_id"]] = error.code
                continue
            sample = samples.setdefault(scan["sequence"], Sample())
            sample.subjects.append(person(scan))
            sample.sites.append(scan["site"])
            sample.ages.append(float("nan") if scan["age"] is None else float(scan["age"]))
            for method, image in found.items():
                vector = features_of(network, image, prepared.mask)
                if not np.isfinite(vector).all():
                    log.warning(
                        "downstream=left-out scan=%s method=%s code=%s", scan["scan_id"], method,
                        NONFINITE,
                    )  # fmt: skip
                    skipped[scan["scan_id"]] = NONFINITE
                sample.features.setdefault(method, []).append(vector)
        if progress is not None:
            progress(number, len(results))
    lines: list[DownstreamLine] = []
    notes: list[str] = []
    for sequence, sample in sorted(samples.items()):
        more, said = score_sample(sequence, sample, seed=config.seed, combat=combat)
        lines += more
        notes += said
    base = {"model": model, "model_version": version, "target": target}
    rows = [base | row for row in _site_rows(lines, network.name)]
    mine = {f"{measure}.{network.name}" for measure in UNITS}.__contains__
    lost = images.lost(skipped)
    written = record_figures(catalog, "site_metrics", base, rows, mine, lost)
    return DownstreamSummary(network.name, lines, notes, rows, skipped, written)


def score_sample(
    sequence: str, sample: Sample, *, seed: int = 0, combat: bool = False
) -> tuple[list[DownstreamLine], list[str]]:
    """Both tasks on the scans of one sequence; figures, and sentences about what was left out.

    With `combat` also from the raw features after ComBat. A scan whose features by a method are not
    finite is left out for that method; for all, if they are the raw ones.
    """
    lines: list[DownstreamLine] = []
    subjects, sites = np.array(sample.subjects), np.array(sample.sites)
    ages = np.array(sample.ages)
    # A baseline that could not be fitted has no features.
    vectors = {m: np.stack(v) for m, v in sample.features.items() if len(v) == len(sites)}
    notes = []
    for method, x in vectors.items():
        lost = len(x) - int(_finite(x).sum())
        if lost:
            notes.append(
                f"{sequence}: {lost} of {len(x)} scans left out for {method}, their features are "
                f"not finite ({NONFINITE})."
            )
    there = _finite(vectors["raw"])
    subjects, sites, ages = subjects[there], sites[there], ages[there]
    vectors = {method: x[there] for method, x in vectors.items()}
    if combat:
        vectors[COMBAT] = vectors["raw"]
    kept, small = enough_subjects(subjects, sites)
    if small:
        notes.append(
            f"{sequence}: left out of site classification, fewer than two subjects: "
            f"{', '.join(small)}."
        )
    classes = sorted(set(sites[kept]))
    if len(classes) < 2:
        notes.append(f"{sequence}: no site classification, it needs two sites of two subjects.")
    else:
        used = {m: x[kept] for m, x in vectors.items()}
        lines += _lines(
            sequence, used, subjects[kept], sites[kept], sites[kept], len(classes), seed
        )
    known = np.isfinite(ages)
    if len(set(subjects[known])) < MIN_AGES:
        notes.append(f"{sequence}: no brain age, fewer than {MIN_AGES} subjects have one.")
    else:
        used = {m: x[known] for m, x in vectors.items()}
        lines += _lines(sequence, used, subjects[known], sites[known], ages[known], 0, seed)
    return lines, notes


def enough_subjects(subjects: Words, sites: Words) -> tuple[NDArray[np.bool_], list[str]]:
    """Which scans are at a site with two subjects or more, (N,), and the sites that are not."""
    people = Counter(site for site, _ in set(zip(sites, subjects, strict=True)))
    small = sorted(str(site) for site, count in people.items() if count < 2)
    return ~np.isin(sites, small), small


def _finite(x: Array) -> NDArray[np.bool_]:
    """Which rows of (N, E) hold numbers only, (N,)."""
    return np.asarray(np.isfinite(x).all(1))


def splits(
    subjects: Words, sites: Words, *, seed: int = 0
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Training and test scans of each repeat, bool (N,); all scans of a subject on one side.

    70 % of the subjects of each site train, at least one trains and one tests; subjects seen at
    several sites are a stratum of their own, and so are those alone in theirs, together.
    """
    places: dict[str, set[str]] = {}
    for subject, site in zip(subjects, sites, strict=True):
        places.setdefault(subject, set()).add(site)
    strata: dict[tuple[str, ...], list[str]] = {}
    for subject in sorted(places):
        strata.setdefault(tuple(sorted(places[subject])), []).append(subject)
    alone = [people[0] for people in strata.values() if len(people) == 1]
    groups = [people for people in strata.values() if len(people) > 1] + ([alone] if alone else [])
    for repeat in range(REPEATS):
        rng = np.random.default_rng([seed, repeat])
        training: set[str] = set()
        for people in groups:
            count = max(1, min(len(people) - 1, round(TRAIN_SHARE * len(people))))
            training.update(str(s) for s in rng.permutation(people)[:count])
        train = np.isin(subjects, sorted(training))
        yield train, ~train


def _lines(
    sequence: str,
    vectors: dict[str, Array],
    subjects: Words,
    sites: Words,
    wanted: NDArray[Any],
    classes: int,
    seed: int,
) -> list[DownstreamLine]:
    """One task by every method over the same partitions."""
    score = score_sites if classes else score_ages
    found: dict[str, list[Numbers]] = {method: [] for method in vectors}
    shuffled: list[Numbers] = []
    mean_age: list[Numbers] = []
    for repeat, (train, test) in enumerate(splits(subjects, sites, seed=seed)):
        if not test.any():
            continue
        for method, x in vectors.items():
            mine, yours = train & _finite(x), test & _finite(x)
            if not (mine.any() and yours.any()):
                continue
            given, asked = x[mine], x[yours]
            if method == COMBAT:
                given, asked = combat_features(given, sites[mine], asked, sites[yours])
            found[method].append(score(given, wanted[mine], asked, wanted[yours]))
        rng = np.random.default_rng([seed, repeat, 1])
        for _ in range(SHUFFLES):
            mixed, x = rng.permutation(wanted), vectors["raw"]
            shuffled.append(score(x[train], mixed[train], x[test], mixed[test]))
        if not classes:
            off = wanted[test] - wanted[train].mean()
            mean_age.append(
                {"age_mae": float(np.abs(off).mean()), "age_mse": float(off @ off / len(off))}
            )
    lines = []
    for measure in SITE_MEASURES if classes else AGE_MEASURES:
        if not classes:
            chance: float | None = float(np.mean([m[measure] for m in mean_age]))
        else:
            # Precision and F1 of guessing depend on how the sites' sizes differ.
            guessable = measure in ("site_balanced_accuracy", "site_recall")
            chance = 1 / classes if guessable else None
        lines.append(
            DownstreamLine(
                sequence, measure,
                {m: _repeated([n[measure] for n in rows]) for m, rows in found.items() if rows},
                chance, _repeated([n[measure] for n in shuffled]), len(set(subjects)),
                len(subjects), classes,
            )
        )  # fmt: skip
    return lines


def combat_features(
    x: Array, sites: Words, x_test: Array, sites_test: Words
) -> tuple[Array, Array]:
    """Training and test features after ComBat that saw the training features alone.

    Features of sites with fewer than two training scans stay as they are: nothing is known of
    their spread. No covariate is kept, since the age of a test subject is what is asked for.
    Source: Johnson 2007, Biostatistics 8:118; Fortin 2018, NeuroImage 167:104; the package
    combatlearn.

    Args:
        x: (N, E), training.
        sites: (N,).
        x_test: (M, E).
        sites_test: (M,).
    """
    import pandas as pd

    counts = Counter(sites.tolist())
    known = [site for site, count in counts.items() if count >= 2]
    if len(known) < 2:
        return x, x_test
    frames, places = [], []
    for values, of, mark in ((x, sites, "train"), (x_test, sites_test, "test")):
        index = [f"{mark}-{n}" for n in range(len(of))]
        frames.append(pd.DataFrame(values, index=index))
        places.append(pd.Series(of, index=index))
    combat = combat_class()(batch=pd.concat(places), method="johnson")
    out: list[Array] = []
    for frame, place in zip(frames, places, strict=True):
        mine = place.isin(known)
        rows = frame[mine]
        changed = frame.to_numpy(copy=True)
        if len(rows):
            done = combat.fit_transform(rows) if not out else combat.transform(rows)
            changed[mine.to_numpy()] = np.asarray(done)
        out.append(changed)
    return out[0], out[1]


def combat_class() -> Any:
    """The library's class.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from combatlearn import ComBat
    except ImportError as error:
        raise ConfigError(
            "ComBat needs the package combatlearn.", where="--methods combat",
            hint="Install it with `pip install 'sgcd-lake[combat]'`, or leave combat out.",
        ) from error  # fmt: skip
    return ComBat


def _repeated(values: Sequence[float]) -> Repeated:
    return Repeated(float(np.mean(values)), float(np.std(values)))


def score_sites(x: Array, y: Words, x_test: Array, y_test: Words) -> Numbers:
    """Logistic regression on standardized features; macro means over the sites.

    Args:
        x: (N, E), training.
        y: (N,), their sites.
        x_test: (M, E).
        y_test: (M,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_fscore_support, recall_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(set(y)) < 2:  # shuffled labels can leave one
        guess = np.full(len(y_test), y[0])
    else:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=500, class_weight="balanced")
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            guess = model.fit(x, y).predict(x_test)
    # Over the sites that the test scans have or are taken for: one without any is no mistake.
    precision, _, f1, _ = precision_recall_fscore_support(
        y_test, guess, labels=sorted({*y_test, *guess}), average="macro", zero_division=0
    )
    recall = recall_score(
        y_test, guess, labels=sorted(set(y_test)), average="macro", zero_division=0
    )  # which is the balanced accuracy
    return {
        "site_balanced_accuracy": float(recall), "site_f1": float(f1),
        "site_precision": float(precision), "site_recall": float(recall),
    }  # fmt: skip


def score_ages(x: Array, y: Array, x_test: Array, y_test: Array) -> Numbers:
    """Ridge regression on standardized features, its weight chosen on the training scans.

    Args:
        x: (N, E), training.
        y: (N,), years.
        x_test: (M, E).
        y_test: (M,).
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
    off = model.fit(x, y).predict(x_test) - y_test
    return {"age_mae": float(np.abs(off).mean()), "age_mse": float(off @ off / len(off))}


def _site_rows(lines: Sequence[DownstreamLine], features: str) -> list[Row]:
    """`site_metrics` without the model's columns; metrics as `site_f1.mri-dino`."""
    out = []
    for line in lines:
        before = line.by_method["raw"].mean
        shown = {m: (f.mean, f.std) for m, f in line.by_method.items()}
        shown["shuffled"] = (line.shuffled.mean, line.shuffled.std)
        if line.chance is not None:
            shown["chance"] = (line.chance, 0.0)
        for method, (mean, std) in shown.items():
            out.append(
                {
                    "site": None, "sequence": line.sequence, "method": method,
                    "metric": f"{line.measure}.{features}", "before": before, "after": mean,
                    "low": mean - std, "high": mean + std, "n": line.subjects, "seen": None,
                }
            )  # fmt: skip
    return out
