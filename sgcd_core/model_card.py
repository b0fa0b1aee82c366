"""The model card: what a model is made of, what it is for and what it is not for.

Everything that can be read off the settings and the model's metadata is; the sentences here hold
for every model of this program. After Mitchell et al. 2019, Model cards for model reporting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any

from sgcd_core.config import SgcdConfig

if TYPE_CHECKING:
    from sgcd_core.modelpack import ModelPack

#: File beside the card with what `sgcd evaluate` measured; no part of the digested model.
FIGURES = "FIGURES.md"
PACKAGE = "sgcd-lake"
PAPER = (
    '"Harmonizing multi-site multi-sequence brain MRI via semantic-guided conditional diffusion" '
    "(anonymous, under review)"
)

#: Metadata that has a place of its own in the card.
_PLACED = {
    "name", "kind", "target", "version", "training_sites", "sequences", "scans", "subjects",
    "ages", "site_scans", "target_scans", "data_digest", "parent", "parent_weights", "init", "box",
    "steps", "losses", "figures", "stage1", "code_version", "config_digest", "encoder", "metrics",
}  # fmt: skip

_USE = """\
- Taking the scanner's part out of the look of brain MRI of several sites before statistics on
  groups, segmentation or learning, for research.
- Showing scans of several scanners in one look."""

_NOT_FOR = """\
- **Clinical diagnosis**, triage or treatment. Not a medical device: base no decision about a
  person on a harmonized image.
- **Quantitative measurement**: harmonized intensities carry no unit and are no T1, T2 or proton
  density. Ratios of them (T1w/T2w) mean nothing either.
- **Children, fetuses, animals, post-mortem brains and other contrasts** (FLAIR, PD, SWI, after
  contrast agent, ultra-high field where no training site had it). The network knows nothing of
  what is not among its training scans; their ages are under Data.
- **Reading or measuring lesions**: it was taught nothing about them. With a lesion mask
  (`sgcd harmonize --lesions`) the correction is carried through the lesion from around it;
  without one the network may redraw it.
- **Pooling sites that are confounded with the question.** Where patients come from one site and
  controls from another, what tells the sites apart and what tells the groups apart cannot be told
  apart: harmonizing may remove the effect, or leave the site's and let it pass as one.
- **Evidence that harmonizing worked.** That must be measured on the data at hand
  (`sgcd evaluate`), best on traveling subjects.
- **Hiding who was scanned.** An image in another look is still the same person's brain."""


def model_card(pack: ModelPack) -> str:
    """The card of a model, Markdown; the same model always gives the same card.

    Metadata it shows where they are there: see `ModelPack`; `losses` (name → mean at the end of
    training), `figures` (a mapping, or rows as mappings), `stage1` (what a target model was tuned
    from) and `box` (how the network it started from was made).
    """
    meta, config = pack.meta, pack.config
    name = str(meta.get("name", "unnamed"))
    if "version" in meta:
        name += f", version {meta['version']}"
    parts = [
        f"# Model card: {name}",
        _summary(pack),
        "## Intended use\n\n" + _USE,
        "## What it must not be used for\n\n" + _NOT_FOR,
        "## Data\n\n" + _data(meta),
        "## Recipe\n\n" + _recipe(pack),
        "## Figures\n\n" + _figures(meta),
        "## Limits\n\n" + _limits(config),
        "## Licence and citation\n\n" + _licence(meta),
    ]
    other = {key: meta[key] for key in sorted(meta) if key not in _PLACED}
    if other:
        parts.append("## Other metadata\n\n" + pairs_table(other))
    return "\n\n".join(parts) + "\n"


def pairs_table(values: Mapping[str, Any], head: Sequence[str] = ("what", "value")) -> str:
    """Names and values as a Markdown table."""
    return rows_table([dict(zip(head, item, strict=True)) for item in values.items()])


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order in which they first come, gaps as `-`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_cell(item) for item in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


def _summary(pack: ModelPack) -> str:
    meta, config = pack.meta, pack.config
    aim = "of all sites to a common look, one for each sequence"
    if meta.get("kind") == "target":
        aim = f"to the look of site {_cell(meta.get('target'))}"
    count = sum(tensor.numel() for tensor in pack.network.values())
    x, y, z = config.prepare.shape
    return (
        "A conditional 3D diffusion model (SGCD) that brings brain-extracted "
        f"{' and '.join(config.sequences)} scans {aim}. {count:,} weights on a grid of "
        f"{x}×{y}×{z} voxels of {config.prepare.mm:g} mm; preset `{config.preset}`. The correction "
        "is carried from there to the scan's own grid. For research only."
    )


def _data(meta: Mapping[str, Any]) -> str:
    values: dict[str, Any] = {
        "training sites": meta.get("training_sites"),
        "sequences": meta.get("sequences"),
        "scans": meta.get("scans"),
        "subjects": meta.get("subjects"),
        "age in years, youngest to oldest": meta.get("ages"),
        "scans of the target": meta.get("target_scans"),
        "digest of the list of scans": meta.get("data_digest"),
    }
    text = pairs_table({key: value for key, value in values.items() if value is not None})
    if meta.get("site_scans"):
        rows = [{"site": site, **counts} for site, counts in meta["site_scans"].items()]
        text += "\n\nScans by site and sequence:\n\n" + rows_table(rows)
    return text + "\n\nNo scan of the split `test` was learned from."


def _recipe(pack: ModelPack) -> str:
    meta, config = pack.meta, pack.config
    stage1 = meta.get("stage1") or ({} if meta.get("kind") == "target" else meta)
    values: dict[str, Any] = {}
    if stage1.get("init") == "box":
        box = stage1.get("box") or {}
        made = ["the network in the box"]
        if box.get("steps"):
            made.append(f"made in {_cell(box['steps'])} steps on {_cell(box.get('volumes'))} "
                        "digital scans")  # fmt: skip
        elif box:
            made.append("its U-Net at rest")
        if box.get("filter_volumes"):
            made.append(f"its look filter fitted to {_cell(box['filter_volumes'])} digital scans")
        values["Stage 1 starts from"] = f"{', '.join(made)}; no person's scan was in it"
    elif stage1.get("init"):
        values["Stage 1 starts from"] = "fresh weights"
    values |= {
        "Stage 1 steps": stage1.get("steps"),
        "Stage 1 scans": stage1.get("scans"),
        "Stage 1 data digest": stage1.get("data_digest") if stage1 is not meta else None,
    }
    if meta.get("kind") == "target":
        values |= {
            "tuned from": meta.get("parent"), "Stage 2 steps": meta.get("steps"),
            "style encoder": meta.get("encoder"), "weights of Stage 1": meta.get("parent_weights"),
        }  # fmt: skip
    values |= {
        "weights": pack.weights_digest(),
        "settings": config.digest(),
        "program": meta.get("code_version"),
    }
    known = {key: value for key, value in values.items() if value is not None}
    parts = [
        {"part": name, "settings": _settings(getattr(config, name))}
        for name in _parts(config, meta.get("kind"))
    ]
    return (
        pairs_table(known)
        + f"\n\nEvery setting (`config.yaml`; seed {config.seed}):\n\n"
        + rows_table(parts)
    )


def _parts(config: SgcdConfig, kind: Any) -> list[str]:
    """Names of the parts of the settings that made or run this kind of model."""
    only_target = {"target_sampler", "target_stage"}
    return [
        name
        for name in type(config).model_fields
        if hasattr(getattr(config, name), "model_dump")
        and (kind == "target" or name not in only_target)
    ]


def _settings(part: Any) -> str:
    values = part.model_dump(mode="json")
    return ", ".join(f"{key} {_setting(value)}" for key, value in values.items())


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(_setting(item) for item in value)})"
    return f"{value:g}" if isinstance(value, float) else _cell(value)


def _figures(meta: Mapping[str, Any]) -> str:
    parts = []
    stage1 = meta.get("stage1") or {}
    for title, losses in (("Stage 1", stage1.get("losses")), ("", meta.get("losses"))):
        if losses:
            head = f"Losses at the end of {title or 'training'} (mean of the last steps):"
            parts.append(f"{head}\n\n{pairs_table(losses, ('loss', 'mean'))}")
    figures = meta.get("figures")
    if figures:
        table = pairs_table(figures) if isinstance(figures, Mapping) else rows_table(figures)
        parts.append(f"Measured:\n\n{table}")
    parts.append(
        "What `sgcd evaluate` measures with this model is written beside this card, in "
        f"`{FIGURES}`. A model without that file was not evaluated."
    )
    return "\n\n".join(parts)


def _limits(config: SgcdConfig) -> str:
    guard, prepare = config.guard, config.prepare
    return f"""\
- Brain-extracted {" and ".join(config.sequences)} scans of adults like those it was trained on;
  voxel sides up to {prepare.max_voxel_mm:g} mm. All sites should be stripped with one tool.
- The correction is as smooth as the model's grid ({prepare.mm:g} mm): what differs between sites on
  a finer scale, noise and fine artefacts, stays in the scan.
- A result is marked `flagged` where edges correlate below {guard.min_gradient_correlation:g} (in
  any cube of 24 mm below {guard.min_local_correlation:g}), a tissue volume drifts
  by more than {guard.max_volume_drift:.0%} or the scan is more than {guard.max_outlier_score:g}
  typical distances from the training scans (`outlier_score`). A result without a flag is not
  thereby right.
- An uncertainty map (`--samples`) is the deviation over the sampler's seeds, not the error. It is
  nearly 0, and says nothing, where the network's output hardly depends on its noise.
- Sites with few scans have an uncertain look; the number of scans is above."""


def _licence(meta: Mapping[str, Any]) -> str:
    try:
        package = metadata(PACKAGE)
    except PackageNotFoundError:
        licence = "see the file LICENSE"
    else:
        licence = package["License-Expression"]
    version = _cell(meta.get("code_version", "version unknown"))
    return (
        f"Program: {licence}. The weights are under the terms of the scans they were learned from "
        f"as well: see the data sets' own licences.\n\nCite {PAPER} and this program, SGCD Lake "
        f"{version}; and the data sets."
    )
