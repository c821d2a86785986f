"""Where kernels over memory that all ranks see are chosen, and how that memory is laid out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fxzero import _torch, symmetric
from fxzero.kernels import peers

_CUDA, _CPU = torch.device("cuda", 0), torch.device("cpu")
_LAYOUT = [(48, torch.float32), (16, torch.bfloat16), (4096, torch.bfloat16)]


def test_small_buffers_on_cuda_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "has_symmetric_memory", lambda: True)
    assert symmetric.pays(symmetric.LARGEST_BYTES, _CUDA)
    assert not symmetric.pays(symmetric.LARGEST_BYTES + 1, _CUDA)
    assert not symmetric.pays(1, _CPU)
    monkeypatch.setattr(_torch, "has_symmetric_memory", lambda: False)
    assert not symmetric.pays(1, _CUDA)


def test_without_cuda_nothing_is_connected() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert symmetric.connect(dist.group.WORLD, _CPU, _LAYOUT) is None
    finally:
        dist.destroy_process_group()


def test_buffers_lie_behind_the_pads_and_beside_each_other() -> None:
    for ranks in (1, 3, 8):
        size = peers.bytes_of(_LAYOUT, ranks)
        memory = [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
        found = peers.Peers.of(ranks - 1, memory, 4)
        assert found.table.tolist() == [other.data_ptr() for other in memory]
        buffers = found.buffers(_LAYOUT)
        assert [(len(b), b.dtype) for b in buffers] == _LAYOUT
        places = [found.place(b) for b in buffers]
        assert places[0] >= 4 * peers.PROGRAMS * ranks
        assert all(place % 128 == 0 for place in places)
        ends = [place + b.nbytes for place, b in zip(places, buffers, strict=True)]
        assert all(end <= start for end, start in zip(ends, [*places[1:], size], strict=True))


def test_a_buffer_that_others_cannot_see_is_refused() -> None:
    memory = torch.zeros(peers.bytes_of(_LAYOUT, 1), dtype=torch.uint8)
    found = peers.Peers.of(0, [memory], 4)
    for buffer in (torch.zeros(16), memory[: 4 * peers.PROGRAMS]):
        with pytest.raises(AssertionError, match="cannot see"):
            found.place(buffer)
