"""What watches a fleet: Prometheus, its alerts and Grafana's dashboard ask for figures that there are."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from comfy_emulator import EmulatorServer
from comfy_worker.gateway.jobs.metrics import GatewayCollector, make_registry
from comfy_worker.gateway.store.database import connect
from comfy_worker.gateway.store.job_store import JobStore
from tests.support.docs import compose_file
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/comfy-worker.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

OF_PROMETHEUS = {"up", "scrape_duration_seconds"}
"""Figures that it makes itself for each of its targets."""
OF_A_TARGET = {"job", "instance"}
"""Labels that it gives each figure."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Each figure that a gateway tells, with its labels."""
    store = JobStore(connect(f"sqlite:///{tmp_path_factory.mktemp('store')}/jobs.db"), b"key")
    registry = make_registry()
    with EmulatorServer() as comfyui:
        registry.register(GatewayCollector(store, lambda: [{"url": comfyui.url, "healthy": True, "jobs": 0}]))
        labels = labels_of(registry)
    store.close()
    return labels | {name: set() for name in OF_PROMETHEUS}


def labels_of(registry: CollectorRegistry) -> dict[str, set[str]]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    samples = itertools.chain.from_iterable(family.samples for family in families)
    return {sample.name: set(sample.labels) for sample in samples}


def parsed(query: str) -> promql_parser.Expr:
    """Return a query's parts; Grafana's own variables are replaced as it does."""
    return promql_parser.parse(query.replace("$__rate_interval", "1m"))


def parts(query: str) -> Iterator[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(parsed(query), found.append)
    yield from found


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    for part in parts(query):
        if isinstance(part, promql_parser.VectorSelector):
            yield part
        elif isinstance(part, promql_parser.MatrixSelector):
            yield part.vector_selector


class TestQueries:
    @pytest.fixture(params=QUERIES + [alert["expr"] for alert in ALERTS])
    def query(self, request: pytest.FixtureRequest) -> str:
        text: str = request.param
        return text

    def test_uses_existing_metrics_and_labels(self, figures: dict[str, set[str]], query: str) -> None:
        asked = list(selectors(query))
        assert asked
        for selector in asked:
            assert selector.name in figures
            assert {matcher.name for matcher in selector.matchers.matchers} <= figures[selector.name] | OF_A_TARGET

    def test_groups_by_existing_labels(self, figures: dict[str, set[str]], query: str) -> None:
        for part in parts(query):
            if isinstance(part, promql_parser.AggregateExpr) and part.modifier is not None:
                inner = {name for one in selectors(part.expr.prettify()) for name in figures[str(one.name)]}
                assert set(part.modifier.labels) <= inner | OF_A_TARGET

    def test_uses_existing_states_and_stages(self, query: str) -> None:
        known = set(re.findall(r'"([A-Z_]+)"', (ROOT / "src/comfy_worker/types.py").read_text(encoding="utf-8")))
        stages = {"waiting", "staging", "queued", "running", "delivering"}
        values = {
            matcher.name: matcher.value for selector in selectors(query) for matcher in selector.matchers.matchers
        }
        assert set(values.get("state", "FAILED").split("|")) <= known
        assert values.get("stage", "waiting") in stages
        assert values.get("job", "gateway") in {one["job_name"] for one in PROMETHEUS["scrape_configs"]}


def test_every_gateway_metric_is_shown(figures: dict[str, set[str]]) -> None:
    shown = {str(selector.name) for query in QUERIES for selector in selectors(query)}
    own = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in figures if name.startswith("comfy_")}
    assert {name for name in own if not any(one.startswith(name) for one in shown)} == set()


class TestPrometheus:
    def test_scrapes_the_gateway_with_its_key(self) -> None:
        file = compose_file.complete()
        services = compose_file.services(file, "fleet")
        (job,) = [one for one in PROMETHEUS["scrape_configs"] if one["job_name"] == "gateway"]
        folder, _, secret = job["authorization"]["credentials_file"].rpartition("/")
        assert folder == "/run/secrets"
        assert secret in services["prometheus"]["secrets"]
        variable = file["secrets"][secret]["environment"]
        assert f"${{{variable}:?" in compose_file.raw()["services"]["gateway"]["environment"]["API_KEYS"]
        (found,) = job["dns_sd_configs"]
        assert set(found["names"]) <= set(services)
        assert all(port.endswith(f":{found['port']}") for port in services["gateway"]["ports"])
        assert job["metrics_path"] == "/metrics"

    def test_times_out_before_the_next_scrape(self) -> None:
        seconds = {name: promql_parser.parse_duration(PROMETHEUS["global"][name]) for name in PROMETHEUS["global"]}
        assert seconds["scrape_timeout"] < seconds["scrape_interval"]

    def test_has_its_files_mounted(self) -> None:
        service = compose_file.complete()["services"]["prometheus"]
        assert "./deploy/prometheus:/etc/prometheus:ro" in service["volumes"]
        assert "--config.file=/etc/prometheus/prometheus.yml" in service["command"]
        for name in PROMETHEUS["rule_files"]:
            assert (DEPLOY / "prometheus" / name).exists()

    @pytest.mark.parametrize("alert", ALERTS, ids=[alert["alert"] for alert in ALERTS])
    def test_every_alert_says_what_to_do(self, alert: dict[str, Any]) -> None:
        assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description"}
        assert "for" not in alert or promql_parser.parse_duration(alert["for"])

    def test_alert_names_are_unique(self) -> None:
        assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)


class TestGrafana:
    def provisioned(self, path: str) -> dict[str, Any]:
        loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "grafana/provisioning" / path).read_text(encoding="utf-8"))
        return loaded

    def test_every_panel_uses_the_provisioned_source(self) -> None:
        (source,) = self.provisioned("datasources/prometheus.yml")["datasources"]
        for panel in DASHBOARD["panels"]:
            for asks in (panel, *panel["targets"]):
                assert asks["datasource"] == {"type": source["type"], "uid": source["uid"]}

    def test_the_source_is_the_prometheus_of_the_fleet(self) -> None:
        (source,) = self.provisioned("datasources/prometheus.yml")["datasources"]
        host, _, port = source["url"].removeprefix("http://").partition(":")
        service = compose_file.services(compose_file.complete(), "fleet")[host]
        assert all(mapping.endswith(f":{port}") for mapping in service["ports"])

    def test_the_dashboard_is_mounted_where_grafana_reads_it(self) -> None:
        (provider,) = self.provisioned("dashboards/dashboards.yml")["providers"]
        service = compose_file.complete()["services"]["grafana"]
        assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in service["volumes"]
        home = service["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert home == f"{provider['options']['path']}/comfy-worker.json"

    def test_panels_do_not_overlap(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in DASHBOARD["panels"]:
            at = panel["gridPos"]
            cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells
        assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])

    def test_a_legend_names_labels_that_its_query_keeps(self) -> None:
        for panel in DASHBOARD["panels"]:
            for target in panel["targets"]:
                for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                    groups = [part for part in parts(target["expr"]) if isinstance(part, promql_parser.AggregateExpr)]
                    kept = groups[0].modifier.labels if groups and groups[0].modifier else OF_A_TARGET
                    assert label in kept, panel["title"]
