"""Every example of README.md and docs/: commands, Python and SQL are run on a small lake.

What cannot be run here (a cluster, hours of training) is parsed by the program's own parser. A page
or a block that is added is found by itself; one that is neither must say why, see blocks.py.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from configparser import ConfigParser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from analyst_lake import analyst_lake
from blocks import BLOCKS, PAGES, ROOT, Block
from conftest import S3Server
from toy_lake import TARGET, Place, settle

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.query import run_query
from ray_jobs import cli
from ray_jobs.bids_parser import build_bids_parser, is_bids_app
from ray_jobs.parser import COMMANDS, build_parser
from ray_jobs.session import session
from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.io.store import Store

MAKE = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
#: Commands that are only parsed, and why. The small lake is made by most of them.
PARSED = {
    "demo": "minutes", "cohort": "minutes", "train": "minutes", "bids-app": "minutes",
    "serve": "runs until it is stopped", "submit": "a cluster", "new-site": "minutes",
}  # fmt: skip
#: Options with which a command is only parsed: a cluster, a GPU, another training, minutes.
PARSED_WITH = {
    "--ray-address", "--gpus", "--set", "--config", "--preset", "--workers", "--force", "--tasks",
}  # fmt: skip
#: Exit codes of a run that went as it should; of the small lake's scans one is damaged.
FINE = (0, 1)


def of_kind(*kinds: str) -> list[Any]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.kind in kinds]


def test_every_block_is_checked_or_says_why_not() -> None:
    assert [str(block) for block in BLOCKS if block.kind == "unknown"] == []
    assert len(BLOCKS) > 40


def test_no_block_is_overlooked() -> None:
    """Each line that opens or closes a block is one of those found, those in lists too."""
    for page in PAGES:
        lines = [line.strip() for line in page.read_text().splitlines()]
        fences = [line for line in lines if line.startswith(("```", "~~~"))]
        directives = sum(line.startswith("```{") for line in fences)
        name = str(page.relative_to(ROOT))
        assert len(fences) == 2 * (directives + sum(b.page == name for b in BLOCKS)), name


def test_commands_in_the_text_have_the_options_they_are_given() -> None:
    choices = next(iter(build_parser()._subparsers._group_actions)).choices
    wrong = []
    for page in PAGES:
        for text in re.findall(r"`sgcd ([a-z][^`]*)`", page.read_text()):
            name, *words = text.split()
            known = choices[name]._option_string_actions if name in choices else {}
            flags = {w.partition("=")[0] for w in words if w.startswith("--")}
            if name not in choices or (name != "submit" and not flags <= set(known)):
                wrong.append(f"{page.name}: sgcd {text}")
    assert wrong == []


def words_of(block: Block) -> Iterator[list[str]]:
    """The arguments of every `sgcd` of a block, without what the shell does with the output."""
    for words in block.commands():
        if words[0] == "sgcd":
            ends = [i for i, word in enumerate(words) if word in ("<", ">", "|", "&&")]
            yield words[1 : min(ends, default=len(words))]


def parse(words: list[str]) -> Any:
    """The parsed command line; of a submitted command, both."""
    parser = build_bids_parser() if is_bids_app(words) else build_parser()
    args = parser.parse_args(words)
    if args.command == "submit":
        parse([args.job, *args.words])
    return args


@pytest.mark.parametrize("block", of_kind("shell"))
def test_commands_parse_and_targets_exist(block: Block) -> None:
    for words in words_of(block):
        if words not in ([], ["COMMAND", "--help"]):
            try:
                parse(words)
            except SystemExit as end:
                assert end.code == 0, f"{block}: sgcd {' '.join(words)}"
    for words in block.commands():
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= set(MAKE), f"{block}: {words}"
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{block}: {words}"


SETTING = re.compile(r"\bSGCD_[A-Z0-9_]+")


def test_environment_variables_exist() -> None:
    code = "".join(
        path.read_text()
        for part in ("sgcd_core", "pipelines", "ray_jobs", "infra", "tests", "examples")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".sh", ".yaml", ".ipynb") and path.parent.name != "docs"
    )
    code += (ROOT / "ray-cluster.yaml").read_text() + (ROOT / "Makefile").read_text()
    code += "".join(path.read_text() for path in ROOT.glob("*.py"))
    named = {name for page in PAGES for name in SETTING.findall(page.read_text())}
    assert named - set(SETTING.findall(code)) == set()


@pytest.mark.parametrize("block", of_kind("yaml", "json", "ini"))
def test_data_can_be_read_and_settings_exist(block: Block, tmp_path: Path) -> None:
    values: Any
    if block.kind == "ini":
        values = ConfigParser()
        values.read_string(block.body)
    else:
        values = yaml.safe_load(block.body) if block.kind == "yaml" else json.loads(block.body)
    if isinstance(values, dict) and set(values) & set(SgcdConfig.model_fields):
        (tmp_path / "file.yaml").write_text(block.body)
        load_config(file=tmp_path / "file.yaml")


@pytest.mark.parametrize("block", of_kind("python"))
def test_python_compiles(block: Block) -> None:
    ast.parse(block.body)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Lake:
    return analyst_lake(str(tmp_path_factory.mktemp("questions") / "lake"))


@pytest.mark.parametrize(
    "block", [p for p in of_kind("sql") if p.values[0].page != "docs/cookbook.md"]
)  # the cookbook's answers are checked by tests/pipelines/test_cookbook.py
def test_sql_answers(block: Block, questions: Lake) -> None:
    assert run_query(questions, block.body).num_columns > 0


def test_the_restore_of_the_runbook_works(tmp_path: Path) -> None:
    """Not run as it stands, since it changes a table; here it does, on one that is thrown away."""
    (block,) = (b for b in BLOCKS if b.kind == "python" and ".restore(41)" in b.body)
    lake = Lake.open(str(tmp_path / "lake"), create=True)
    catalog = Catalog(lake)
    for name in ("a", "b"):
        catalog.append("runs", [{"run_id": name}])
    code = block.body.replace(".restore(41)", ".restore(1)").replace("/results", "/runs")
    code = code.replace("s3://LAKE-BUCKET/lake", lake.uri)
    exec(compile(code, str(block), "exec"), {"__name__": "page"})
    assert catalog.history("runs")["run_id"].to_pylist() == ["a"]


#: Names that pages use, and what they stand for at the desk below.
NAMES = {
    "SELECT …": "SELECT 1 AS one",
    "s3://bucket/lake": "{bucket}/lake",
    "s3://bucket/bids": "{bucket}/bids",
    "/data/bids/sub-01/anat/sub-01_T1w.nii.gz": "{scan}",
    "sub-01/anat/sub-01_T1w.nii.gz": "{scan}",
    "/data/bids": "{root}/bids",
    "/data/lake": "{root}/lake",
    "work/demo/lake": "{root}/lake",
    "LAKE": "{root}/lake",
    "SITE": TARGET,
    "SCAN": "{scan}",
}
#: What is left in a word that stands for something that is not there.
ELSEWHERE = re.compile(r"…|\{\w+\}|^s3://|^/data/|^[A-Z][A-Z_-]*$|\.pth$")


def replace(text: str, names: dict[str, str]) -> str:
    for name, here in names.items():
        text = re.sub(rf"(?<![\w/]){re.escape(name)}(?![\w-])", lambda _, h=here: h, text)
    return text


def is_run(words: list[str]) -> bool:
    """Whether a command is run, not only parsed."""
    if not words or words[0] in PARSED or is_bids_app(words) or "--help" in words:
        return False
    if {word.partition("=")[0] for word in words} & PARSED_WITH:
        return False
    known = dict.fromkeys(NAMES, "here")
    return not any(ELSEWHERE.search(replace(word, known)) for word in words)


@dataclass
class Desk:
    """Where examples are run: copies of the small lake in a folder and in a bucket."""

    names: dict[str, str]
    done: dict[tuple[str, ...], int] = field(default_factory=dict)

    def sgcd(self, words: list[str]) -> int:
        """The exit code; the same command is run once."""
        key = tuple(replace(word, self.names) for word in words)
        if key not in self.done:
            self.done[key] = cli.main(key)
        return self.done[key]


@pytest.fixture(scope="module")
def desk(
    toy_lake: Place, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Desk]:
    root = tmp_path_factory.mktemp("examples")
    lake, bids, bucket = root / "lake", root / "bids", s3_server.uri("docs")
    shutil.copytree(toy_lake.lake, lake, ignore=shutil.ignore_patterns("scratch"))
    shutil.copytree(toy_lake.cohort, bids)
    models = lake / "models" / f"target-{TARGET}"
    shutil.copytree(models / "1", models / "2")  # something to promote
    store = Store()
    for path in (p for folder in (lake, bids) for p in folder.rglob("*") if p.is_file()):
        if path.name != "mlflow.db":
            store.write_bytes(f"{bucket}/{path.relative_to(root)}", path.read_bytes())
    scan = str(sorted(bids.glob("sub-*/**/*_T1w.nii.gz"))[0])
    names = {k: v.format(bucket=bucket, root=root, scan=scan) for k, v in NAMES.items()}
    with pytest.MonkeyPatch.context() as patch:
        settle(patch, root)
        patch.chdir(root)
        patch.setenv("MPLBACKEND", "Agg")
        with session():
            yield Desk(names)


def run_blocks(kind: str) -> list[Block]:
    return [block for block in BLOCKS if block.kind == kind and block.mark != "not run"]


def test_most_commands_are_run_and_not_only_parsed() -> None:
    run = {w[0] for block in run_blocks("shell") for w in words_of(block) if is_run(w)}
    assert set(COMMANDS) - run - set(PARSED) == set()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=str(block))
        for block in run_blocks("shell")
        if any(is_run(words) for words in words_of(block))
    ],
)
def test_commands_run(
    block: Block, desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT site FROM site_metrics"))
    for words in filter(is_run, words_of(block)):
        code = desk.sgcd(words)
        assert code in FINE, f"{block}: sgcd {' '.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize("page", sorted({block.page for block in run_blocks("python")}))
def test_python_runs(page: str, desk: Desk) -> None:
    """The blocks of a page, one after the other, as a reader would."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in run_blocks("python"):
        if block.page == page:
            exec(compile(replace(block.body, desk.names), str(block), "exec"), names)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("block", of_kind("folder"))
def test_listings_of_a_lake_are_right(block: Block, toy_lake: Place) -> None:
    for line in block.body.splitlines():
        if line[:1].strip():
            name = line.split()[0].replace("SITE", TARGET)
            assert (toy_lake.lake / name).exists(), f"{block}: {line}"
