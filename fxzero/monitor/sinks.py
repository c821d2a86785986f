"""Where records go.  Only the first rank has sinks open; all ranks may name them.

JsonLines("run.jsonl")      a line of JSON for each record, added to the file
TensorBoard("runs/a")       scalars by step, alarms as text
Prometheus(9400)            the latest figures at http://127.0.0.1:9400/metrics
print                       any function of a Record
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fxzero.errors import UsageError
from fxzero.monitor.record import Record


class Sink(ABC):
    """Takes records, in order."""

    def open(self) -> None:  # noqa: B027 - a function has nothing to open
        """Called once, before the first record; raises if there will be no writing."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Takes one record."""

    def close(self) -> None:  # noqa: B027 - a function has nothing to close
        """Called once, behind the last one."""


class Function(Sink):
    """A function of a record."""

    def __init__(self, function: Callable[[Record], Any]) -> None:
        self.function = function

    def write(self, record: Record) -> None:
        self.function(record)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


class JsonLines(Sink):
    """A line of JSON for each record, at the end of a file; each is on disk when it is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        assert self._file is not None, "open() comes first"
        self._file.write(record.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"


class TensorBoard(Sink):
    """Event files that TensorBoard shows: ``fxzero/<figure>`` by step, alarms as text.

    Needs the package tensorboard: ``pip install "fxzero[tensorboard]"``.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._writer: Any = None

    def open(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"the sink TensorBoard needs the package tensorboard: {error}\n"
                '  pip install "fxzero[tensorboard]", or use JsonLines'
            ) from None
        self._writer = SummaryWriter(str(self.directory))

    def write(self, record: Record) -> None:
        for name, value in record.numbers.items():
            self._writer.add_scalar(f"fxzero/{name}", value, record.step, record.time)
        for alarm in record.alarms:
            text = f"step {alarm.step}: {alarm.message} ({', '.join(alarm.done) or 'recorded'})"
            self._writer.add_text(f"alarms/{alarm.kind}", text, record.step, record.time)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.directory)!r})"


def as_sink(given: object) -> Sink:
    """A sink, or what makes one of a function.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(given, Sink):
        return given
    if callable(given) and not isinstance(given, type):
        return Function(given)
    raise UsageError(
        f"a sink must take records, and {given!r} does not\n"
        "  give JsonLines(path), TensorBoard(directory), Prometheus(port) or a function of a Record"
    )
