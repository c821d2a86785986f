"""Python's search for garbage rests while graphs are traced and planned.

Their nodes refer to one another, so millions of objects would be looked through again and again,
and hardly any of them is garbage.  What was made then is old when the search goes on: only the next
search of everything looks through it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
        if not gc.get_freeze_count():  # else the user's own frozen objects would thaw
            gc.freeze()
            gc.unfreeze()
        gc.enable()
