"""Imports without garbage collections."""

import gc

import pytest
from opd_core.imports import without_collection


@pytest.fixture(autouse=True)
def thaw():
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_importing_and_nothing_of_it_later():
    with without_collection():
        assert not gc.isenabled()
        imported = [[number] for number in range(10_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(imported)


def test_an_import_that_fails_leaves_collections_on():
    with pytest.raises(ImportError), without_collection():
        import no_such_library  # noqa: F401
    assert gc.isenabled()
