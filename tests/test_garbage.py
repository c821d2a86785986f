"""Python's search for garbage rests while graphs are traced and planned, and no longer."""

from __future__ import annotations

import gc

import pytest

from fxzero.garbage import no_collections


def test_nobody_looks_for_garbage_inside() -> None:
    assert gc.isenabled()
    with no_collections(), no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_many_objects_that_were_made_inside_are_old_behind_it() -> None:
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        with no_collections():
            made = [[index] for index in range(250_000)]
        old = {id(item) for item in gc.get_objects(generation=2)}
        assert all(id(item) in old for item in made)
    finally:
        if frozen:
            gc.freeze()


def test_what_the_user_froze_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with no_collections():
        made = [[index] for index in range(250_000)]
    assert made
    assert gc.get_freeze_count() == count


def test_the_search_goes_on_after_an_error() -> None:
    @no_collections()
    def fails() -> None:
        assert not gc.isenabled()
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    assert gc.isenabled()


def test_a_search_that_the_user_stopped_stays_stopped() -> None:
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
