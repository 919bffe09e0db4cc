"""Random lives end in the right state with nothing leaked. OPD_FATES=10000 plays as many of them on paper, and
OPD_LIVE_FATES=200 as many on the real API server."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from devcluster.control_plane import ControlPlane

from tests.operator.fates import Fate
from tests.operator.live import Api, Operator
from tests.operator.live_fates import PRELUDE, LiveFate, SharedOperator

_CHUNK = 25
_FATES = int(os.environ.get("OPD_FATES", "100"))
_AT_ONCE = 5
_LIVE_FATES = int(os.environ.get("OPD_LIVE_FATES", "3"))


@pytest.mark.parametrize("first", range(0, _FATES, _CHUNK))
def test_whatever_happens_it_ends_where_its_spec_says(first: int):
    for seed in range(first, first + _CHUNK):
        Fate(seed).run(events=20)


@contextmanager
def namespaces(cluster: ControlPlane, seeds: range) -> Iterator[list[Api]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Api(cluster, f"fate-{seed}").lasting()) for seed in seeds]


@pytest.mark.parametrize("first", range(0, _LIVE_FATES, _AT_ONCE))
def test_so_it_does_on_the_real_api_server(
    first: int, control_plane: ControlPlane, start: Callable[..., Operator]
) -> None:
    seeds = range(first, min(first + _AT_ONCE, _LIVE_FATES))
    with namespaces(control_plane, seeds) as apis, ThreadPoolExecutor(len(seeds)) as pool:
        watch = [f"--watch-namespace={api.namespace}" for api in apis[1:]]
        operator = SharedOperator(start(apis[0], "--no-leader-election", *watch, prelude=PRELUDE).ready())
        lives = [LiveFate(seed, api, operator) for seed, api in zip(seeds, apis, strict=True)]
        done = [pool.submit(life.run, 12) for life in lives]
        if errors := [error for each in done if (error := each.exception())]:
            raise BaseExceptionGroup("some lives failed, the others perhaps because of one", errors)
