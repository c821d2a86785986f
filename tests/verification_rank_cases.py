"""What each rank of a pool runs for test_verification_ranks.py; all return a report and facts."""

import os

import sabotage
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from pipeline_cases import build
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero import _torch
from fxzero.verification import Verification


class Tied(nn.Module):
    """Tied weights and dropout; a logarithm that inputs may spoil."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids, scale):
        x = self.embed(ids) * torch.log(scale)
        hidden = F.dropout(F.gelu(self.up(x)) * 0.5, 0.25, self.training)
        return F.cross_entropy(self.head(x + self.down(hidden)).flatten(0, 1), ids.flatten())


def _model(zero, **options):
    torch.manual_seed(0)
    model = Tied()
    return fxzero.compile(model, zero=zero, inner="eager", optimizer="sgd", **options)


def _inputs():
    torch.manual_seed(10 + dist.get_rank())
    return torch.randint(16, (32, 16)), torch.rand(32, 1, 1) + 2.0


def _answer(model, found: Verification):
    guilt = found.guilt
    return {
        "text": str(found),
        "ok": found.ok,
        "exact": found.exact,
        "stale": [(item.rank, item.parameter, item.like, item.count) for item in found.stale],
        "guilt": None if guilt is None else (guilt.kind, guilt.name, guilt.rank),
        "node": None if guilt is None or guilt.node is None else guilt.node.node,
        "result": None if guilt is None or guilt.node is None else guilt.node.result,
        "failed": found.failed_ranks,
        "origins": [origin.source for origin in found.non_finite_origins],
    }


def right(zero):
    """Verified alone and in the middle of an accumulation, which goes on as if nothing was."""
    model, inputs = _model(zero, recompute="full"), _inputs()
    answers = [_answer(model, model.verify(*inputs))]

    def accumulated(verifies):
        model.zero_grad()
        torch.manual_seed(5)
        with model.no_sync():
            model(*inputs).backward()
            if verifies:
                found = model.verify(*inputs)
                assert found.accumulated is not None
                answers.append(_answer(model, found))
        model(*inputs).backward()
        return [_torch.local_tensor(p.grad) for p in model.parameters()]

    assert all(map(torch.equal, accumulated(verifies=True), accumulated(verifies=False)))
    return answers


def stale(of):
    """One parameter of the last rank is another."""
    model, inputs = _model(0), _inputs()
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            dict(model.named_parameters())[of][0] += 1e-6
    return _answer(model, model.verify(*inputs))


def spoilt(zero, name, spoil, of=None):
    """A pass of both ranks goes wrong."""
    os.environ["FXZERO_SPEC"] = "0"
    fault = getattr(sabotage, spoil)
    model = _model(zero, recompute=_everything)
    sabotage.plant(model, name, fault if of is None else fault(of))
    return _answer(model, model.verify(*_inputs()))


def _everything(node):
    return "recompute"


def not_finite_on_one(zero):
    """Only the second rank's inputs are out of the logarithm's domain."""
    model, (ids, scale) = _model(zero), _inputs()
    if dist.get_rank() == 1:
        scale[3] = -1.0
    return _answer(model, model.verify(ids, scale))


def _pipeline(name, zero, sizes, schedule):
    model, args, kwargs, loss = build(name)
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    asked = fxzero.Pipeline(sizes["pp"], microbatches=4, schedule=schedule)
    options = {"mesh": mesh, "zero": zero, "inner": "eager", "recompute": _everything}
    return fxzero.compile(model, pipeline=asked, loss_fn=loss, **options), args, kwargs


def pipeline(name, zero, sizes, schedule="1f1b", spoil=None, of=None, stale=None):
    """A pipeline, verified before and after a step; some have a spoilt pass or a stale weight."""
    model, args, kwargs = _pipeline(name, zero, sizes, schedule)
    if spoil is not None:
        os.environ["FXZERO_SPEC"] = "0"
        sabotage.plant(model, spoil, sabotage.scale_gradient(of))
    model.step(*args, **kwargs)  # cuts the model
    named = dict(model.named_parameters())
    if stale is not None and dist.get_rank() == stale:
        with torch.no_grad():
            next(p for p in named.values() if not p.is_meta).add_(1e-3)
    gradients = {name: p.grad for name, p in named.items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = model.verify(*args, **kwargs)
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert all(p is named[name] for name, p in model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta or torch.equal(
            _torch.local_tensor(tensor), _torch.local_tensor(state[name])
        )
    guilt = found.guilt
    stage = None if guilt is None else guilt.stage
    return {**_answer(model, found), "stage": stage, "count": found.gradient_count}


def in_precision(zero, model="tied of 2 layers", **precision):
    """A step in other dtypes, or with what ranks send as codes."""
    torch.manual_seed(0)
    module, args, kwargs, _ = zoo.build(model)
    options = {"precision": fxzero.Precision(**precision), "inner": "eager", "optimizer": "sgd"}
    compiled = fxzero.compile(module, zero=zero, **options)
    found = compiled.verify(*args, **kwargs)
    by_design = found.guilt is not None and found.guilt.by_design
    return {**_answer(compiled, found), "by_design": by_design}
