"""The Python client as a notebook uses it."""

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from opd_cli.cluster import Distillations, NotFoundError, SpecError
from opd_core.api.load import load_spec
from opd_core.stages import Condition

from tests.cli.conftest import NAME, make_pod, say
from tests.cli.kubelet import Kubelet
from tests.cli.test_status import READY, TRAINING, watchers
from tests.operator.live import Api, wait_for


def test_the_code_of_the_page_runs(
    api: Api, node: tuple[str, Kubelet], repository: Path, example: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = (repository / "docs" / "cluster-cli.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    content = yaml.safe_load(api.cluster.kubeconfig.read_text())
    content["contexts"][0]["context"]["namespace"] = api.namespace
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(content))
    (tmp_path / "distill.yaml").write_text(example.read_text())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.chdir(tmp_path)
    make_pod(api, "an-endpoint", "endpoint", node[0], owner=NAME)
    node[1].prints("an-endpoint", "200 POST /v1/images/generations\n", None)

    def operate() -> None:
        watchers(api)
        say(api, NAME, **TRAINING)
        say(api, NAME, **READY)

    operator = threading.Thread(target=operate)
    operator.start()
    exec(code, {})
    operator.join()
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"{NAME} created", "Training 256/500"]
    assert printed[-3:] == [
        "ocr tiny-ocr 0.87 0.9459",
        "geneval tiny-geneval 0.49 None",
        "an-endpoint 200 POST /v1/images/generations",
    ]
    assert api.get(NAME)["spec"]["suspend"] is True


def test_a_spec_may_be_a_file_its_content_or_an_object(cluster: Distillations, example: Path) -> None:
    content = yaml.safe_load(example.read_text())
    assert [cluster.submit(spec).change for spec in (example, str(example), content, load_spec(example))] == [
        "created", "unchanged", "unchanged", "unchanged",
    ]  # fmt: skip
    with pytest.raises(SpecError) as refused:
        cluster.submit({**content, "spec": {**content["spec"], "teachers": []}})
    assert refused.value.problems[0].path == "spec.teachers"


def test_objects_and_their_names(cluster: Distillations, api: Api) -> None:
    for name in ("one", "two"):
        api.submit(name)
    assert {each.name for each in cluster.list()} == {"one", "two"}
    assert {("one", api.namespace), ("two", api.namespace)} <= {
        (each.name, each.namespace) for each in cluster.list(all_namespaces=True)
    }
    assert cluster.get("one").condition(Condition.READY) is None
    with pytest.raises(NotFoundError, match="did you mean"):
        cluster.get("thre")


def test_watching_ends_by_itself_after_its_time_or_when_it_is_left(cluster: Distillations, api: Api) -> None:
    api.submit()
    assert [state.name for state in cluster.watch("tiny", timeout=0.5)] == ["tiny"]
    states = cluster.watch("tiny")
    next(states)
    say(api, **TRAINING)
    assert next(states).status.phase == "Training"
    states.close()
    say(api, **TRAINING, startTime="2026-01-01T00:00:00Z")
    say(api, **READY)
    phases = [state.status.phase for state in itertools.islice(cluster.watch("tiny"), 10)]
    assert phases == ["Ready"], "a finished object has no more to say"


def test_a_thread_or_connection_is_kept_by_nothing(
    cluster: Distillations, api: Api, node: tuple[str, Kubelet], free_port: Callable[[], int]
) -> None:
    api.submit()
    make_pod(api, "p", "teachers", node[0])
    before = threading.active_count()
    lines = cluster.logs("tiny", "teachers", follow=True)
    node[1].prints("p", "a line\n")
    assert next(lines).text == "a line"
    lines.close()
    wait_for(lambda: not [each for each in threading.enumerate() if each.name == "log of p"])
    node[1].prints("p", None)
    wait_for(lambda: threading.active_count() <= before)
