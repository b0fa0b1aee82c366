"""Alerts and dashboard: PromQL that parses, metrics that Ray has, a runbook section for each."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import ray
import yaml
from head_node import RayCluster

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "monitoring"


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return [rule for group in found for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [rule["expr"] for rule in rules()] + shown


def metrics(expression: str) -> Iterator[str]:
    """Names of the series in an expression; raises when it is no PromQL."""
    promql_parser.parse(expression)
    yield from re.findall(r"\bray_[a-z0-9_]+", expression)


def names() -> set[str]:
    return {name for expression in expressions() for name in metrics(expression)}


def test_every_metric_is_one_that_ray_has() -> None:
    """In Ray's own dashboards or in what its node agent reports."""
    package = Path(ray.__file__).parent / "dashboard" / "modules"
    files = [package / "reporter" / "reporter_agent.py"]
    files += sorted((package / "metrics" / "dashboards").glob("*_panels.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    known = set(re.findall(r"\bray_[a-z0-9_]+", text))
    known |= {f"ray_{name}" for name in re.findall(r'"([a-z][a-z0-9_]+)"', files[0].read_text())}
    assert len(names()) > 10 and names() - known == set()
    assert "ray_no_such_metric" not in known


def test_every_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    text = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
    found = rules()
    assert len({rule["alert"] for rule in found}) == len(found) > 5
    for rule in found:
        assert rule["labels"]["severity"] in ("page", "ticket")
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert page == "docs/operating.md" and anchor in anchors, rule["alert"]
        assert rule["annotations"]["summary"].endswith(".")


def test_the_dashboard_is_whole() -> None:
    found = dashboard()
    panels = found["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels) and all(
        p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels
    )
    variable = found["templating"]["list"][0]["name"]
    for panel in panels:
        assert panel["datasource"]["uid"] == f"${{{variable}}}" and panel["title"]
        assert all(target["expr"] and target["refId"] for target in panel["targets"])


def test_prometheus_scrapes_the_port_that_the_nodes_open() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    kept = [r["regex"] for r in config["scrape_configs"][0]["relabel_configs"] if "regex" in r]
    assert "metrics" in kept  # the port's name in the manifests
    spec = yaml.safe_load((ROOT / "infra/kuberay/cluster.yaml").read_text())["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        ports = {
            p["name"]: p["containerPort"]
            for p in group["template"]["spec"]["containers"][0]["ports"]
        }
        assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]


def test_alerts_fire_when_they_should_and_not_before() -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool (Debian package prometheus) is not installed")
    done = subprocess.run(
        [tool, "test", "rules", str(FOLDER / "alerts_test.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_running_head_exports_what_the_alerts_about_nodes_need(ray_cluster: RayCluster) -> None:
    import time

    wanted = {
        "ray_node_mem_used",
        "ray_node_mem_total",
        "ray_node_disk_free",
        "ray_node_disk_usage",
    }
    assert wanted <= names()
    found: set[str] = set()
    for _ in range(120):
        with contextlib.suppress(OSError):  # the agent that answers starts after the head
            text = urllib.request.urlopen(ray_cluster.metrics, timeout=10).read().decode()
            found = set(re.findall(r"^# TYPE (ray_[a-z0-9_]+)", text, re.MULTILINE))
        if wanted <= found:
            break
        time.sleep(1)
    assert wanted <= found, sorted(found)
