"""What a configuration file from a stranger may ask for: sizes, and nothing that is run or fetched.

A config.json is handed to a class of transformers, which takes any key, imports what some of them
name, and makes as many layers as it is told.  So before it is,

    keys that choose code or files    are left out: the model is planned as transformers has it
    dtypes                            are names of torch's floating-point dtypes
    sizes                             are those that a model can have

and while the model is made, its modules are counted.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxzero.documents import shortened
from fxzero.errors import UsageError

# The largest sizes that are published are 10,485,760 positions (Llama 4 Scout); the bases of
# rotary embeddings, which are no sizes, are larger.
MAX_SIZE = 2**24
# Of what a class makes one by one: layers, experts, labels.  21,841 labels (ImageNet-21k) are the
# most that are published.
MAX_COUNT = 2**16
# Llama 3 405B has 1,900, as transformers makes the experts of a layer in one module; 20,000 take
# some seconds.
MAX_MODULES = 20_000

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# "auto_map" names classes in files beside the weights, implementations may name repositories whose
# code is fetched, and a backbone the repository of its weights.  Keys that begin with an underscore
# are what transformers keeps for itself.
_LEFT_OUT = re.compile(
    r"_.*|auto_map|(attn|experts)_implementation|kernel_config|name_or_path|use_kernels"
    r"|use_pretrained_backbone|custom_pipelines|trust_remote_code"
)
_COUNT = re.compile(r".*(layer|depth|block|expert|head|label|stage|level).*")
_NO_SIZE = re.compile(r".*(theta|base|seed).*")


def checked_configuration(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same without what would choose code.

    Raises:
        UsageError: names the key of what no model can have.
    """
    return {
        key: _checked(value, key, f"{path}: {shortened(key)}")
        for key, value in data.items()
        if not _LEFT_OUT.fullmatch(key)
    }


def _checked(value: Any, key: str, where: str) -> Any:
    if key in ("dtype", "torch_dtype") and value is not None and value not in [*DTYPES]:
        known = ", ".join(DTYPES)
        raise UsageError(f"{where} is {shortened(repr(value))}, none of {known}")
    if isinstance(value, dict):
        return {
            name: _checked(item, name, f"{where}.{shortened(name)}")
            for name, item in value.items()
            if not _LEFT_OUT.fullmatch(name)
        }
    if isinstance(value, list):
        return [_checked(item, key, where) for item in value]
    if isinstance(value, (int, float)) and not _NO_SIZE.fullmatch(key):
        most = MAX_COUNT if _COUNT.fullmatch(key) else MAX_SIZE
        if isinstance(value, int) and not -most <= value <= most:
            raise UsageError(f"{where} is {shortened(str(value))}, more than the {most} it can be")
    return value


@contextlib.contextmanager
def counted_modules(path: Path) -> Iterator[None]:
    """Stops the making of a model of too many modules.

    Raises:
        UsageError: there are more than ``MAX_MODULES``.
    """
    count = 0

    def registered(module: nn.Module, name: str, inner: nn.Module) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise UsageError(f"{path}: the model has more than {MAX_MODULES} modules")

    handle = nn.modules.module.register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
