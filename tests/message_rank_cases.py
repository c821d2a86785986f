"""What ranks do in tests of messages of few bits."""

import torch
import torch.distributed as dist
from rank_cases import whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero

WIDTH, STEPS = 96, 4


class Layers(nn.Module):
    """Four large weights, biases that are small, and rows that four ranks do not divide."""

    def __init__(self):
        super().__init__()
        sizes = ((WIDTH, 122), (122, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
        self.layers = nn.Sequential(*(nn.Linear(*size) for size in sizes))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x - 0.5).square().mean()


def made():
    """The model and its inputs, for plans."""
    return Layers(), (torch.randn(8, WIDTH),)


def trained(zero, inner="eager", sizes=None, pipeline=None, **sent):
    """(losses, parameters, notes, measured peak, planned peak) of some steps of SGD."""
    torch.manual_seed(0)
    mesh = sizes and init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    precision = fxzero.Precision(**sent)
    asked = pipeline and fxzero.Pipeline(**pipeline)
    model = fxzero.compile(
        Layers(), zero=zero, inner=inner, precision=precision, mesh=mesh, pipeline=asked
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    place = dist.get_rank() if mesh is None else mesh.get_local_rank("dp")
    batch = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(place))
    losses = []

    def step():
        optimizer.zero_grad()
        if pipeline is None:
            loss = model(batch)
            loss.backward()
        else:
            loss = model.step(batch)
        losses.append(loss.item())

    for _ in range(STEPS):
        step()
        optimizer.step()
    peaks = [fxzero.measure(step).tensor_bytes for _ in range(3)]
    owned = {n: whole(p) for n, p in model.named_parameters() if not p.is_meta}
    return losses[:STEPS], owned, model.plan.notes, min(peaks), model.plan.peak_bytes
