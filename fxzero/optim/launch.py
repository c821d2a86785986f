"""An optimizer's step as one launch of a Triton kernel over all parameters of an arena.

The table of blocks points to weights, which stay, and to gradients, which may move: then a few
operators on the device write their addresses into it.  Gradients of a training loop are at the same
addresses step after step, once the allocator has settled.

    host: addresses     |  device: rows of the table  <- addresses, by the row's parameter
    host: options       |  device: rows of scalars    <- steps, learning rates that are tensors
                        |  device: control            <- factor of gradients, found_inf

A step neither waits for the device nor copies from the host, so a CUDA graph can capture it, alone
or behind a backward.  A captured step keeps a table, scalars and control of its own: steps outside
of the graph do not change what it replays, and the other way round.  Conditions:

- A step with gradients for the same parameters, of the same dtypes, has run before the capture: it
  makes the states and compiles the kernel.
- What changes between replays is a tensor on the device: a learning rate, a loss scale, found_inf.
  Options that are numbers are those of the capture.
- Gradients of a capture of the step alone stay where they are: ``zero_grad(set_to_none=False)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxzero import _torch
from fxzero.errors import UsageError
from fxzero.kernels import update as kernel
from fxzero.optim.arenas import LOW, SCALE, Arena, Member, mark_written
from fxzero.optim.rule import Columns, Control, Group, Rule

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNED = 16  # bytes
_Addresses = tuple[int, ...]


@dataclass(frozen=True)
class _Template:
    """A table without the addresses of gradients.

    Attributes:
        weights: what it was made for: rows of members in the arena, and addresses of weights.
        rows: int64 [blocks, 8] on the device; for a gradient's address the distance from it in
            bytes, and "whole and aligned" as if every gradient was aligned.
        owner: int64 [blocks], which of the members each block is of.
        tails: whether any block is not whole, or its weight not aligned.
    """

    weights: _Addresses
    rows: Tensor
    owner: Tensor
    tails: bool

    def pointed(self, gradients: _Addresses) -> tuple[Tensor, bool]:
        """A table on the device, made there, and whether any block is not whole and aligned."""
        addresses = self.owner.new_zeros(len(gradients))
        _torch.add_numbers(addresses.unbind(), gradients)
        addresses = addresses.index_select(0, self.owner)
        table = self.rows.clone()
        table[:, 1].add_(addresses)
        table[:, 5].mul_(addresses % _ALIGNED == 0)
        return table, self.tails or any(address % _ALIGNED for address in gradients)


class LaunchedUpdate:
    """Updates an arena by one launch a step (one for each dtype of gradients)."""

    def __init__(self, arena: Arena, rule: Rule, seed: int) -> None:
        if arena.form.weight not in _DTYPES:
            raise UsageError(
                f"parameters of {arena.form.weight} have no kernel\n"
                '  use float32, bfloat16 or float16, or backend="torch"'
            )
        self.arena, self._rule = arena, rule
        self._block = kernel.QUANTIZED_BLOCK if arena.form.quantum else kernel.BLOCK
        self._seed = torch.tensor([seed], device=arena.device)
        self._scalars = torch.zeros(len(arena.members), kernel.SCALARS, device=arena.device)
        self._columns: dict[int, Columns] = {}
        # By the gradients' dtype and the rows of the members.
        self._templates: dict[tuple[torch.dtype, _Addresses], _Template] = {}
        self._tables: dict[tuple[torch.dtype, _Addresses], tuple[_Addresses, Tensor, bool]] = {}

    def __call__(
        self,
        ready: Sequence[Member],
        gradients: Sequence[Tensor],
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        found = self._control(control)
        self._count(ready, found)
        scalars = self._write_scalars(groups)
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            pairs = zip(ready, gradients, strict=True)
            self._launch([(m, g) for m, g in pairs if g.dtype == dtype], dtype, scalars, found)
        mark_written(ready)

    def _control(self, control: Control) -> Tensor:
        """float32 [2]: what multiplies gradients, and whether nothing may change."""
        device = self.arena.device
        for name, tensor in vars(control).items():
            self._check_captured(name, tensor)
        values = torch.zeros(2, device=device)
        factor = control.factor(device)
        if factor is None:
            values[:1].fill_(1.0)
        else:
            values[:1].copy_(factor.reshape(1))
        if control.found_inf is not None:
            # GradScaler adds up those of all devices.
            values[1:].copy_(control.found_inf.reshape(1) != 0)
        return values

    def _check_captured(self, name: str, value: object) -> None:
        """Raises a UsageError for a tensor that a CUDA graph cannot read again."""
        if not isinstance(value, Tensor) or value.device == self.arena.device:
            return
        if _torch.is_capturing():
            raise UsageError(
                f"{name} is a tensor on {value.device}, which a CUDA graph of a step on "
                f"{self.arena.device} cannot read\n  make it a tensor there"
            )

    def _count(self, ready: Sequence[Member], found: Tensor) -> None:
        """Counts the step where there is one."""
        taken = 1.0 - found[1]
        for first, last in _runs([member.row for member in ready]):
            self.arena.steps[first:last].add_(taken)

    def _write_scalars(self, groups: Sequence[Group]) -> Tensor:
        """Rows of scalars for the steps that are counted."""
        arena, captured = self.arena, _torch.is_capturing()
        scalars = torch.zeros_like(self._scalars) if captured else self._scalars
        first = 0
        while first < len(arena.members):
            number = arena.members[first].group
            last = first + sum(m.group == number for m in arena.members)
            group, steps = groups[number], arena.steps[first:last]
            self._check_captured("lr", group["lr"])
            columns = self._rule.scalars(group, steps.double())
            known = () if captured else self._columns.get(first, ())
            _write_columns(scalars[first:last], columns, known)
            scalars[first:last, kernel.SCALARS - 2].fill_(-1.0 if group["maximize"] else 1.0)
            scalars[first:last, kernel.SCALARS - 1].copy_(steps)
            if not captured:
                self._columns[first] = columns
            first = last
        return scalars

    def _launch(
        self,
        pairs: list[tuple[Member, Tensor]],
        dtype: torch.dtype,
        scalars: Tensor,
        found: Tensor,
    ) -> None:
        if dtype not in _DTYPES:
            raise UsageError(f"gradients of {dtype} have no kernel; cast them, or use float32")
        pairs = [(member, gradient) for member, gradient in pairs if member.elements]
        if not pairs:
            return
        blocks, tails = self._table(pairs, dtype)
        arena = self.arena
        first, second = arena.moments[0], arena.moments[-1]
        states = arena.tensors
        nothing = self._scalars
        with torch.cuda.device_of(blocks):
            kernel.update[(len(blocks),)](
                blocks,
                scalars,
                found,
                self._seed,
                states.get(LOW, nothing),
                states[first],
                states[second],
                states.get(first + SCALE, nothing),
                states.get(second + SCALE, nothing),
                **self._constants(dtype, tails),
            )

    def _constants(self, dtype: torch.dtype, tails: bool) -> dict[str, Any]:
        form = self.arena.form
        exact = not form.stochastic and not form.quantum  # what is rounded at random may be fast
        return {
            "RULE": self._rule.name,
            "PARAMETER": _DTYPES[form.weight],
            "GRADIENT": _DTYPES[dtype],
            "LOW_BITS": 8 * form.low.itemsize if form.low is not None else 0,
            "STOCHASTIC": form.stochastic,
            "QUANTUM": form.quantum,
            "EXACT": exact,
            "TAILS": tails,
            "BLOCK": self._block,
            "num_warps": 4,
            "enable_fp_fusion": not exact,
        }

    def _table(
        self, pairs: Sequence[tuple[Member, Tensor]], dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        """A row for each block, and whether any is not whole and aligned.

        A captured step makes a table of its own: it could replay after memory outside has moved.
        """
        captured = _torch.is_capturing()
        weights = tuple(number for m, _ in pairs for number in (m.row, m.address))
        gradients = tuple(gradient.data_ptr() for _, gradient in pairs)
        key = dtype, tuple(member.row for member, _ in pairs)
        template = self._templates.get(key)
        if template is None or template.weights != weights:
            if captured:
                raise UsageError(
                    f"no step before this capture of a CUDA graph had gradients of {dtype} for "
                    f"the same {len(pairs)} parameters\n  run one before, with the same gradients"
                )
            template = self._template([member for member, _ in pairs], weights, dtype)
            self._templates[key] = template
            self._tables.pop(key, None)
        if captured:
            return template.pointed(gradients)
        if key not in self._tables or self._tables[key][0] != gradients:
            self._tables[key] = (gradients, *template.pointed(gradients))
        return self._tables[key][1:]

    def _template(
        self, members: Sequence[Member], weights: _Addresses, dtype: torch.dtype
    ) -> _Template:
        size, block = self.arena.form.weight.itemsize, self._block
        rows, owner = [], []
        for position, member in enumerate(members):
            address = member.address
            aligned = address % _ALIGNED == 0 and member.index % 8 == 0
            start = torch.arange(0, member.elements, block)
            count = (member.elements - start).clamp(max=block)
            part = torch.zeros(len(start), kernel.COLUMNS, dtype=torch.int64)
            part[:, 0] = address + start * size
            part[:, 1] = start * dtype.itemsize
            part[:, 2] = member.place + start
            part[:, 3] = member.index + start
            part[:, 4] = count
            part[:, 5] = (count == block) & aligned
            part[:, 6] = member.row
            rows.append(part)
            owner.append(torch.full_like(start, position))
        table, device = torch.cat(rows), self.arena.device
        tails = not bool(table[:, 5].all())
        return _Template(weights, table.to(device), torch.cat(owner).to(device), tails)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as ranges: of each its first, and what is behind its last."""
    first = 0
    for position in range(1, len(rows) + 1):
        if position == len(rows) or rows[position] != rows[position - 1] + 1:
            yield rows[first], rows[position - 1] + 1
            first = position


def _write_columns(rows: Tensor, columns: Columns, known: Columns) -> None:
    """Writes scalars of a group into its rows, but for the numbers that are there already."""
    for column, value in enumerate(columns):
        if isinstance(value, Tensor):
            rows[:, column].copy_(value)
        elif column >= len(known) or isinstance(known[column], Tensor) or value != known[column]:
            rows[:, column].fill_(value)
