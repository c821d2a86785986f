"""Memory that no kernel may leave: pages on both sides of it can be neither read nor written.

A kernel in Triton's interpreter that goes a byte too far kills its process with SIGSEGV, so it runs
in a child:

    def run() -> None:
        for x, out in at_both_ends(x, out):
            kernel[(1,)](x, out, ...)
    assert exit_code(run) == 0
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import multiprocessing
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_NO_ACCESS = 0  # PROT_NONE, which Python's mmap has no name for
_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(values: Tensor, *, at_start: bool = False) -> Tensor:
    """A copy whose last byte, or the first, lies beside a page that cannot be touched."""
    pages = -(-values.nbytes // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    offset = _PAGE if at_start else (pages + 1) * _PAGE - values.nbytes
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    copy.copy_(values.flatten())
    first = copy.data_ptr() - offset
    for page in (first, first + (pages + 1) * _PAGE):
        failed = _LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(_PAGE), _NO_ACCESS)
        assert not failed, ctypes.get_errno()
    return copy.view(values.shape)


def at_both_ends(*values: Tensor) -> Iterator[list[Tensor]]:
    """All tensors once with nothing behind them, once with nothing before them."""
    for at_start in (False, True):
        yield [guarded(tensor, at_start=at_start) for tensor in values]


def exit_code(function: Callable[[], None]) -> int | None:
    """How a child process that runs a function ends: 0, or -11 where it left its memory."""
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(function,))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode


def _quietly(function: Callable[[], None]) -> None:
    faulthandler.disable()  # pytest's would print every thread of a child that is meant to die
    function()
