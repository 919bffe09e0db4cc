"""The chart as Helm renders it; `make e2e` installs it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster.control_plane import ControlPlane
from helm_chart import CHART, GOLDEN, README, REPOSITORY, golden, helm, readme, values, values_files
from opd_operator.__main__ import parser, settings_of
from opd_operator.cache import Cache
from opd_operator.metrics import Metrics
from opd_operator.queue import WorkQueue
from prometheus_client import start_http_server

CLUSTER_SCOPED = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Namespace"}

Documents = list[dict[str, Any]]


def render(*options: str | Path) -> Documents:
    """Without the type, which is long."""
    done = helm("template", "release", CHART, "--namespace", "opd-system", "--set", "crds.install=false", *options)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def with_values(name: str) -> Documents:
    return render(*(f"--values={file}" for file in values_files()[name]))


def of_kind(documents: Documents, kind: str) -> Documents:
    return [document for document in documents if document["kind"] == kind]


def operator_pod(documents: Documents) -> dict[str, Any]:
    (deployment,) = of_kind(documents, "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def arguments(documents: Documents) -> list[str]:
    return list(operator_pod(documents)["containers"][0]["args"])


# ------------------------------------------------------------------------------------------------ as a whole


def test_it_passes_helms_own_check() -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", values_files())
def test_it_renders_what_was_reviewed(name: str) -> None:
    """`make golden` writes these."""
    assert golden(values_files()[name]) == (GOLDEN / f"{name}.yaml").read_text()


def test_no_golden_render_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(values_files())


def test_the_readme_has_the_values_of_today() -> None:
    assert README.read_text() == readme()


def test_pages_name_files_of_the_chart_that_exist() -> None:
    for page in (README, REPOSITORY / "docs" / "monitoring.md"):
        files = re.findall(r"(?:charts|tools|crds)/[\w./-]+\w", page.read_text())
        assert files
        assert [file for file in files if not (REPOSITORY / file).exists()] == []


def test_every_value_says_what_it_is_or_belongs_to_a_group_that_does() -> None:
    plain = {"nodeSelector", "tolerations", "affinity", "priorityClassName", "podAnnotations"}  # Kubernetes' own
    said = {path for path, _, about in values() if about}
    silent = {path for path, _, _ in values()} - said - plain
    assert not {path for path in silent if path.rpartition(".")[0] not in said} - {"serviceAccount.annotations"}


def test_the_schema_knows_every_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(part: dict[str, Any], content: dict[str, Any], path: str) -> None:
        part = schema["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
        if "properties" not in part:
            return
        assert part["additionalProperties"] is False, path
        known = set(part["properties"]) - {"global"}
        if path.startswith((".resources", ".affinity")):
            assert set(content) <= known, path
        else:
            assert set(content) == known, path
        for name, value in content.items():
            check(part["properties"][name], value, f"{path}.{name}")

    check(schema, yaml.safe_load((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("device=tpu", "/device"),
        ("replicas=0", "/replicas"),
        ("logLevel=loud", "/logLevel"),
        ("images.registry=registry.example.com", "/images/registry"),
        ("images.trainer=trainer:1.0", "/images/trainer"),
        ("images.trainer=trainer@sha256:12", "/images/trainer"),
        ("images.tag=1 0", "/images/tag"),
        ("images.pullSecrets={name}", "/images/pullSecrets/0"),
        ("imagse.tag=1", "imagse"),
        ("watchNamespaces={a,a}", "/watchNamespaces"),
        ("watchNamespaces={Research}", "/watchNamespaces/0"),
        ("tolerations[0].efect=NoSchedule", "efect"),
        ("topologySpreadConstraints[0].maxSkew=1", "topologyKey"),
        ("resources.limit.memory=1Gi", "limit"),
        ("commonLabels.team=1", "/commonLabels/team"),
        ("extraEnv[0].value=1", "name"),
        ("networkPolicy.apiServerPorts={0}", "/networkPolicy/apiServerPorts/0"),
        ("networkPolicy.scrapers[0].pod=x", "pod"),
        ("networkPolicy.distillations.extraEgress[0].port=1", "port"),
        ("fixedUser=maybe", "/fixedUser"),
        ("fullnameOverride=A b", "/fullnameOverride"),
        ("resyncSeconds=1", "/resyncSeconds"),
        ("extraArgs={workers=3}", "/extraArgs/0"),
        ("extraVolumes[0].secret=x", "name"),
        ("metrics.podMonitor.interval=30", "/metrics/podMonitor/interval"),
        ("metrics.dashboards.enabled=yes", "/metrics/dashboards/enabled"),
    ],
)
def test_a_wrong_value_is_refused_by_name(setting: str, message: str) -> None:
    done = helm("template", "release", CHART, "--set", setting)
    assert done.returncode != 0
    assert message in done.stderr


def test_an_old_cluster_is_refused() -> None:
    done = helm("template", "release", CHART, "--kube-version", "1.30.9")
    assert done.returncode != 0
    assert "1.31" in done.stderr


# ------------------------------------------------------------------------------------------------ parts


def test_the_type_is_the_generated_one_and_survives_an_uninstall(repository: Path) -> None:
    (crd,) = render("--set", "crds.install=true", "--show-only", "templates/crd.yaml")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == yaml.safe_load((repository / "crds" / "opd.dev_opddistillations.yaml").read_text())


def test_a_namespaced_install_needs_no_cluster_rights() -> None:
    documents = with_values("namespaced")
    assert not {document["kind"] for document in documents} & CLUSTER_SCOPED
    assert {role["metadata"]["namespace"] for role in of_kind(documents, "Role")} == {
        "opd-system",
        "production",
        "research",
    }
    assert {"--watch-namespace=production", "--watch-namespace=research"} <= set(arguments(documents))


def test_people_have_the_same_rights_in_both_kinds_of_install() -> None:
    def rules(documents: Documents, kind: str, suffix: str) -> list[Any]:
        return [role["rules"] for role in of_kind(documents, kind) if role["metadata"]["name"].endswith(suffix)]

    for suffix in ("-view", "-edit"):
        (everywhere,) = rules(render(), "ClusterRole", suffix)
        assert rules(with_values("namespaced"), "Role", suffix) == [everywhere, everywhere]


def test_no_rule_reads_secrets_or_has_a_wildcard() -> None:
    for role in [*of_kind(with_values("namespaced"), "Role"), *of_kind(render(), "ClusterRole")]:
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            assert "secrets" not in rule["resources"]


def test_pull_secrets_reach_the_operator_its_test_and_the_pods_of_distillations() -> None:
    documents = render("--set", "images.pullSecrets[0].name=one,images.pullSecrets[1].name=two")
    assert operator_pod(documents)["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert of_kind(documents, "Pod")[0]["spec"]["imagePullSecrets"] == [{"name": "one"}, {"name": "two"}]
    assert {"--pull-secret=one", "--pull-secret=two"} <= set(arguments(documents))


def test_a_digest_stands_in_place_of_the_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    documents = render(
        *("--set", f"images.trainer=team/trainer@{digest}"),
        *("--set", "images.tag=2.0,images.registry=registry.example.com/"),
    )
    assert operator_pod(documents)["containers"][0]["image"] == "registry.example.com/diffusion-opd/operator:2.0"
    assert f"--trainer-image=registry.example.com/team/trainer@{digest}" in arguments(documents)
    assert "--endpoint-image=registry.example.com/diffusion-opd/endpoint:2.0" in arguments(documents)


def test_common_labels_are_on_everything_and_select_nothing() -> None:
    plain = render("--set", "replicas=2")
    labelled = render("--set", "replicas=2", "--set", "commonLabels.team=ml", "--set", "commonLabels.helm\\.sh/chart=x")
    for before, after in zip(plain, labelled, strict=True):
        assert after["metadata"]["labels"] == {**before["metadata"]["labels"], "team": "ml"}
        for kind in ("selector", "podSelector"):
            assert before.get("spec", {}).get(kind) == after.get("spec", {}).get(kind)


def test_a_spread_without_a_selector_counts_the_operators_pods() -> None:
    spread = [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
        {
            "maxSkew": 2,
            "topologyKey": "rack",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": {"matchLabels": {}},
        },
    ]
    documents = render("--set-json", f"topologySpreadConstraints={json.dumps(spread)}")
    (deployment,) = of_kind(documents, "Deployment")
    ours, theirs = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert ours == {**spread[0], "labelSelector": deployment["spec"]["selector"]}
    assert theirs == spread[1]


def test_the_network_policy_is_about_the_operator_alone() -> None:
    """Nobody else's pods may come under it: not the test's, which has to reach the operator."""
    documents = with_values("namespaced")
    (policy,) = of_kind(documents, "NetworkPolicy")
    selector = policy["spec"]["podSelector"]["matchLabels"]
    (deployment,), (test,) = of_kind(documents, "Deployment"), of_kind(documents, "Pod")
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert not selector.items() <= test["metadata"]["labels"].items()
    (pods,) = [rule for rule in policy["spec"]["egress"] if "to" in rule]
    (namespaces,) = pods["to"][0]["namespaceSelector"]["matchExpressions"]
    assert namespaces["values"] == ["production", "research"]


def test_what_is_decided_about_distillations_reaches_the_operator() -> None:
    rules = [{"ports": [{"port": 9000, "protocol": "TCP"}]}, {"to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}]}]
    plain = settings_of(parser().parse_args(arguments(render())))
    assert (plain.fixed_user, plain.network_policies, plain.extra_egress) == (True, True, ())
    documents = render(
        *("--set-json", f"networkPolicy.distillations.extraEgress={json.dumps(rules)}"),
        *(
            "--set",
            "networkPolicy.distillations.enabled=false,fixedUser=false,resyncSeconds=60,extraArgs={--workers=3}",
        ),
    )
    changed = settings_of(parser().parse_args(arguments(documents)))
    assert (changed.fixed_user, changed.network_policies, list(changed.extra_egress)) == (False, False, rules)
    assert (changed.resync_seconds, changed.workers) == (60, 3)


def test_a_cluster_may_give_pods_their_user() -> None:
    documents = render("--set", "fixedUser=false")
    assert "65532" not in json.dumps(documents)
    for pod in (operator_pod(documents), of_kind(documents, "Pod")[0]["spec"]):
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_security_contexts_are_laid_over_what_restricted_asks_for() -> None:
    documents = render(*("--set", "podSecurityContext.runAsUser=1000,podSecurityContext.fsGroup=7"),
                       *("--set", "securityContext.privileged=false"))  # fmt: skip
    pod = operator_pod(documents)
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (1000, 7)
    assert pod["securityContext"]["runAsNonRoot"] is True
    context = pod["containers"][0]["securityContext"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["privileged"] is False


def test_certificates_of_a_proxy_can_be_mounted() -> None:
    documents = render(
        *("--set", "extraVolumes[0].name=ca,extraVolumes[0].configMap.name=corporate-ca"),
        *("--set", "extraVolumeMounts[0].name=ca,extraVolumeMounts[0].mountPath=/etc/ssl/corporate"),
        *("--set", "podLabels.team=ml"),
    )
    pod = operator_pod(documents)
    assert {"name": "ca", "configMap": {"name": "corporate-ca"}} in pod["volumes"]
    assert {"name": "ca", "mountPath": "/etc/ssl/corporate"} in pod["containers"][0]["volumeMounts"]
    (deployment,) = of_kind(documents, "Deployment")
    assert deployment["spec"]["template"]["metadata"]["labels"]["team"] == "ml"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ("nameOverride=", "release-diffusion-opd"),
        ("nameOverride=opd", "release-opd"),
        ("nameOverride=release", "release"),
        ("fullnameOverride=distiller", "distiller"),
    ],
)
def test_names_can_be_chosen(values: str, name: str) -> None:
    documents = render("--set", values)
    (deployment,) = of_kind(documents, "Deployment")
    assert deployment["metadata"]["name"] == name
    assert f"--lease-name={name}" in arguments(documents)
    assert all(document["metadata"]["name"].startswith(name) for document in documents)


def test_its_metrics_can_be_closed_to_all_but_the_scrapers() -> None:
    """Those of all namespaces are behind that port."""
    peer = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    documents = render("--set-json", f"networkPolicy.scrapers={json.dumps([peer])}")
    (policy,), (test,) = of_kind(documents, "NetworkPolicy"), of_kind(documents, "Pod")
    metrics, probes = policy["spec"]["ingress"]
    ours, theirs = metrics["from"]
    assert theirs == peer
    assert ours["podSelector"]["matchLabels"].items() <= test["metadata"]["labels"].items()
    assert [port["port"] for port in metrics["ports"]] == [8080]
    assert probes == {"ports": [{"protocol": "TCP", "port": 8081}]}


# ------------------------------------------------------------------------------------------------ helm test


@pytest.fixture
def served() -> Iterator[tuple[Metrics, str]]:
    """An operator's metrics, and where they are."""
    metrics = Metrics(Cache(), WorkQueue())
    server, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    yield metrics, f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def ask(url: str, seconds: float) -> "subprocess.CompletedProcess[str]":
    """The program of the test's pod."""
    (pod,) = of_kind(render(), "Pod")
    program = pod["spec"]["containers"][0]["args"][0]
    command = [sys.executable, "-c", program, url, str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_helm_test_passes_where_the_leader_has_read_the_distillations(served: tuple[Metrics, str]) -> None:
    metrics, url = served
    metrics.leader.set(1)
    metrics.api.called("GET", "opddistillations", "200", 0.1)
    done = ask(url, 60)
    assert done.returncode == 0, done.stderr
    assert "opd_build_info" in done.stdout


@pytest.mark.parametrize(
    ("leads", "code", "missing"), [(0, "200", "no leader"), (1, "403", "has not read the distillations")]
)
def test_helm_test_says_what_is_missing(served: tuple[Metrics, str], leads: int, code: str, missing: str) -> None:
    metrics, url = served
    metrics.leader.set(leads)
    metrics.api.called("GET", "opddistillations", code, 0.1)
    done = ask(url, 0.5)
    assert done.returncode == 1
    assert missing in done.stderr


def test_helm_test_fails_where_nobody_listens(free_port: Callable[[], int]) -> None:
    done = ask(f"http://127.0.0.1:{free_port()}/metrics", 0.5)
    assert done.returncode == 1
    assert "does not answer" in done.stderr


# ------------------------------------------------------------------------------------------------ a real API server


@pytest.mark.parametrize("name", ["ha", "namespaced"])
def test_the_api_server_takes_every_object(name: str, control_plane: ControlPlane) -> None:
    namespaces = {"opd-system", "production", "research"}
    present = set(control_plane.kubectl("get", "namespaces", "-o", "jsonpath={.items[*].metadata.name}").split())
    for namespace in namespaces - present:
        control_plane.kubectl("create", "namespace", namespace)
    manifest = yaml.safe_dump_all(with_values(name), sort_keys=False)
    control_plane.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", stdin=manifest)


def test_an_upgrade_keeps_what_was_chosen_and_takes_what_is_new(
    control_plane: ControlPlane, repository: Path, tmp_path: Path
) -> None:
    """As docs/upgrade.md says it: --reuse-values would take the old chart's defaults (https://github.com/helm/helm/issues/9000)."""
    old = shutil.copytree(CHART, tmp_path / "old")
    for file, new in (("values.yaml", r"^resyncSeconds:.*\n"), ("templates/operator.yaml", r"^ +- --resync.*\n")):
        text = (old / file).read_text()
        (old / file).write_text(re.sub(new, "", text, flags=re.M))
        assert (old / file).read_text() != text
    (documented,) = re.findall(r"^    helm (upgrade .*)$", (repository / "docs" / "upgrade.md").read_text(), re.M)
    place = ("--kubeconfig", control_plane.kubeconfig)
    chosen = ("--set", "crds.install=false,workers=3", "--namespace", "upgraded", "--create-namespace")
    done = helm("install", "diffusion-opd", old, *place, *chosen)
    assert done.returncode == 0, done.stderr
    command = documented.replace("opd-system", "upgraded").replace(" --wait", "").split()
    done = helm(*(str(repository / word) if word.startswith("charts/") else word for word in command), *place)
    assert done.returncode == 0, done.stderr
    found = json.loads(control_plane.kubectl("get", "-n", "upgraded", "deployment/diffusion-opd", "-o", "json"))
    flags = found["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--workers=3", "--resync-seconds=300"} <= set(flags)

    # What somebody set by hand meanwhile is a conflict (https://github.com/helm/helm/issues/31516).
    control_plane.kubectl("-n", "upgraded", "scale", "deployment/diffusion-opd", "--replicas=2")
    command = [str(repository / word) if word.startswith("charts/") else word for word in command]
    done = helm(*command, *place)
    assert done.returncode
    assert 'conflict with "kubectl"' in done.stderr
    assert ".spec.replicas" in done.stderr
    done = helm(*command, *place, "--force-conflicts")
    assert done.returncode == 0, done.stderr
    found = control_plane.kubectl(
        "get", "-n", "upgraded", "deployment/diffusion-opd", "-o", "jsonpath={.spec.replicas}"
    )
    assert found == "1"


def test_the_api_server_keeps_the_type_as_the_chart_has_it(control_plane: ControlPlane) -> None:
    """Nothing is added, or tools that compare the two would say for ever that they differ."""
    (rendered,) = render("--set", "crds.install=true", "--show-only", "templates/crd.yaml")
    stored = json.loads(control_plane.kubectl("get", "crd", rendered["metadata"]["name"], "-o", "json"))
    assert stored["spec"] == {"conversion": {"strategy": "None"}, **rendered["spec"]}
