"""Numbers into tables and plain sentences: where a harmonized scan is closer to the truth.

And where it is not: every site, sequence and measure is listed, and a tie is not a win.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sgcd_core.metrics import MEASURES, bootstrap_interval
from sgcd_core.words import counted

METHOD_TITLES = {
    "raw": "raw", "nyul": "Nyúl", "minmax": "min-max", "zscore": "z-score",
    "whitestripe": "WhiteStripe", "histogram": "histogram matching",
    "combat": "ComBat", "sgcd": "SGCD",
}  # fmt: skip
#: Name of the site-level distance in `site_metrics`: mean histogram of a site to the target's.
SITE_DISTANCE = "site_wasserstein"
NO_TRUTH = (
    "No scan has a truth to compare with: no test subject was also scanned at the target site. "
    "Only the distributions of the sites are compared."
)
#: Methods that learn nothing but an intensity map.
CLASSICAL = ("nyul", "minmax", "zscore", "whitestripe", "histogram")


@dataclass(frozen=True)
class Estimate:
    """A mean over subjects with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One measure of one site or group, by method.

    Attributes:
        site: Site; empty for a group of sites.
        sequence: BIDS suffix.
        seen: Whether the sites are among the model's training sites; None when not known.
        metric: Key of `MEASURES`.
        n: Subjects.
        scans: Scans.
        by_method: Method → estimate.
    """

    site: str
    sequence: str
    seen: bool | None
    metric: str
    n: int
    scans: int
    by_method: dict[str, Estimate]

    def closer(self, method: str, other: str) -> bool | None:
        """Whether `method` is strictly better than `other`; None when one of them is missing."""
        if method not in self.by_method or other not in self.by_method:
            return None
        a, b = self.by_method[method].mean, self.by_method[other].mean
        return a > b if MEASURES[self.metric].higher_is_better else a < b

    def best(self, methods: Iterable[str]) -> str | None:
        """The best of those that are there, the first of equals; None when none is."""
        there = [m for m in methods if m in self.by_method]
        return max(there, key=self._gain, default=None)

    def _gain(self, method: str) -> float:
        mean = self.by_method[method].mean
        better = mean if MEASURES[self.metric].higher_is_better else -mean
        return -math.inf if math.isnan(better) else better


@dataclass(frozen=True)
class Summary:
    """What the metrics of one version of one model say.

    Attributes:
        lines: By site, sequence and measure.
        groups: By sequence, seen or unseen, and measure.
        verdict: The same in sentences.
    """

    lines: list[Line] = field(default_factory=list)
    groups: list[Line] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """One sentence that counts the comparisons of `groups`; empty when there are none."""
        parts = []
        for name, methods in _rivals(self.groups):
            found = [line.closer("sgcd", line.best(methods) or "") for line in self.groups]
            known = [closer for closer in found if closer is not None]
            if known:
                parts.append(f"than {name} in {sum(known)} of {len(known)}")
        if not parts:
            return ""
        return f"Closer to the truth {_and(parts)} comparisons."


def summarize(
    rows: Iterable[Mapping[str, Any]], sites: Iterable[Mapping[str, Any]] = (), *, seed: int = 0
) -> Summary:
    """Tables and sentences of one model version.

    Args:
        rows: Of the table `metrics`.
        sites: Of the table `site_metrics`; what is said where no scan has a truth.
        seed: Of the bootstrap.
    """
    kept = [row for row in rows if row["metric"] in MEASURES]
    lines, groups = _lines(kept, True, seed), _lines(kept, False, seed)
    distances = [row for row in sites if row["metric"] == SITE_DISTANCE]
    return Summary(lines, groups, verdict(groups, lines) or [NO_TRUTH, *alike(distances)])


def _lines(rows: Sequence[Mapping[str, Any]], per_site: bool, seed: int) -> list[Line]:
    """Rows put together by site (or by seen), sequence and measure; sorted, measures in order."""
    order = list(MEASURES)
    buckets: dict[tuple[Any, ...], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        site = row["site"] or "" if per_site else ""
        key = (row["sequence"] or "", row["seen"], site, order.index(row["metric"]))
        buckets.setdefault(key, {}).setdefault(row["method"], []).append(row)
    lines = []
    # Seen before unseen, unknown last.
    rank = {True: 0, False: 1, None: 2}
    for key in sorted(buckets, key=lambda k: (k[0], rank[k[1]], k[2], k[3])):
        sequence, seen, site, metric = key
        methods = buckets[key]
        longest = max(methods.values(), key=len)
        lines.append(
            Line(
                site, sequence, seen, order[metric],
                n=len({person(r) for r in longest}), scans=len(longest),
                by_method={m: estimate(found, seed) for m, found in sorted(methods.items())},
            )
        )  # fmt: skip
    return lines


def person(row: Mapping[str, Any]) -> str:
    """Who a scan is of: a subject of one data set; a scan without a subject is one of its own."""
    return f"{row.get('dataset') or ''}/{row['subject'] or row['scan_id']}"


def estimate(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> Estimate:
    """Mean over subjects (each with the mean of its scans) and its interval."""
    values = [float("nan") if r["value"] is None else float(r["value"]) for r in rows]
    subjects = [person(r) for r in rows]
    finite: dict[Any, list[float]] = {}
    for value, subject in zip(values, subjects, strict=True):
        if math.isfinite(value):
            finite.setdefault(subject, []).append(value)
    if not finite:
        # Identical images have an infinite PSNR: that is a value, not a gap.
        mean = math.inf if any(v == math.inf for v in values) else math.nan
        return Estimate(mean, mean, mean)
    low, high = bootstrap_interval(values, subjects, seed=seed)
    return Estimate(float(np.mean([np.mean(v) for v in finite.values()])), low, high)


def verdict(groups: Sequence[Line], sites: Sequence[Line] = ()) -> list[str]:
    """A sentence for each sequence, seen or unseen, and rival, with the numbers.

    And one for the sites that the mean hides: where the raw scans are closer.
    """
    sentences = []
    for sequence, seen in dict.fromkeys((g.sequence, g.seen) for g in groups):
        lines = [g for g in groups if (g.sequence, g.seen) == (sequence, seen)]
        names = {True: "sites seen in training", False: "sites never seen in training"}
        head = f"{sequence}, {names.get(seen, 'all sites') if seen is not None else 'all sites'}"
        people = max(line.n for line in lines)
        head += f" ({counted(people, 'subject')})"
        for name, methods in _rivals(lines):
            sentence = _compare(lines, name, methods)
            if sentence:
                sentences.append(f"{head}: {sentence}")
        worse = _worse([line for line in sites if (line.sequence, line.seen) == (sequence, seen)])
        if worse:
            sentences.append(f"{head}: taken alone SGCD is NOT closer than the raw scans {worse}.")
    return sentences


def alike(distances: Iterable[Mapping[str, Any]]) -> list[str]:
    """What became of the distances of the sites' mean histograms, a sentence or two a sequence."""
    found: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    goal = "that of all sites"
    for row in distances:
        if row["after"] is not None and math.isfinite(row["after"]):
            found.setdefault(row["sequence"], {}).setdefault(row["site"], {})[row["method"]] = row
            goal = f"{row['target']}'s" if row["target"] else goal
    sentences = []
    for sequence, sites in sorted(found.items()):
        ours = {site: by_method for site, by_method in sorted(sites.items()) if "sgcd" in by_method}
        nearer: list[str] = []
        other: list[str] = []
        for site, by_method in ours.items():
            before, after = by_method["sgcd"]["before"], by_method["sgcd"]["after"]
            values = f"{number(SITE_DISTANCE, before)} to {number(SITE_DISTANCE, after)}"
            (nearer if after < before else other).append(f"{site} ({values})")
        parts = []
        if nearer:
            parts.append(f"SGCD brings the mean histogram nearer to {goal} at {_and(nearer)}")
        if other:
            what = "it" if nearer else "the mean histogram"
            parts.append(f"SGCD does NOT bring {what} nearer to {goal} at {_and(other)}")
        if parts:
            sentences.append(f"{sequence}: {'; '.join(parts)} (Wasserstein distance).")
        sentences += _nearest(sequence, ours)
    return sentences


def _nearest(sequence: str, sites: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Where a classical method comes nearer to the target's histogram; nothing where none does."""
    behind = []
    for site, by_method in sites.items():
        rivals = [m for m in CLASSICAL if m in by_method]
        best = min(rivals, key=lambda m: by_method[m]["after"], default=None)
        if best is not None and by_method[best]["after"] < by_method["sgcd"]["after"]:
            value = number(SITE_DISTANCE, by_method[best]["after"])
            behind.append(f"{site} ({value} of {METHOD_TITLES[best]})")
    if not behind:
        return []
    return [
        f"{sequence}: a classical method comes nearer than SGCD at {_and(behind)}. Such methods "
        "give every brain the target's histogram, whatever is in it: a distance of histograms "
        "says nothing of the anatomy."
    ]


def _rivals(lines: Sequence[Line]) -> list[tuple[str, tuple[str, ...]]]:
    """Whom SGCD is compared with: a name for sentences, and the methods, of which the best counts.

    The raw scans, then the classical methods, together where there are several.
    """
    there = {method for line in lines for method in line.by_method}
    found = tuple(m for m in CLASSICAL if m in there)
    rivals: list[tuple[str, tuple[str, ...]]] = [("the raw scans", ("raw",))]
    if found:
        name = METHOD_TITLES[found[0]] if len(found) == 1 else "every classical method"
        rivals.append((name, found))
    return rivals


def _compare(lines: Sequence[Line], name: str, methods: Sequence[str]) -> str:
    """SGCD against the best of some methods on every measure."""
    wins: list[str] = []
    losses: list[str] = []
    for line in lines:
        rival = line.best(methods)
        if rival is None or "sgcd" not in line.by_method:
            continue
        ours, theirs = line.by_method["sgcd"].mean, line.by_method[rival].mean
        values = f"{number(line.metric, ours)} against {number(line.metric, theirs)}"
        values += f" of {METHOD_TITLES[rival]}" if len(methods) > 1 else ""
        text = f"{MEASURES[line.metric].title} ({values})"
        (wins if line.closer("sgcd", rival) else losses).append(text)
    parts = []
    if wins:
        parts.append(f"SGCD is closer than {name} on {_and(wins)}")
    if losses:
        best = name if len(methods) == 1 else "the best of the classical methods"
        parts.append(f"SGCD is NOT closer than {best} on {_and(losses)}")
    return "; ".join(parts) + "." if parts else ""


def _worse(lines: Sequence[Line]) -> str:
    """Sites, of several, where the raw scans are closer, with the measures."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.closer("sgcd", "raw") is False:
            found.setdefault(line.site, []).append(MEASURES[line.metric].title)
    if len({line.site for line in lines}) < 2:  # the mean is that site's
        return ""
    return "; ".join(f"at {site} on {_and(titles)}" for site, titles in found.items())


def number(metric: str, value: float) -> str:
    """A value with the digits that matter for its measure."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "no value"
    return f"{value:.2f}" if metric == "psnr" else f"{value:.4f}"


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
