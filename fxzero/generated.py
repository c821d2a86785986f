"""Generated code without its kernels: what it does to memory, on tensors that have none.

buf0 = empty_strided_cpu(...)    a fake tensor
cpp_fused_add_0(x, y, buf0)      nothing
del x                            freed
"""

from __future__ import annotations

import ast
import builtins
import functools
import math
from typing import Any

import torch

from fxzero import _inductor
from fxzero.execution import BoxedFunction


def without_kernels(function: BoxedFunction) -> BoxedFunction:
    """What a function that Inductor generated does to memory, for fake tensors.

    It allocates, calls operators of torch and frees as the generated code does; generated kernels,
    which write into what is allocated, do nothing.  Other functions come back as they are.
    """
    code = _inductor.generated_code(function)
    if code is None:
        return function
    source, constants = code
    (call,) = (
        n
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.FunctionDef) and n.name == "call"
    )
    parameters = call.args.args
    call.args.args = [name for name in parameters if name.arg != "self"]
    names = _Names(
        torch=torch,
        aten=torch.ops.aten,
        inductor_ops=torch.ops.inductor,
        device=torch.device,
        inf=math.inf,
        nan=math.nan,
        extern_kernels=_inductor.extern_kernels(),
        empty_strided=torch.empty_strided,
        reinterpret_tensor=_reinterpret,
    )
    for kind in ("cpu", "cuda"):
        names[f"empty_strided_{kind}"] = functools.partial(_empty, kind)
    names |= constants
    exec(compile(ast.Module([call], []), "<generated code>", "exec"), names)
    run: BoxedFunction = names["call"]
    return lambda arguments: list(run(arguments))


class _Names(dict[str, Any]):
    """Global names of generated code; those nobody gave are kernels."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, _NO_KERNEL)


class _NoKernel:
    """Can be called and looked into, and does nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> _NoKernel:
        return self

    def __getattr__(self, name: str) -> _NoKernel:
        return self


_NO_KERNEL = _NoKernel()


def _empty(kind: str, size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=kind)


def _reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)
