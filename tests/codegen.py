"""What a kernel becomes on a device, without one: its machine code, and what that reads and writes.

``compile_for`` takes a kernel as a launch on well-aligned memory would specialize it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+ )?([A-Z][\w.]*)", re.M)
# Instructions of one thread for each byte of device memory: 132 multiprocessors of 128 lanes at
# 1.98 GHz, and 4.3 TB/s.
INSTRUCTIONS_PER_BYTE = 132 * 128 * 1.98e9 / 4.3e12


@dataclass(frozen=True)
class MachineCode:
    """A kernel for one kind of device.

    Attributes:
        instructions: by name, as often as they stand in the code.
        registers: of one thread.
        stack: bytes of one thread: what was spilled lies here.
        shared: bytes of one block of threads.
        ptx: the code before it is one device's, in which memory orders are written out.
    """

    instructions: Counter[str]
    registers: int
    stack: int
    shared: int
    ptx: str

    @property
    def count(self) -> int:
        """Instructions in the code, but for the padding behind it."""
        return sum(n for name, n in self.instructions.items() if name not in ("NOP", "BRA"))

    def accesses(self, kind: str) -> Counter[int]:
        """How often the code reads ("LDG") or writes ("STG") global memory, by width in bits."""
        found: Counter[int] = Counter()
        for name, n in self.instructions.items():
            if name.startswith(kind):
                width = re.search(r"\.(?:[US])?(8|16|64|128)\b", name)
                found[int(width[1]) if width else 32] += n
        return found

    def bytes_moved(self, threads: int) -> int:
        """Of one block of threads that goes through the code once, in accesses of 128 bits."""
        return sum(self.accesses(kind)[128] for kind in ("LDG", "STG")) * 16 * threads


def compile_for(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int = 90,
    warps: int = 4,
    fusion: bool = False,
    multiples: Sequence[str] = (),
) -> MachineCode:
    """Machine code of a kernel.

    Args:
        arguments: types of all arguments by name, as in ``{"x": "*fp32", "n": "i32"}``; pointers
            are multiples of 16 bytes.
        constants: values of those that are ``tl.constexpr``.
        capability: of the device, 90 for sm_90.
        fusion: whether a product and a sum may become one instruction, which rounds once.
        multiples: integers that are multiples of 16, as a launch would see them to be.
    """
    names = list(arguments)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if arguments[n][0] == "*" or n in multiples
    }
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    options = {"num_warps": warps, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _run("--dump-sass", file.name)
        usage = _run("--dump-resource-usage", file.name)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    instructions = Counter(_INSTRUCTION.findall(code))
    return MachineCode(
        instructions, used["REG"], used["STACK"], used["SHARED"], compiled.asm["ptx"]
    )


def _run(option: str, path: str) -> str:
    command = [str(_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
