"""Whether inputs are still what the model was made for: their distribution against a reference.

    reference = fxzero.monitor.InputReference.of(batches)     reference.save("inputs.json")

A feature is a column of a floating-point input [samples, columns], or all of any other input.  Its
values fall into bins that the reference's quantiles bound, and the population stability index
compares how many do:

    PSI = sum over bins of (p - q) log(p / q)        below 0.1 alike, above 0.25 another population

Two samples of one population differ, too: the index then is about chi-squared, with a degree of
freedom less than there are bins, times (1/n + 1/m).  What that explains once in a million is added
to the threshold, n and m being numbers of samples, whose values need not be independent.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.special import gammaincinv

from fxzero.documents import naming, read_json
from fxzero.errors import UsageError
from fxzero.structure import flatten
from fxzero.typed_data import read_value

_FORMAT = 1
_BINS = 10
_MAX_COLUMNS = 256
# Of one input and batch: a few thousand tell as much as all.
_MAX_VALUES = 8192
_MAX_FILE_BYTES = 64 * 2**20
_CHANCE = 1e-6


@dataclass(frozen=True)
class Feature:
    """The distribution of a feature in the reference.

    Attributes:
        name: such as "[0], column 3" of the first argument, or "['labels']" of a keyword's.
        edges: ascending bounds between bins: values below the first, up to the last, above it.
        counts: how many values fell into each bin, and behind these how many were not finite.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Drift:
    """The feature that has moved most beyond what chance explains.

    Attributes:
        psi: its population stability index.
        threshold: the limit with what chance explains.
    """

    name: str
    psi: float
    threshold: float


@dataclass(frozen=True)
class InputReference:
    """Distributions of inputs, held as data.

    Attributes:
        samples: how many the reference was made of.
    """

    format: int
    samples: int
    features: tuple[Feature, ...]

    @classmethod
    def of(cls, batches: Iterable[Any]) -> InputReference:
        """The reference that some batches make.

        Args:
            batches: each what ``monitor.step`` is given: a tuple of arguments, a dict of keyword
                arguments, or one tensor.

        Raises:
            UsageError: there is no tensor in them, or batches differ in their features.
        """
        columns: dict[str, list[torch.Tensor]] = {}
        samples = number = 0
        for batch in batches:
            number += 1
            args, kwargs = _call(batch)
            samples += count_samples(args, kwargs)
            for name, values in _features(args, kwargs):
                columns.setdefault(name, []).append(values.double().cpu())
        if not columns or not samples:
            raise UsageError("a reference needs batches with tensors, and there are none")
        for name, parts in columns.items():
            if len(parts) < number:
                raise UsageError(
                    f"{name} is in {len(parts)} of {number} batches\n"
                    "  give batches of one structure"
                )
        found = (_feature(name, torch.cat(parts)) for name, parts in columns.items())
        return cls(_FORMAT, samples, tuple(found))

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> InputReference:
        """Reads what ``save`` wrote.

        Raises:
            UsageError: the file is missing, too large, or no reference.
        """
        path = Path(path)
        data = read_json(path, _MAX_FILE_BYTES, UsageError)
        with naming(path, UsageError):
            found = read_value(cls, data, "reference")
        assert isinstance(found, InputReference)
        _check(found, path)
        return found


class InputWatch:
    """Counts what falls into the reference's bins, and compares."""

    def __init__(self, reference: InputReference) -> None:
        self.reference = reference
        self._edges: dict[tuple[str, torch.device], torch.Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """Starts to count anew."""
        self.samples = 0
        self.counts = {f.name: torch.zeros(len(f.counts)) for f in self.reference.features}

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Counts one batch.

        Raises:
            UsageError: it has not the reference's features.
        """
        found = _features(args, kwargs)
        names = [name for name, _ in found]
        if names != list(self.counts):
            odd = min({*names} ^ {*self.counts}, default="their order")
            raise UsageError(
                f"the reference has {len(self.counts)} features, the inputs have {len(names)}, and "
                f"{odd} differs\n  make the reference from what monitor.step is given"
            )
        self.samples += count_samples(args, kwargs)
        for feature, (name, values) in zip(self.reference.features, found, strict=True):
            key = name, values.device
            if key not in self._edges:
                edges = torch.tensor(feature.edges, dtype=torch.float64)
                self._edges[key] = edges.to(values.device)
            counted = _counted(values.double(), self._edges[key])
            self.counts[name] = self.counts[name].to(counted.device) + counted

    def numbers(self) -> torch.Tensor:
        """All that was counted, float64 on the CPU: samples, then bins."""
        return torch.cat(
            [torch.tensor([float(self.samples)]), *(c.cpu() for c in self.counts.values())]
        ).double()

    def drift(self, numbers: torch.Tensor, threshold: float) -> Drift:
        """The feature that drifts most, of what all ranks have counted."""
        samples = float(numbers[0])
        parts = numbers[1:].split([len(f.counts) for f in self.reference.features])
        found = []
        for feature, counts in zip(self.reference.features, parts, strict=True):
            psi = stability_index(counts, torch.tensor(feature.counts))
            chance = 2 * gammaincinv((len(feature.counts) - 1) / 2, 1 - _CHANCE)
            least = chance * (1 / samples + 1 / self.reference.samples)
            found.append(Drift(feature.name, psi, threshold + float(least)))
        return max(found, key=lambda drift: drift.psi - drift.threshold)


def stability_index(counts: torch.Tensor, reference: torch.Tensor) -> float:
    """The population stability index of two histograms; half a value is added to each bin."""
    p, q = counts.double() + 0.5, reference.double() + 0.5
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * (p / q).log()).sum())


def count_samples(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many samples a batch has: the largest first dimension of its tensors."""
    leaves, _ = flatten((tuple(args), dict(kwargs)))
    return max((leaf.shape[0] for leaf in leaves if leaf.ndim), default=0)


def count_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tokens a batch has: elements of its first integer input with two dimensions."""
    leaves, _ = flatten((tuple(args), dict(kwargs)))
    integers = (t for t in leaves if not t.is_floating_point() and not t.is_complex())
    return next((t.numel() for t in integers if t.ndim == 2 and t.dtype != torch.bool), 0)


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _features(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Each feature's name and some of its values, one dimension."""
    found: list[tuple[str, torch.Tensor]] = []
    # One by one: a tensor that is given twice is two inputs.
    for key, argument in (*enumerate(args), *kwargs.items()):
        leaves, structure = flatten(argument)
        named = zip(structure.paths, leaves, strict=True)
        found += [
            feature for path, leaf in named for feature in _of_input(f"[{key!r}]{path}", leaf)
        ]
    return found


def _of_input(name: str, leaf: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    values = leaf.detach()
    if not values.numel() or values.is_complex():
        return []
    if values.is_floating_point() and values.ndim == 2 and values.shape[1] <= _MAX_COLUMNS:
        columns = values[:: -(-values.numel() // _MAX_VALUES)].unbind(1)
        return [(f"{name}, column {i}", column) for i, column in enumerate(columns)]
    flat = values.reshape(-1)
    return [(name, flat[:: -(-flat.numel() // _MAX_VALUES)])]


def _feature(name: str, values: torch.Tensor) -> Feature:
    finite = values[values.isfinite()]
    if not finite.numel():
        raise UsageError(f"{name} has no finite value in the reference's batches")
    ordered = finite.sort().values
    places = [len(ordered) * i // _BINS for i in range(1, _BINS)]
    edges = ordered[places].unique()
    return Feature(name, tuple(edges.tolist()), tuple(map(int, _counted(values, edges).tolist())))


def _counted(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """How many values fall into each bin, and how many are not finite.

    A value that is an edge falls below it, so that whole numbers have bins of their own.
    """
    bins = torch.bucketize(values, edges)
    bins = torch.where(values.isfinite(), bins, len(edges) + 1)
    counts = torch.zeros(len(edges) + 2, dtype=torch.float64, device=values.device)
    return counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))


def _check(reference: InputReference, path: Path) -> None:
    """Raises UsageError for a document whose parts do not fit together."""
    if reference.format != _FORMAT:
        raise UsageError(f"{path} has format {reference.format}, this fxzero reads {_FORMAT}")
    if reference.samples < 1 or not reference.features:
        raise UsageError(f"{path} is a reference of no samples, or of no features")
    for feature in reference.features:
        edges, counts = feature.edges, feature.counts
        ascending = all(map(math.isfinite, edges)) and all(
            a < b for a, b in itertools.pairwise(edges)
        )
        if not ascending or len(counts) != len(edges) + 2 or min(counts) < 0:
            raise UsageError(
                f"{path}: {feature.name} must have finite, ascending edges and a count for each "
                f"of its {len(edges) + 2} bins, and has {len(counts)}"
            )
        if not math.isfinite(sum(counts)):
            raise UsageError(f"{path}: {feature.name} has counts that are too large")
