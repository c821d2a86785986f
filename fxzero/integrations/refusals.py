"""What loops of all libraries refuse, and what they advise instead."""

from __future__ import annotations

from collections.abc import Container

from fxzero.errors import UsageError

PRECISION = "precision=fxzero.Precision(param=torch.bfloat16)"
_NEED_STEP = ("pipeline", "microbatches", "update", "loss_fn")


def check_options(options: Container[str], library: str) -> None:
    """Raises UsageError for options that work with ``model.step`` only."""
    for name in _NEED_STEP:
        if name in options:
            raise UsageError(
                f"{name}= trains with model.step, and {library} calls the model itself\n"
                "  leave it out, or write the loop: docs/how-to/integrations.md"
            )
