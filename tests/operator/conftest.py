"""The operator as a process against the real API server, one namespace a test."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from devcluster.control_plane import ControlPlane

from tests.operator.live import Api, Operator

_numbers = itertools.count()


@pytest.fixture
def api(control_plane: ControlPlane) -> Iterator[Api]:
    with Api(control_plane, f"live-{next(_numbers)}").lasting() as made:
        yield made


@pytest.fixture
def second_api(control_plane: ControlPlane) -> Iterator[Api]:
    with Api(control_plane, f"live-{next(_numbers)}").lasting() as made:
        yield made


@pytest.fixture
def start(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Operator]]:
    """Start an operator for the namespace of an Api; killed at the end of the test."""
    started: list[Operator] = []

    def begin(api: Api, *options: str, prelude: str = "") -> Operator:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        watch = f"--watch-namespace={api.namespace}"
        operator = Operator(api.cluster, folder, (free_port(), free_port()), watch, *options, prelude=prelude)
        started.append(operator)
        return operator.start()

    yield begin
    for operator in started:
        operator.kill()


@pytest.fixture
def operator(api: Api, start: Callable[..., Operator]) -> Operator:
    return start(api, "--no-leader-election").ready()
