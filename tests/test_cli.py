"""The command line as a shell sees it: exit codes, one clear line, nothing slow for --help."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from pipelines.lease import lease
from pipelines.training_data import COMPLETE
from ray_jobs import cli
from ray_jobs.outcome import Outcome
from ray_jobs.parser import COMMANDS, build_parser
from sgcd_core.io.store import Store, join

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sgcd(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_reader_that_goes_away_is_no_failure() -> None:
    code = (
        "import sys, argparse; from ray_jobs import cli; from ray_jobs.outcome import Outcome; "
        "cli._run = lambda args: Outcome('', lines=['x' * 100] * 10_000, exit_code=3); "
        "sys.exit(cli.main(['doctor']))"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (3, b"")


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from ray_jobs.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'SimpleITK', 'deltalake'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "harmonize" in done.stdout
    assert time.monotonic() - started < 10  # a generous bound: the modules are what matters


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command: str, sgcd: Run) -> None:
    code, out, _ = sgcd(command, "--help")
    assert code == 0
    assert f"sgcd {command}" in out.split("example:")[1]


def test_the_demo_says_which_commands_it_would_run(sgcd: Run, tmp_path: Path) -> None:
    config = tmp_path / "my settings.yaml"
    config.write_text("target_stage: {steps: 5}\n")
    words = ["demo", "--out", str(tmp_path / "a demo"), "--dry-run", "--json"]
    own = ["--config", str(config), "--set", "global_stage.steps=7"]
    asked = [*own, "--tune-steps", "9"]  # what an option says counts, whatever the file says
    cases = (own, False, "7", None), (asked, False, "7", "9"), ([], True, "40", "16")
    for given, box, train, tune in cases:
        code, out, _ = sgcd(*words, *given)
        steps = {step[0]: step for step in json.loads(out)["steps"]}
        parsed = {name: build_parser().parse_args(step) for name, step in steps.items()}
        assert code == 0 and not (tmp_path / "a demo").exists()
        assert (parsed["train"].init == "box") == box
        assert [s for s in parsed["train"].settings if "steps" in s] == [
            f"global_stage.steps={train}"
        ]
        named = [s for s in parsed["tune"].settings if s.startswith("target_stage.steps=")]
        assert named == ([f"target_stage.steps={tune}"] if tune else [])
        assert parsed["prepare"].config == (str(config) if given else None)
    assert sgcd("demo", "--out", str(tmp_path / "d"), "--set", "no.such=1")[0] == 78


def test_a_cohort_is_counted_before_it_is_made(sgcd: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "cohort")
    words = ["cohort", out, "--subjects", "1", "--sites", "1", "--traveling", "0",
             "--unseen-sites", "0", "--mm", "4", "--workers", "1"]  # fmt: skip
    counts = []
    for more in (["--dry-run"], [], ["--dry-run"]):
        code, text, _ = sgcd(*words, *more, "--json")
        counts.append((code, json.loads(text)["written"], Path(out).exists()))
    assert counts == [(0, 2, False), (0, 2, True), (0, 0, True)]
    assert sgcd(*words[:3], "5", *words[4:], "--dry-run")[0] == 78


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_leads_somewhere(command: str) -> None:
    import importlib

    module, _, function = COMMANDS[command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_command_and_a_wrong_one_are_usage_errors(sgcd: Run) -> None:
    assert sgcd()[0] == 2
    assert sgcd("harmonise")[0] == 2
    assert sgcd("train")[0] == 2  # --lake is missing


LAKE_COMMANDS = [
    ("prepare",), ("train",), ("suggest-target",), ("tune", "--target", "A"),
    ("harmonize", "--model", "m"), ("evaluate", "--model", "m"), ("report", "--model", "m"),
    ("query", "SELECT 1"), ("status",), ("promote", "m@1"), ("cite", "--model", "m"),
]  # fmt: skip


@pytest.mark.parametrize("words", LAKE_COMMANDS, ids=lambda w: w[0])
def test_a_missing_lake_is_one_line_and_69(
    words: tuple[str, ...], sgcd: Run, tmp_path: Path
) -> None:
    code, out, err = sgcd(*words, "--lake", str(tmp_path / "none"))
    assert code == 69
    assert err.count("\n") == 1 and "[LAKE-MISSING]" in err and "sgcd index" in err
    assert "Traceback" not in err and out == ""


NO_BUCKET = [
    ("index", "COHORT", "--lake", "s3://"), ("index", "COHORT", "--lake", "s3:///lake"),
    ("index", "s3:///cohort", "--lake", "lake"), ("status", "--lake", "s3://"),
    ("query", "SELECT 1 AS one", "--lake", "LAKE", "--out", "s3://"),
    ("export", "--lake", "LAKE", "--out", "s3:///tables"),
    ("doctor", "--lake", "s3://"),
]  # fmt: skip


@pytest.mark.parametrize("words", NO_BUCKET, ids=" ".join)
def test_an_address_without_a_bucket_is_refused_and_makes_nothing(
    words: tuple[str, ...], sgcd: Run, tmp_path: Path, tmp_lake: Lake,
    make_scan: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "cohort" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    (folder / "sub-1_T1w.nii.gz").write_bytes(make_scan())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    named = {"COHORT": str(tmp_path / "cohort"), "LAKE": tmp_lake.uri}
    code, _, err = sgcd(*(named.get(word, word) for word in words))
    assert code == 69 and "[STORE-ADDRESS]" in err.splitlines()[-1] and "Traceback" not in err
    assert list((tmp_path / "here").iterdir()) == []


def test_json_errors_are_one_document(sgcd: Run, tmp_path: Path) -> None:
    code, out, _ = sgcd("status", "--lake", str(tmp_path / "none"), "--json")
    document = json.loads(out)
    assert (document["exit_code"], document["code"]) == (code, "LAKE-MISSING")


def test_an_empty_prefix_is_said_and_makes_no_lake(sgcd: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = sgcd("index", str(tmp_path / "empty"), "--lake", str(tmp_path / "lake"))
    assert code == 65 and "[STORE-EMPTY]" in err
    assert not (tmp_path / "lake").exists()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--set", "global_stage.stepz=3"), "CONFIG-KEY"),
        (("--set", "global_stage.steps=-3"), "CONFIG-VALUE"),
        (("--config", "none.yaml"), "CONFIG-FILE"),
        (("--set", "seed=" + 5000 * "["), "CONFIG-VALUE"),
        (("--set", "seed=" + 5000 * "{a: "), "CONFIG-VALUE"),
    ],
    ids=lambda item: item[1][:12] if isinstance(item, tuple) else item,
)
def test_a_wrong_setting_is_78(
    words: tuple[str, str], code: str, sgcd: Run, tmp_lake: Lake
) -> None:
    found, _, err = sgcd("train", "--lake", tmp_lake.uri, *words)
    assert found == 78 and f"[{code}]" in err and len(err) < 1000


def test_a_file_of_settings_nested_too_deep_is_78(
    sgcd: Run, tmp_lake: Lake, tmp_path: Path
) -> None:
    (tmp_path / "deep.yaml").write_text("seed: " + 5000 * "[")
    found, _, err = sgcd("train", "--lake", tmp_lake.uri, "--config", str(tmp_path / "deep.yaml"))
    assert found == 78 and "[CONFIG-FILE]" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optimize", "--keep-days", "nan"), "number of days"),
        (("optimize", "--keep-days", "inf"), "number of days"),
        (("serve", "--port", "99999"), "0 to 65535"),
        (("serve", "--port", "-1"), "0 to 65535"),
        (("query", "SELECT 1", "--timeout", "99999999999"), "1 to 1000000"),
        (("new-site", "SOURCE", "--wait", "nan"), "number of minutes"),
        (("new-site", "SOURCE", "--wait", "-5"), "number of minutes"),
        (("tune", "--target", "A", "--wait", "inf"), "number of minutes"),
    ],
)
def test_a_number_out_of_its_range_is_a_usage_error(
    words: tuple[str, ...], said: str, sgcd: Run, tmp_lake: Lake
) -> None:
    code, _, err = sgcd(*words, "--lake", tmp_lake.uri)
    assert code == 2 and said in err and "Traceback" not in err


@pytest.mark.parametrize("words", [("train",), ("tune", "--target", "A")], ids=lambda w: w[0])
def test_a_training_waits_for_another_as_long_as_told(
    words: tuple[str, ...], sgcd: Run, tmp_lake: Lake
) -> None:
    name = "model-global" if words == ("train",) else "model-target-A"
    with lease(tmp_lake, name, beat=0.2):
        code, _, err = sgcd(*words, "--lake", tmp_lake.uri, "--wait", "0")
    assert code == 75 and "[LAKE-BUSY]" in err and "--wait" in err


def test_an_unindexed_lake_says_what_to_do(sgcd: Run, tmp_lake: Lake) -> None:
    code, _, err = sgcd("prepare", "--lake", tmp_lake.uri)
    assert code == 65 and "[LAKE-EMPTY]" in err and "sgcd index" in err


def add_scan(lake: Lake, name: str, **columns: object) -> None:
    row = {"scan_id": name, "uri": f"/{name}.nii.gz", "sequence": "T1w", "status": "ok"}
    Catalog(lake).append("scans", [row | columns])


def test_an_unknown_target_lists_the_sites(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha")
    add_scan(tmp_lake, "b", site="Beta")
    code, _, err = sgcd("tune", "--lake", tmp_lake.uri, "--target", "Gamma")
    assert code == 65 and "[TARGET-UNKNOWN]" in err and "Alpha, Beta" in err


def test_an_unknown_model_is_said(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha")
    code, _, err = sgcd("harmonize", "--lake", tmp_lake.uri, "--model", "target-Alpha")
    assert code == 65 and "[MODEL-MISSING]" in err


def test_training_without_prepared_scans_says_prepare(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha")
    code, _, err = sgcd("train", "--lake", tmp_lake.uri)
    assert code == 65 and "[LAKE-EMPTY]" in err and "sgcd prepare" in err


def test_check_needs_no_lake(sgcd: Run, tmp_path: Path, make_scan: Callable[..., bytes]) -> None:
    good, cut = tmp_path / "good.nii.gz", tmp_path / "cut.nii.gz"
    good.write_bytes(make_scan())
    cut.write_bytes(make_scan()[:-2000])
    assert sgcd("check", str(good))[0] == 0
    assert sgcd("check", str(cut), str(tmp_path / "none.nii.gz"))[0] == 65
    code, out, _ = sgcd("check", str(good), str(cut), "--json")
    rows = json.loads(out)["scans"]
    assert code == 1
    assert [row["usable"] for row in rows] == [True, False]
    assert rows[1]["code"].startswith("SCAN-")


def test_an_unexpected_error_is_70_without_traceback(
    sgcd: Run, tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "status", "ray_jobs.status:missing")
    code, _, err = sgcd("status", "--lake", tmp_lake.uri)
    assert code == 70 and "[INTERNAL]" in err and "Traceback" not in err
    assert "Traceback" in sgcd("status", "--lake", tmp_lake.uri, "--debug")[2]


def test_being_stopped_is_75(sgcd: Run, tmp_lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_jobs.status.run", raise_it)
    code, _, err = sgcd("status", "--lake", tmp_lake.uri)
    assert code == 75 and "run the same command again" in err


def test_status_counts_and_names_the_next_command(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha")
    code, out, _ = sgcd("status", "--lake", tmp_lake.uri)
    assert code == 0 and "1 scan (1 usable), 0 prepared" in out
    assert f"next: sgcd prepare --lake {tmp_lake.uri}" in out


def test_status_counts_results_of_scans_as_they_are(sgcd: Run, tmp_lake: Lake) -> None:
    for name, code in (("a", None), ("b", None), ("old", "SCAN-REPLACED")):
        add_scan(tmp_lake, name, site="Alpha", subject=name, code=code)
    for name, site in (("a", "Alpha"), ("b", "Beta"), ("old", "Alpha")):
        row = {"scan_id": name, "model": "m", "model_version": 1, "status": "ok", "site": site}
        Catalog(tmp_lake).append("results", [row | {"subject": name, "sequence": "T1w"}])
    code, out, _ = sgcd("status", "--lake", tmp_lake.uri)
    assert code == 0 and "2 scans (2 usable), 0 prepared, 0 models, 2 results (2 ok)" in out
    assert "1 results are under labels that were corrected since" in out


def test_query_prints_rows(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha")
    sql = "SELECT site, count(*) AS n FROM scans GROUP BY site"
    code, out, _ = sgcd("query", sql, "--lake", tmp_lake.uri, "--json")
    assert code == 0 and json.loads(out)["rows"] == [{"site": "Alpha", "n": 1}]


def test_the_parser_lists_what_runs() -> None:
    actions = build_parser()._subparsers
    assert actions is not None
    assert set(actions._group_actions[0].choices or {}) == set(COMMANDS)


def test_a_report_without_a_model_tells_what_there_is(sgcd: Run, tmp_lake: Lake) -> None:
    code, out, _ = sgcd("report", "--lake", tmp_lake.uri)
    assert code == 0 and "reports/no-model/index.html" in out
    code, out, _ = sgcd("report", "--lake", tmp_lake.uri, "--model", "target-A")
    assert code == 65 and "MODEL-MISSING" in out
    assert "no-model/index.html" in out  # written all the same


def test_a_report_without_a_name_is_about_the_newest_result(sgcd: Run, tmp_lake: Lake) -> None:
    for version in (1, 2):
        row = {"scan_id": "s1", "model": "m", "model_version": version, "status": "failed"}
        Catalog(tmp_lake).append("results", [row])
    code, out, _ = sgcd("report", "--lake", tmp_lake.uri, "--json")
    assert code == 0
    assert json.loads(out)["report"] == tmp_lake.report("m-v2/index.html")


def test_serve_answers_until_it_is_stopped(tmp_lake: Lake) -> None:
    command = [sys.executable, "-m", "ray_jobs.cli", "serve", "--lake", tmp_lake.uri, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        try:
            with urllib.request.urlopen(address.partition("?")[0], timeout=60) as answer:
                raise AssertionError(answer.status)
        except urllib.error.HTTPError as refused:
            assert refused.code == 403
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert b"There is none yet" in opener.open(address, timeout=60).read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_a_name_that_is_no_text_does_not_end_check(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/scan_\xe4\xff.nii.gz")).write_bytes(b"no scan")
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.cli", "check", str(tmp_path)], capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, check=False,
    )  # fmt: skip
    assert done.returncode == 65 and b"0 of 1 scans can be used" in done.stdout, done.stderr


def test_doctor_says_that_there_is_no_lake_and_makes_none(sgcd: Run, tmp_path: Path) -> None:
    code, out, _ = sgcd("doctor", "--lake", str(tmp_path / "typo" / "lake"))
    assert code == 0 and "none at" in out
    assert not (tmp_path / "typo").exists()


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome("done", data={"psnr": [float("inf"), float("nan"), 1.5]})
    cli.print_outcome(argparse.Namespace(json=True, command="evaluate"), outcome)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["psnr"] == [None, None, 1.5]


def test_a_misspelt_command_is_named(sgcd: Run) -> None:
    code, _, err = sgcd("harmonise", "--lake", "x")
    assert code == 2 and "there is no command 'harmonise'; did you mean harmonize?" in err
    code, _, err = sgcd("qqqq")
    assert code == 2 and "invalid choice: 'qqqq'" in err


def test_status_says_what_is_left_to_do_with_a_model(sgcd: Run, tmp_lake: Lake) -> None:
    add_scan(tmp_lake, "a", site="Alpha", status="ok")
    catalog, model = Catalog(tmp_lake), "target-A"
    where = {"model": model, "model_version": 1}
    Store().write_bytes(join(tmp_lake.prepared("r", "a"), COMPLETE), b"{}")
    for name in ("global", model):
        body = json.dumps({"meta": {"sequences": ["T1w"]}}).encode()
        Store().write_bytes(join(tmp_lake.model(name, 1), "pack.json"), body)

    def following() -> str:
        code, out, _ = sgcd("status", "--lake", tmp_lake.uri)
        assert code == 0
        return out.partition("next: ")[2].strip()

    def evaluated(version: int = 1, status: str = "ok") -> None:
        catalog.append("runs", [{
            "run_id": uuid.uuid4().hex, "command": "evaluate", "status": status,
            "started_at": datetime.datetime.now(datetime.UTC),
            "summary": json.dumps({"model": model, "version": version}),
        }])  # fmt: skip

    words = f"--lake {tmp_lake.uri} --model {model}"
    assert following() == f"sgcd harmonize {words} --only-new"
    row = {"scan_id": "a", "status": "ok", "sequence": "T1w", "site": "Alpha"}
    catalog.append("results", [row | where])
    evaluated(version=2)
    evaluated(status="failed")
    assert following() == f"sgcd evaluate {words}"
    evaluated()
    assert following() == f"sgcd report {words}"
    page = join(tmp_lake.report(f"{model}-v1"), "index.html")
    Store().write_bytes(page, b"")
    assert following() == ""
    catalog.append("results", [row | where])  # whatever became of the run that wrote it
    assert following() == f"sgcd evaluate {words}"
    evaluated()
    os.utime(page, (0, 0))  # the page is of the night before
    assert following() == f"sgcd report {words}"
    Store().write_bytes(join(tmp_lake.model(model, 1), "pack.json"), b"{")
    assert following() == f"sgcd harmonize {words} --only-new"
