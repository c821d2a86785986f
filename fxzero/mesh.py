"""The ranks that train together, and how parameters and gradients are spread over them.

    mesh dimension    what it does
    "pp"              each rank has other stages of the model (a pipeline)
    "dp"              each rank has other data; parameters are sharded over it
    "dp_replicate"    each rank has other data and a copy of the same shards (hybrid sharding)
    "dp_shard"        "dp" where there is a "dp_replicate"

Graphs and plans name a dimension, never a process group: they are equal on all ranks, and are
made without any process running.  ``groups`` has the process groups' names for those who run them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fxzero import _torch
from fxzero.errors import UsageError, unknown_option
from fxzero.precision import Precision

STAGES = (0, 1, 2, 3, "auto")
_DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "dp")


@dataclass(frozen=True)
class Axis:
    """A dimension of the mesh: its name and how many ranks lie along it."""

    name: str
    size: int


@dataclass(frozen=True)
class Sharding:
    """How parameters and gradients are spread: data for plans and passes.

    Attributes:
        zero: the ZeRO stage; None: the solver chooses for each parameter between 2 and 3.
        shard: what parameters are cut over; None: they are whole on every rank.
        replicate: what gradients are averaged over besides.
        reduce_dtype: in what gradients are reduced, such as "float32"; None: as they are computed.
        send_weights, send_gradients: what gathers and reduce-scatters move, such as "int8"; None:
            the numbers themselves.
    """

    zero: int | None = None
    shard: Axis | None = None
    replicate: tuple[Axis, ...] = ()
    reduce_dtype: str | None = None
    send_weights: str | None = None
    send_gradients: str | None = None

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Everything that gradients are averaged over."""
        return (*((self.shard,) if self.shard else ()), *self.replicate)

    @property
    def gathers_once(self) -> bool:
        """Whether what is gathered is kept, so that micro-batches of a step may share it."""
        return self.shards > 1 and self.zero in (1, 2)

    @property
    def ranks(self) -> int:
        """How many ranks train together."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def shards(self) -> int:
        """Into how many parts a parameter is cut."""
        return self.shard.size if self.shard else 1


@dataclass(frozen=True)
class Mesh:
    """Ranks by dimension.

    Attributes:
        sizes: ranks along each dimension, by name, those of one rank left out.
        devices: the DeviceMesh whose processes run; None where nothing runs, in a planner.
    """

    sizes: Mapping[str, int]
    devices: Any = None

    def sharding(self, zero: int | None, precision: Precision | None = None) -> Sharding:
        """What a ZeRO stage (None: "auto") comes to on this mesh."""
        axes = {name: Axis(name, size) for name, size in self.sizes.items() if name != "pp"}
        asked = precision or Precision()
        dtype = None if asked.reduce is None else str(asked.reduce).removeprefix("torch.")
        shard = None
        if zero != 0:
            shard = axes.pop("dp_shard", None) or axes.pop("dp", None)
        others = tuple(axes.values())
        return Sharding(zero, shard, others, dtype, asked.send_weights, asked.send_gradients)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes.values())

    @property
    def data(self) -> Mesh:
        """The ranks that have the same stages as this one, and other data."""
        names = tuple(name for name in self.sizes if name != "pp")
        if len(names) == len(self.sizes) or self.devices is None:
            return Mesh({name: self.sizes[name] for name in names}, self.devices)
        if not names:
            return Mesh({})
        return Mesh({name: self.sizes[name] for name in names}, self.devices[names])

    def in_pipelines(self, ranks: int) -> Mesh:
        """The same processes in pipelines of so many ranks each; all of them call this."""
        made = DeviceMesh(
            self.devices.device_type,
            self.devices.mesh.reshape(ranks, -1),
            mesh_dim_names=("pp", "dp"),
        )
        _wait_as_the_default_group(made)
        return resolve_mesh(made, self.devices.device_type, lambda _: ranks)

    @cached_property
    def groups(self) -> dict[str, str]:
        """The name of each dimension's process group, for collectives that run."""
        if self.devices is None:
            return {}
        return {name: self.devices.get_group(name).group_name for name in self.sizes}

    def members(self, name: str) -> list[int]:
        """The global ranks along a dimension, this process's among them."""
        ranks: list[int] = dist.get_process_group_ranks(self.devices.get_group(name))
        return ranks


def resolve_mesh(mesh: Any, device: str, stages: Callable[[int | None], int] | None = None) -> Mesh:
    """The mesh that a user means.

    Args:
        stages: over how many of some processes a pipeline goes; None: there is no pipeline.
        mesh: a DeviceMesh, sizes by dimension (for plans only), or None: all processes of the
            default group, or those that torchrun started, for which the group is made.
        device: "cpu" or "cuda".

    Raises:
        UsageError: dimensions that nobody knows, or a pipeline.
    """
    if isinstance(mesh, Mesh):
        return mesh
    if isinstance(mesh, Mapping):
        sizes = _checked({str(name): size for name, size in mesh.items()})
        _check_pipelines(sizes, stages)
        return Mesh(sizes)
    if mesh is None:
        mesh = _all_processes(device, stages)
        if mesh is None:
            return Mesh({})
    names = getattr(mesh, "mesh_dim_names", None)
    if names is None:
        raise UsageError(
            f"mesh={mesh!r} must be a DeviceMesh whose dimensions have names\n"
            '  init_device_mesh("cuda", (8,), mesh_dim_names=("dp",))'
        )
    sizes = _checked(dict(zip(names, mesh.shape, strict=True)))
    _check_pipelines(sizes, stages)
    return Mesh(sizes, mesh)


def _check_pipelines(sizes: Mapping[str, int], stages: object) -> None:
    if "pp" in sizes and stages is None:
        raise UsageError(
            f'mesh has "pp" of {sizes["pp"]} ranks, but there is no pipeline\n'
            '  give pipeline=, or all ranks to "dp"'
        )


def _in_pipelines(along: int, ranks: int | None) -> dict[str, int]:
    """Ranks in pipelines of ``along`` each, one behind the other in the mesh's first dimension."""
    ranks = along if ranks is None else ranks
    if ranks % along:
        raise UsageError(
            f"{ranks} ranks cannot form pipelines of {along} ranks each\n"
            f"  take a multiple of {along}, or ask for another number of stages"
        )
    return {"pp": along, "dp": ranks // along}


def planned_mesh(
    mesh: Any, devices: int | None, device: str, stages: Callable[[int | None], int] | None = None
) -> Mesh:
    """The mesh of a plan: as given, or all ``devices`` along "dp" or in pipelines, or one device.

    Args:
        mesh: a DeviceMesh, sizes by dimension, or text such as "dp_replicate=8,dp_shard=16".
        stages: over how many of some devices, or of any number, a pipeline goes; None: there is no
            pipeline.

    Raises:
        UsageError: as ``resolve_mesh``; or the mesh has another number of ranks than ``devices``.
    """
    if isinstance(mesh, str):
        mesh = _parse(mesh)
    if mesh is None and stages is not None:
        mesh = _in_pipelines(stages(devices), devices)
    if mesh is None:
        mesh = {"dp": 1 if devices is None else devices}
    if isinstance(mesh, Mapping) and devices is not None:
        _check_product(_checked(dict(mesh)), devices)
    found = resolve_mesh(mesh, device, stages)
    _check_product(found.sizes, devices)
    return found


def _check_product(sizes: Mapping[str, int], devices: int | None) -> None:
    ranks = math.prod(sizes.values())
    if devices is not None and ranks != devices:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        shown = f" ({product})" if len(sizes) > 1 else ""
        raise UsageError(f"mesh has {ranks} ranks{shown}, devices={devices}; leave one of them out")


def _parse(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if not size.isdecimal():
            raise UsageError(f'mesh={text!r}: expected "dp=16", or several such parts and commas')
        sizes[name] = int(size)
    return sizes


def check_zero(zero: Any) -> int | None:
    """The ZeRO stage, None for "auto"; raises UsageError for anything else."""
    if isinstance(zero, str) and zero.isdecimal():
        zero = int(zero)
    if isinstance(zero, bool) or zero not in STAGES:
        raise UsageError(f'zero={zero!r} must be 0, 1, 2, 3 or "auto"')
    return None if zero == "auto" else int(zero)


def _checked(sizes: dict[str, int]) -> dict[str, int]:
    for name, size in sizes.items():
        if name not in _DIMENSIONS:
            raise unknown_option(name, _DIMENSIONS, where="mesh")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UsageError(f"mesh: {name} must be a number of ranks, at least 1, not {size!r}")
    if "dp" in sizes and {"dp_replicate", "dp_shard"} & set(sizes):
        raise UsageError(
            'mesh has "dp" beside its parts; give "dp", or "dp_replicate" and "dp_shard"'
        )
    return {name: size for name, size in sizes.items() if size > 1}


def _all_processes(device: str, stages: Callable[[int | None], int] | None) -> Any:
    """A DeviceMesh over every process; None where there is only one."""
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return None
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        _connect("nccl" if device == "cuda" else "gloo")
    if dist.get_world_size() == 1:
        return None
    world = dist.get_world_size()
    if stages is None:
        return init_device_mesh(device, (world,), mesh_dim_names=("dp",))
    sizes = _in_pipelines(stages(world), world)
    made = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    _wait_as_the_default_group(made)
    return made


def _wait_as_the_default_group(mesh: DeviceMesh) -> None:
    """Gives groups that torch has made, with a timeout of its own, that of the user."""
    for name in mesh.mesh_dim_names or ():
        _torch.set_timeout(mesh.get_group(name), _torch.default_timeout())


def _connect(backend: str) -> None:
    """Makes the default process group of the processes that torchrun started."""
    environment = os.environ
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend)
        return
    # After a restart torchrun's store still has the addresses of processes that are gone.
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    shared = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"attempt {attempt}", shared)  # type: ignore[attr-defined]
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
