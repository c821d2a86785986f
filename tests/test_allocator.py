"""What a caching allocator keeps of a device while less is alive."""

from __future__ import annotations

import random

from fxzero.allocator import Pool, reserved_bytes
from fxzero.timeline import Alive

MIB = 2**20


def entry(size: int, first: int, last: int | None, **given: bool) -> Alive:
    return Alive(size * MIB, "temporary", "value", None, first, last, **given)


def test_what_is_freed_is_taken_again() -> None:
    assert reserved_bytes([entry(8, 0, 0), entry(8, 1, 1)]) == {"": 8 * MIB}


def test_free_pieces_side_by_side_are_one() -> None:
    allocations = [entry(4, 0, 1), entry(4, 1, 1), entry(8, 2, 2)]
    assert reserved_bytes(allocations) == {"": 8 * MIB}


def test_a_free_piece_that_is_too_small_is_kept_besides() -> None:
    logits, wide, loss, gradients = (
        entry(4, 0, 1),
        entry(8, 1, 2),
        entry(8, 2, 4),
        [entry(8, 3, 4), entry(8, 4, 4)],
    )
    allocations = [logits, wide, loss, *gradients]
    assert reserved_bytes(allocations, steps=1) == {"": 28 * MIB}  # 24 are alive at most


def test_streams_do_not_share() -> None:
    allocations = [entry(8, 0, 0), entry(6, 1, 1)]
    pools = reserved_bytes(allocations, lambda e: "a" if e.bytes == 8 * MIB else "b")
    assert pools == {"a": 8 * MIB, "b": 6 * MIB}


def test_gradients_are_freed_before_the_next_step_and_parameters_stay() -> None:
    allocations = [entry(16, 0, None, fixed=True), entry(8, 0, None)]
    assert reserved_bytes(allocations, steps=3) == {"": 24 * MIB}


def test_values_of_less_than_a_page_are_left_out() -> None:
    assert reserved_bytes([Alive(MIB // 2, "temporary", "small", None, 0, 0)]) == {}


def test_no_two_pieces_of_a_pool_overlap() -> None:
    drawn, pool = random.Random(3), Pool()
    taken: dict[int, int] = {}
    for _ in range(3000):
        if taken and drawn.random() < 0.5:
            start = drawn.choice(sorted(taken))
            pool.give(start, taken.pop(start))
        else:
            size = drawn.randint(1, 40)
            start = pool.take(size)
            assert start + size <= pool.end
            assert all(start + size <= at or at + held <= start for at, held in taken.items())
            taken[start] = size
    for start in sorted(taken):
        pool.give(start, taken[start])
    assert pool.take(pool.end) == 0
