"""How long ranks take to exchange bytes: the alpha-beta model over a mesh.

A message takes a latency (alpha) and its bytes by the bandwidth of the slowest link that it crosses
(beta).  Ranks fill nodes one after the other, the last dimension of the mesh first, so a dimension
lies within nodes or across them:

    mesh pp 2, dp 16, nodes of 8      dp: 2 nodes, 8 ranks in each      pp: 2 nodes, 1 in each

Collectives go round a ring (Thakur et al., IJHPCA 2005): of n ranks on m nodes n - m hops stay
within a node and m - 1 leave one, and each rank receives (n - 1) / n of the whole.  A node sends by
the adapters of all its ranks in the ring.  An all-reduce may go along a tree of nodes instead, with
fewer hops.  That is how NCCL chooses, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxzero.hardware import Hardware, Link


@dataclass(frozen=True)
class Route:
    """What the ranks along a dimension of the mesh exchange bytes over.

    Attributes:
        ranks: how many they are.
        together: how many of them are in a node.
        startup: seconds of any collective.
        near: between ranks of a node.
        far: between nodes, for each rank.
    """

    ranks: int
    together: int
    startup: float
    near: Link
    far: Link

    @property
    def nodes(self) -> int:
        """On how many nodes they are."""
        return -(-self.ranks // self.together)

    @property
    def bandwidth(self) -> float:
        """Bytes a second round the ring."""
        if self.nodes == 1:
            return self.near.bandwidth
        leaving = self.together * self.far.bandwidth
        return leaving if self.together == 1 else min(self.near.bandwidth, leaving)

    @property
    def latency(self) -> float:
        """Seconds of a gather or reduce-scatter of nothing."""
        hops, leaving = self.ranks - self.nodes, self.nodes - 1
        return self.startup + hops * self.near.latency + leaving * self.far.latency

    def gather(self, size: float) -> float:
        """Seconds of an all-gather that makes ``size`` bytes, or a reduce-scatter of as many."""
        return self.latency + size * (self.ranks - 1) / self.ranks / self.bandwidth

    def all_reduce(self, size: float) -> float:
        """Seconds to add up ``size`` bytes of each rank: around the ring twice, or a tree."""
        ring = 2 * self.gather(size) - self.startup
        levels = math.ceil(math.log2(self.nodes))
        hops = (self.together - 1) * self.near.latency + levels * self.far.latency
        return min(ring, self.startup + 2 * hops + 2 * size / self.bandwidth)

    def all_to_all(self, size: float) -> float:
        """Seconds in which each rank sends ``size`` bytes, an equal part to each rank."""
        inside = size * (self.together - 1) / self.ranks / self.near.bandwidth
        outside = size * (self.ranks - self.together) / self.ranks / self.far.bandwidth
        return self.latency + max(inside, outside)

    def send(self, size: float) -> float:
        """Seconds of a message from a rank to the next one, over the slowest link among them."""
        link = self.near if self.nodes == 1 else self.far
        return self.startup + link.latency + size / link.bandwidth


def route(hardware: Hardware, mesh: Mapping[str, int], along: str, ranks: int = 1) -> Route:
    """The route along a dimension of a mesh.

    Args:
        mesh: ranks by dimension; neighbours along the last one are neighbours in a node.
        ranks: along a dimension that is not in the mesh; they are taken to be neighbours.
    """
    names = list(mesh)
    apart = 1
    if along in mesh:
        ranks = mesh[along]
        apart = math.prod(mesh[name] for name in names[names.index(along) + 1 :])
    together = min(ranks, max(hardware.devices // apart, 1))
    share = hardware.achieved.links
    near, far = (
        Link(link.bandwidth * share, link.latency) for link in (hardware.node, hardware.network)
    )
    return Route(ranks, together, hardware.startup, near, far)
