"""Peaks in records of the profiler."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from fxzero.allocations import peak_of_allocations


def test_the_peak_of_a_memory_profile_is_that_of_its_allocations() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(3000, dtype=torch.uint8)
        third = torch.empty(500, dtype=torch.uint8)
        del second, third
    assert 3500 <= peak_of_allocations(record) < 3500 + 256


def test_what_operators_free_before_they_return_can_be_left_out_of_the_peak() -> None:
    image, kernel = torch.ones(1, 16, 32, 32), torch.ones(16, 16, 3, 3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        torch.nn.functional.conv2d(image, kernel)
    assert peak_of_allocations(record, inside_operators=False) < 16 * 30 * 30 * 4 + 256
