"""What the person who installs the operator decides about every distillation's pods and policies."""

import json
from dataclasses import replace
from typing import Any

import pytest
from opd_core.api.load import check_spec
from opd_core.roles import HUB_REWARDS
from opd_operator import names
from opd_operator.__main__ import parser, settings_of
from opd_operator.build import build
from opd_operator.draft import Served, Wanted
from opd_operator.settings import Settings

from tests.operator.world import REPOSITORY, SETTINGS, example

ROLES = {names.TEACH, names.TEACHERS, names.TRAINER, names.EVALUATOR, names.ENDPOINT}


def children(settings: Settings = SETTINGS, **changes: Any) -> list[dict[str, Any]]:
    """Everything of a distillation at once."""
    obj = example(**changes)
    run = {"key": "k", "attempt": 1, "images": dict(SETTINGS.images)}
    own = json.dumps(obj["spec"]["endpoint"])
    served = [Served("r", "sha256:" + "a" * 64, "k", "endpoint:1", settings=own, replicas=1, weight=100)]
    wanted = Wanted(teach={0: 0}, teachers=True, trainer=1, evaluator=("e", 1), served=served)
    obj_of_user = {key: obj[key] for key in ("apiVersion", "kind", "metadata", "spec")}
    return build(obj, check_spec(obj_of_user), run, wanted, settings)


def policies(settings: Settings = SETTINGS, **changes: Any) -> dict[str, dict[str, Any]]:
    """Role -> the policy of its pods."""
    found = [child for child in children(settings, **changes) if child["kind"] == "NetworkPolicy"]
    return {policy["metadata"]["labels"][names.ROLE]: policy["spec"] for policy in found}


def open_to_everywhere(policy: dict[str, Any]) -> set[int]:
    """TCP ports that pods may connect to at any address."""
    rules = [rule for rule in policy["egress"] if "to" not in rule]
    return {port["port"] for rule in rules for port in rule["ports"] if port["protocol"] == "TCP"}


def pods(settings: Settings) -> list[dict[str, Any]]:
    templates = [child["spec"]["template"] for child in children(settings) if child["kind"] in ("Deployment", "Job")]
    return [template["spec"] for template in templates]


# ------------------------------------------------------------------------------------------------ the network


def test_names_can_be_looked_up_where_dns_listens_on_53_or_5353() -> None:
    found = policies()
    assert set(found) == ROLES
    assert all(open_to_everywhere(policy) == {53, 5353} for policy in found.values())


@pytest.mark.parametrize("uri", ["hf://a/b@c", "s3://bucket/base"])
def test_where_something_comes_from_outside_every_role_may_fetch_it(uri: str) -> None:
    assert all(443 in open_to_everywhere(policy) for policy in policies(model__uri=uri).values())


def test_a_variable_that_looks_like_a_uri_opens_nothing() -> None:
    variables = [{"name": "NOTE", "value": "hf://a/b@c"}]
    assert all(443 not in open_to_everywhere(policy) for policy in policies(training__pod={"env": variables}).values())


@pytest.mark.parametrize(
    ("every", "fetches"),
    [(None, {names.TEACH, names.EVALUATOR}), (10, {names.TEACH, names.EVALUATOR, names.TRAINER})],
)
def test_who_computes_a_reward_of_ours_may_fetch_its_weights(every: int | None, fetches: set[str]) -> None:
    teachers = example()["spec"]["teachers"]
    teachers[0]["rewards"] = ["pickscore"]
    evaluation = {"promptsPerTask": 4, **({"everyRounds": every} if every else {})}
    found = policies(teachers=teachers, evaluation=evaluation)
    assert {role for role, policy in found.items() if 443 in open_to_everywhere(policy)} == fetches


def test_who_asks_reward_servers_may_reach_their_ports_and_nobody_else() -> None:
    """The trainer, too, which asks them before its first round; a reward that they compute fetches no weights here."""
    teachers = example()["spec"]["teachers"]
    teachers[0]["rewards"] = ["pickscore"]

    def opened(*urls: str) -> dict[str, set[int]]:
        servers = [{"reward": "pickscore", "urls": list(urls)}]
        found = policies(teachers=teachers, evaluation={"promptsPerTask": 4}, rewardServers=servers)
        return {role: open_to_everywhere(policy) - {53, 5353} for role, policy in found.items()}

    asking = (names.TEACH, names.TRAINER, names.EVALUATOR)
    others = {role: set[int]() for role in ROLES.difference(asking)}
    assert opened("http://a:8500") == others | {role: {8500} for role in asking}
    several = opened("http://a:8500", "http://b", "https://c.example.com/pick")
    assert several == others | {role: {80, 443, 8500} for role in asking}


def test_teacher_servers_do_not_notice_another_reward_server() -> None:
    def of_teachers(url: str) -> list[dict[str, Any]]:
        servers = [{"reward": "tiny-ocr", "urls": [url]}]
        found = children(rewardServers=servers)
        return [child for child in found if child["metadata"]["labels"][names.ROLE] == names.TEACHERS]

    assert of_teachers("http://a") == of_teachers("http://b")


def test_the_rewards_with_weights_on_a_hub_are_ours_but_ocr() -> None:
    """Whose recognition network comes with its package."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(project["entry-points"]["diffusion_opd.rewards"]) - {"ocr"} == HUB_REWARDS


def test_rules_of_the_installation_are_in_every_policy() -> None:
    rules = [{"ports": [{"protocol": "TCP", "port": 9000}]}, {"to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}]}]
    settings = settings_of(parser().parse_args(["--extra-egress", json.dumps(rules)]))
    for policy in policies(replace(SETTINGS, extra_egress=settings.extra_egress)).values():
        assert all(rule in policy["egress"] for rule in rules)


@pytest.mark.parametrize("text", ["{}", "[1]", "ports"])
def test_what_is_no_list_of_rules_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--extra-egress", text])
    assert "--extra-egress" in capsys.readouterr().err


def test_without_policies_there_are_none() -> None:
    settings = settings_of(parser().parse_args(["--no-network-policies"]))
    assert policies(replace(SETTINGS, network_policies=settings.network_policies)) == {}
    assert len(children(SETTINGS)) - len(children(replace(SETTINGS, network_policies=False))) == len(ROLES)


# ------------------------------------------------------------------------------------------------ the user


def test_pods_run_as_the_user_of_the_images() -> None:
    for pod in pods(SETTINGS):
        assert {pod["securityContext"][key] for key in ("runAsUser", "runAsGroup", "fsGroup")} == {65532}


def test_or_as_whom_the_cluster_gives_them() -> None:
    """As OpenShift's restricted-v2 wants it (https://github.com/goharbor/harbor-helm/issues/874)."""
    settings = settings_of(parser().parse_args(["--no-fixed-user"]))
    text = json.dumps(pods(replace(SETTINGS, fixed_user=settings.fixed_user)))
    assert "runAsUser" not in text
    assert "runAsGroup" not in text
    assert 'fsGroup"' not in text
    assert text.count('"runAsNonRoot": true') == len(ROLES)


# ------------------------------------------------------------------------------------- clusters of either family


def test_pods_listen_on_whatever_family_the_cluster_has() -> None:
    commands = [container["command"] for pod in pods(SETTINGS) for container in pod["containers"]]
    hosts = [word for command in commands for word in command if word.startswith(("--host", "--metrics-host"))]
    # The evaluator listens nowhere.
    assert sorted(hosts) == ["--host=::", "--host=::", "--metrics-host=::", "--metrics-host=::"]


def test_policies_name_no_addresses_so_that_they_are_for_either_family() -> None:
    assert "ipBlock" not in json.dumps(policies())


def test_the_clients_of_a_student_may_be_of_either_family() -> None:
    services = {child["metadata"]["name"]: child["spec"] for child in children() if child["kind"] == "Service"}
    wishes = {name: spec["ipFamilyPolicy"] for name, spec in services.items() if "ipFamilyPolicy" in spec}
    assert wishes == {"tiny-endpoint": "PreferDualStack"}
    assert not any("ipFamilies" in spec for spec in services.values())
