"""An optimizer's step as one launch of a Triton kernel over all parameters of an arena.

The table of blocks is written again only when memory has moved: gradients of a training loop are
at the same addresses step after step, once the allocator has settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from fxzero.errors import UsageError
from fxzero.kernels import update as kernel
from fxzero.optim.arenas import LOW, SCALE, Arena, Member
from fxzero.optim.rule import Columns, Control, Group, Rule

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ALIGNED = 16  # bytes
_Addresses = tuple[int, ...]


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
        self._tables: dict[torch.dtype, tuple[_Addresses, Tensor, bool]] = {}

    def __call__(
        self,
        ready: Sequence[Member],
        gradients: Sequence[Tensor],
        control: Control,
        groups: Sequence[Group],
    ) -> None:
        found = self._control(control)
        self._advance(ready, found, groups)
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            pairs = zip(ready, gradients, strict=True)
            self._launch([(m, g) for m, g in pairs if g.dtype == dtype], dtype, found)

    def _control(self, control: Control) -> Tensor:
        """float32 [2]: what multiplies gradients, and whether nothing may change."""
        device = self.arena.device
        values = torch.zeros(2, device=device)
        factor = control.factor(device)
        values[0] = 1.0 if factor is None else factor
        if control.found_inf is not None:
            values[1] = control.found_inf.to(device)
        return values

    def _advance(self, ready: Sequence[Member], found: Tensor, groups: Sequence[Group]) -> None:
        """Counts the step where there is one, and writes the scalars that depend on it."""
        arena = self.arena
        taken = 1.0 - found[1]
        if len(ready) == len(arena.members):
            arena.steps.add_(taken)
        else:
            chosen = torch.tensor([m.row for m in ready], device=arena.device)
            arena.steps.index_add_(0, chosen, taken.expand(len(ready)))
        first = 0
        while first < len(arena.members):
            number = arena.members[first].group
            last = first + sum(m.group == number for m in arena.members)
            self._write_scalars(slice(first, last), groups[number])
            first = last

    def _write_scalars(self, rows: slice, group: Group) -> None:
        steps = self.arena.steps[rows].double()
        columns = self._rule.scalars(group, steps)
        table = self._scalars[rows]
        known = self._columns.get(rows.start, ())
        for column, value in enumerate(columns):
            same = column < len(known) and not isinstance(value, Tensor) and value == known[column]
            if not same:
                table[:, column] = value
        table[:, kernel.SCALARS - 2] = -1.0 if group["maximize"] else 1.0
        table[:, kernel.SCALARS - 1] = steps
        self._columns[rows.start] = columns

    def _launch(
        self, pairs: list[tuple[Member, Tensor]], dtype: torch.dtype, found: Tensor
    ) -> None:
        if dtype not in _DTYPES:
            raise UsageError(f"gradients of {dtype} have no kernel; cast them, or use float32")
        pairs = [(member, gradient) for member, gradient in pairs if member.elements]
        if not pairs:
            return
        addresses = tuple(
            address
            for member, gradient in pairs
            for address in (member.address, gradient.data_ptr())
        )
        if dtype not in self._tables or self._tables[dtype][0] != addresses:
            members = [member for member, _ in pairs]
            self._tables[dtype] = (addresses, *self._table(members, addresses, dtype))
        _, blocks, tails = self._tables[dtype]
        arena = self.arena
        first, second = arena.moments[0], arena.moments[-1]
        states = arena.tensors
        nothing = self._scalars
        kernel.update[(len(blocks),)](
            blocks,
            self._scalars,
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
        self, members: Sequence[Member], addresses: _Addresses, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        """A row for each block, and whether any is not whole and aligned."""
        rows, block = [], self._block
        size = self.arena.form.weight.itemsize
        for member, weight, gradient in zip(members, addresses[::2], addresses[1::2], strict=True):
            aligned = weight % _ALIGNED == 0 and gradient % _ALIGNED == 0 and member.index % 8 == 0
            for start in range(0, member.elements, block):
                count = min(block, member.elements - start)
                rows.append(
                    (
                        weight + start * size,
                        gradient + start * dtype.itemsize,
                        member.place + start,
                        member.index + start,
                        count,
                        int(aligned and count == block),
                        member.row,
                        0,
                    )
                )
        table = torch.tensor(rows, dtype=torch.int64)
        return table.to(self.arena.device), not bool(table[:, 5].all())
