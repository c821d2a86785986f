"""Python's search for garbage rests while graphs are traced and planned.

Their nodes refer to one another, so millions of objects would be looked through again and again,
and hardly any of them is garbage.  Where many were made, they are old when the search goes on: only
the next search of everything looks through them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# New objects that are worth counting those that the user has frozen, which Python does one by one.
_MANY = 200_000


@contextmanager
def no_collections() -> Iterator[None]:
    """Inside, nobody looks for garbage; also a decorator of functions."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Thawing is of all: objects that the user has frozen must not be among them.
        if gc.get_count()[0] > _MANY and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        gc.enable()
