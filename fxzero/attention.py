"""Plans for CUDA devices see the attention that those run: in one kernel, causal without a mask.

Models of transformers leave the mask out when they run and nothing is padded, so that their
attention is flash attention.  When they are traced they always build one, which no kernel of flash
attention takes: twice the operations, and a mask of [batch, 1, seq, seq].  Inside ``unmasked`` they
do as when they run.

    traced:   where(mask, 0, -inf) | repeat keys, values | attention(q, k, v, mask)
    unmasked: attention(q, k, v, is_causal=True, enable_gqa=True)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

# What transformers is told to call this attention.
_NAME = "fxzero_unmasked"


@contextmanager
def unmasked(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Inside, models of transformers in ``model`` build no mask that they need not.

    Args:
        kwargs: of the call to be traced.  Positions that the caller gives may say that sequences
            are packed, which takes a mask.
    """
    library = sys.modules.get("transformers")
    if library is None or kwargs.get("position_ids") is not None:
        yield
        return
    changed = []
    for module in model.modules():
        if isinstance(module, library.PreTrainedModel) and _is_fused(module):
            _register(library)
            module.set_attn_implementation({"": _NAME})
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            module.set_attn_implementation({"": "sdpa"})


def _is_fused(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", None) == "sdpa"


def _register(library: Any) -> None:
    attentions, masks = library.AttentionInterface(), library.AttentionMaskInterface()
    if _NAME not in attentions:
        library.AttentionInterface.register(_NAME, attentions["sdpa"])
        library.AttentionMaskInterface.register(_NAME, _Mask(masks["sdpa"]))


class _Mask:
    """Makes the masks that torch's attention needs, of those that ``make`` makes."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """None where nothing is padded and every position sees all, or all before it."""
        local, length = kwargs.get("local_size"), kwargs["kv_length"]
        padded = kwargs.get("attention_mask") is not None
        special = kwargs.get("use_vmap") or (local is not None and local <= length)
        causal = not kwargs.get("allow_is_bidirectional_skip", False)
        aligned = not causal or kwargs["q_length"] == length
        return self.make(*args, **kwargs) if padded or special or not aligned else None
