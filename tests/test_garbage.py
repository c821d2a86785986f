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
