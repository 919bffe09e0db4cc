"""Alerts and dashboards are about what the programs really export; promtool runs them."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster.control_plane import build
from helm_chart import CHART, REPOSITORY, helm, values_files
from monitoring import dashboards, reference
from monitoring.series import SCRAPED, endpoint, operator, teachers, trainer
from opd_core import roles
from opd_core.api.load import load_spec
from opd_core.stages import Condition, Reason
from opd_operator import names
from opd_operator.cache import Cache
from opd_operator.metrics import Metrics as OperatorMetrics
from opd_operator.queue import WorkQueue
from opd_serving.endpoint.metrics import Metrics as EndpointMetrics
from opd_serving.teacher.server_binary import find_server
from opd_trainer.figures import FIGURES
from opd_trainer.metrics import Metrics as TrainerMetrics
from prometheus_client import CollectorRegistry, generate_latest

RULES = CHART / "files" / "alerts.yaml"
RULE_TESTS = REPOSITORY / "tests" / "chart" / "alerts_test.yaml"
PAGE = REPOSITORY / "docs" / "monitoring.md"

TARGET = {"job", "instance", *SCRAPED}  # labels that Prometheus gives to what it scrapes
SELECTOR = re.compile(r"\b((?:opd|nv|controller_runtime|workqueue|process)_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\b(?:by|on) \(([^)]*)\)")
MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*[\"']([^\"']*)[\"']")

MODEL = """
import triton_python_backend_utils

class TritonPythonModel:
    def execute(self, requests):
        return [triton_python_backend_utils.InferenceResponse([]) for _ in requests]
"""

Exported = dict[str, set[str]]  # name of a series, as a query finds it -> its labels


def promtool(*arguments: str | Path, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    command = [str(build("prometheus") / "promtool"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def triton_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a real tritonserver with one model exports."""
    folder = tmp_path_factory.mktemp("triton")
    model = folder / "repository" / "teacher"
    (model / "1").mkdir(parents=True)
    (model / "1" / "model.py").write_text(MODEL)
    (model / "config.pbtxt").write_text('backend: "python"\ninstance_group [{ kind: KIND_CPU }]\n')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = find_server()
    options = [f"--model-repository={model.parent}", "--allow-grpc=false", "--allow-http=false"]
    where = ["--metrics-address=127.0.0.1", f"--metrics-port={port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(server.binary), *(f"--backend-directory={each}" for each in server.backends), *options, *where],
            env={**os.environ, **server.env},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while 'nv_inference_count{model="teacher"' not in (page := read(f"http://127.0.0.1:{port}/metrics")):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        return page
    finally:
        process.terminate()
        process.wait()


def read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, ConnectionError):  # not up yet
        return ""


@pytest.fixture(scope="module")
def exported(triton_page: str) -> Exported:
    found = {
        name: {*each.labels, *TARGET, *(("le",) if name.endswith("_bucket") else ())}
        for each in (*operator(), *trainer(), *teachers(), *endpoint())
        for name in each.names
    }
    # Read as Prometheus does: the client's parser would add the `_total` that Triton's counters lack.
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", triton_page, re.M):
        found.setdefault(name, set(TARGET)).update(label for label, _ in MATCHER.findall(labels))
    return found


def selected(query: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(series, matchers as (label, value)) in a query."""
    for name, matchers in SELECTOR.findall(query):
        yield name, MATCHER.findall(matchers)


def check_query(query: str, exported: Exported) -> None:
    known: set[str] = set()
    for name, matchers in selected(query):
        assert name in exported, f"nobody exports {name}"
        assert {label for label, _ in matchers} <= exported[name], query
        known |= exported[name]
        for label, value in matchers if name == "opd_condition" else ():
            words = {"type": Condition, "reason": Reason}.get(label)
            assert words is None or "%" in value or set(value.split("|")) <= {word.value for word in words}, value
    assert known, f"no series in {query}"
    for labels in GROUPING.findall(query):
        assert set(re.findall(r"\w+", labels)) <= known, query


# ------------------------------------------------------------------------------------------------ alerts


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_promtool_accepts_the_alerts() -> None:
    done = promtool("check", "rules", RULES)
    assert done.returncode == 0, done.stderr + done.stdout


def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    for file in (RULES, RULE_TESTS):
        shutil.copy(file, tmp_path)
    done = promtool("test", "rules", tmp_path / RULE_TESTS.name)
    assert done.returncode == 0, done.stderr + done.stdout
    tested = {
        case["alertname"]
        for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    }
    assert tested == {rule["alert"] for rule in rules()}


def test_the_page_leads_from_each_alert_to_where_it_says_itself() -> None:
    """For who has the page and not the address that the pager gives."""
    links = dict(re.findall(r"^\| `(OPD\w+)` \| .*\]\(([^)]*)\) \| `kubectl ", PAGE.read_text(), re.M))
    urls = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules()}
    assert set(links) == set(urls)
    for alert, url in urls.items():
        page, _, section = url.removeprefix("docs/").partition("#")
        assert links[alert].partition("#")[0] == ("" if page == "monitoring.md" else page)
        assert "{{" in section or links[alert].partition("#")[2] == section


def test_alerts_and_their_tests_are_about_series_that_exist(exported: Exported) -> None:
    for rule in rules():
        for query in (rule["expr"], *re.findall(r'printf "([^"]*)"', str(rule["annotations"]))):
            check_query(query, exported)
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for series in test["input_series"]:
            check_query(series["series"], exported)


def test_each_alert_leads_to_a_page_that_says_what_to_do() -> None:
    def headings(page: str) -> set[str]:
        return {heading.lower() for heading in re.findall(r"^#+ (\w+)$", (REPOSITORY / page).read_text(), re.M)}

    assert {reason.value.lower() for reason in Reason} <= headings("docs/runbook.md")
    for rule in rules():
        page, _, fragment = rule["annotations"]["runbook_url"].partition("#")
        if fragment.startswith("{{"):  # a reason
            assert page == "docs/runbook.md"
        else:
            assert fragment in headings(page)
        assert rule["labels"]["severity"] in ("warning", "critical")


# ------------------------------------------------------------------------------------------------ dashboards


@pytest.mark.parametrize("board", dashboards.DASHBOARDS, ids=lambda board: board.name)
def test_the_charts_dashboards_are_the_generated_ones(board: dashboards.Dashboard) -> None:
    """`make generate` writes them."""
    assert (dashboards.FOLDER / f"{board.name}.json").read_text() == dashboards.text(board)


def test_panels_are_about_series_that_exist(exported: Exported) -> None:
    for title, query, legend in dashboards.queries():
        check_query(query, exported)
        grouped = {label for labels in GROUPING.findall(query) for label in re.findall(r"\w+", labels)} - {"le"}
        aggregated = re.match(r"(sum|max|count|histogram_quantile)\b", query)
        known = grouped if aggregated else set.union(*(exported[name] for name, _ in selected(query)))
        assert set(re.findall(r"{{(\w+)}}", legend)) <= known, title
    for board in dashboards.DASHBOARDS:
        for _, query in board.variables:
            for name, matchers in selected(query):
                assert {*(label for label, _ in matchers), re.findall(r", (\w+)\)$", query)[0]} <= exported[name]


def test_every_panel_draws_something(exported: Exported, tmp_path: Path) -> None:
    """One alert a query: it fires where the query finds something among one sample of everything that is exported."""
    values = {
        "namespace": ["research"], "name": ["digits"], "job": ["opd"], "le": ["1", "+Inf"], "status": ["True", "False"],
        "type": ["Failed", "Ready"], "phase": ["teacher_wait", "update"], "figure": [*FIGURES],
    }  # fmt: skip
    series = [
        name + "{" + ",".join(f'{label}="{value}"' for label, value in zip(labels, chosen, strict=True)) + "}"
        for name, labels in exported.items()
        for chosen in itertools.product(*(values.get(label, ["x"]) for label in labels))
    ]
    variables = {"$namespace": "research", "$name": "digits", "$job": "opd", "$__rate_interval": "2m"}
    queries = [re.sub(r"\$\w+", lambda found: variables[found[0]], query) for _, query, _ in dashboards.queries()]
    alerts = [{"alert": f"Query{index}", "expr": f"count({query}) > 0"} for index, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "panels", "rules": alerts}]}))
    case = {
        "interval": "30s",
        "input_series": [{"series": each, "values": "1+1x20"} for each in series],
        "alert_rule_test": [
            {"eval_time": "5m", "alertname": alert["alert"], "exp_alerts": [{"exp_labels": {}}]} for alert in alerts
        ],
    }
    (tmp_path / "test.yaml").write_text(json.dumps({"rule_files": ["rules.yaml"], "tests": [case]}))
    done = promtool("test", "rules", tmp_path / "test.yaml")
    silent = {
        dashboards.queries()[int(index)][:2]
        for index in re.findall(r"alertname: Query(\d+)", done.stderr + done.stdout)
    }
    assert not silent
    assert done.returncode == 0, done.stderr + done.stdout


# ------------------------------------------------------------------------------------------------ the programs


@pytest.mark.parametrize(
    "registry",
    [OperatorMetrics(Cache(), WorkQueue()).registry, TrainerMetrics(["ocr"], 1).registry, EndpointMetrics().registry],
    ids=["operator", "trainer", "endpoint"],
)
def test_promtool_finds_nothing_odd_in_what_a_program_exports(registry: CollectorRegistry) -> None:
    done = promtool("check", "metrics", stdin=generate_latest(registry).decode())
    assert done.returncode == 0, done.stderr + done.stdout


def test_the_metrics_reference_is_the_programs() -> None:
    assert reference.PAGE.read_text() == reference.page()


# ------------------------------------------------------------------------------------------------ the chart


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """With everything for monitoring."""
    files = [f"--values={file}" for file in values_files()["monitoring"]]
    docs = ["--set", "metrics.prometheusRule.docs=https://example.com/opd/docs/"]
    done = helm("template", "release", CHART, "--set", "crds.install=false", *files, *docs)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def test_the_alerts_reach_the_cluster_with_the_address_of_the_pages(documents: list[dict[str, Any]]) -> None:
    (rule,) = [document for document in documents if document["kind"] == "PrometheusRule"]
    text = RULES.read_text().replace("runbook_url: docs/", "runbook_url: https://example.com/opd/docs/")
    assert rule["spec"] == yaml.safe_load(text)


def test_the_dashboards_reach_grafana(documents: list[dict[str, Any]]) -> None:
    maps = [document for document in documents if document["kind"] == "ConfigMap"]
    assert {name: json.loads(text) for each in maps for name, text in each["data"].items()} == {
        f"{board.name}.json": dashboards.render(board) for board in dashboards.DASHBOARDS
    }
    assert all(each["metadata"]["labels"]["grafana_dashboard"] == "1" for each in maps)


def test_each_role_is_scraped_once_where_it_exports_something(documents: list[dict[str, Any]]) -> None:
    """Triton's own API has the name of the endpoint's port, and no metrics."""
    spec = load_spec(REPOSITORY / "examples" / "tiny" / "distill.yaml")
    place = roles.Place("python", Path("spec"), Path("claims"), Path("work"))
    ports = {"grpc": names.GRPC, "http": names.HTTP, "metrics": names.TRITON_METRICS}
    recipes = {
        names.TEACHERS: roles.teacher_server(place, "teacher", (), ports),
        names.TEACH: roles.teacher_trainer(place, "ocr", names.TRAINER_METRICS),
        names.TRAINER: roles.trainer(place, (), names.TRAINER_METRICS),
        names.ENDPOINT: roles.endpoint(place, spec, names.ENDPOINT_HTTP, names.ENDPOINT_METRICS),
    }
    scraped: dict[str, list[int]] = {role: [] for role in recipes}
    for monitor in (document for document in documents if document["kind"] == "PodMonitor"):
        (roles_,) = monitor["spec"]["selector"]["matchExpressions"]
        (where,) = monitor["spec"]["podMetricsEndpoints"]
        assert roles_["key"] == names.ROLE
        for role in roles_["values"]:
            scraped[role].append(recipes[role].ports[where["port"]])
    assert scraped == {
        names.TEACH: [names.TRAINER_METRICS],
        names.TEACHERS: [names.TRITON_METRICS],
        names.TRAINER: [names.TRAINER_METRICS],
        names.ENDPOINT: [names.ENDPOINT_METRICS],
    }


def test_the_operators_own_labels_win(documents: list[dict[str, Any]]) -> None:
    """Else the namespace of a distillation becomes `exported_namespace`."""
    (monitor,) = [document for document in documents if document["kind"] == "ServiceMonitor"]
    (where,) = monitor["spec"]["endpoints"]
    assert where["honorLabels"] is True


def test_a_plain_prometheus_finds_the_same_with_the_configuration_of_the_page(tmp_path: Path) -> None:
    """Its relabelling, on the container ports of every role as Kubernetes' discovery tells of them."""
    (block,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", PAGE.read_text(), re.S)
    config = yaml.safe_load(block)
    (job,) = config["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]  # Debian's promtool is built without it
    ports = {
        "operator": ["metrics", "probes"],
        "teachers": ["grpc", "http", "metrics"],
        "teach": ["metrics"],
        "trainer": ["metrics"],
        "endpoint": ["http", "metrics"],
    }
    job["static_configs"] = [
        {"targets": [f"{role}-{port}:1"], "labels": discovered(role, port)} for role in ports for port in ports[role]
    ]
    (tmp_path / "prometheus.yaml").write_text(json.dumps(config))
    done = promtool("check", "service-discovery", "--timeout=2s", tmp_path / "prometheus.yaml", job["job_name"])
    assert done.returncode == 0, done.stderr
    scraped = [target["labels"] for target in json.loads(done.stdout) if target["labels"]]
    assert {labels["instance"] for labels in scraped} == {
        "operator-metrics:1",
        "teachers-metrics:1",
        "teach-metrics:1",
        "trainer-metrics:1",
        "endpoint-metrics:1",
    }
    for labels in scraped:
        assert (labels["namespace"], labels["pod"]) == ("research", "digits-0")
        if not labels["instance"].startswith("operator"):
            assert labels["name"] == "digits"
            assert labels["instance"].startswith(labels["role"])


def discovered(role: str, port: str) -> dict[str, str]:
    """Meta labels of a container's port."""
    labels = {"namespace": "research", "pod_name": "digits-0", "pod_container_port_name": port}
    pod = (
        names.labels("digits", role)
        if role != "operator"
        else {
            "app.kubernetes.io/name": "diffusion-opd",
            "app.kubernetes.io/component": role,
        }
    )
    labels |= {f"pod_label_{re.sub(r'[^a-z]', '_', name)}": value for name, value in pod.items()}
    return {f"__meta_kubernetes_{name}": value for name, value in labels.items()}
