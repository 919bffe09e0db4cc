"""Random lives end in the right state with nothing leaked. OPD_FATES=10000 plays as many of them."""

import os

import pytest

from tests.operator.fates import Fate

_CHUNK = 25
_FATES = int(os.environ.get("OPD_FATES", "100"))


@pytest.mark.parametrize("first", range(0, _FATES, _CHUNK))
def test_whatever_happens_it_ends_where_its_spec_says(first: int):
    for seed in range(first, first + _CHUNK):
        Fate(seed).run(events=20)
