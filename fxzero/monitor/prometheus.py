"""The latest figures in Prometheus' text format, on loopback.

$ curl http://127.0.0.1:9400/metrics
# TYPE fxzero_loss gauge
fxzero_loss 2.25
# TYPE fxzero_alarms_total counter
fxzero_alarms_total{kind="loss_spike"} 0
"""

from __future__ import annotations

import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fxzero.errors import UsageError
from fxzero.monitor.alarms import KINDS
from fxzero.monitor.record import Record
from fxzero.monitor.sinks import Sink

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Prometheus(Sink):
    """Answers GET /metrics on 127.0.0.1; nothing outside this machine can reach it.

    Args:
        port: 0: any that is free.

    Attributes:
        port: the one in use, once it is open.
    """

    def __init__(self, port: int = 9400) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
            raise UsageError(f"port={port!r} must be a number from 0 to 65535")
        self.port = port
        self._alarms = dict.fromkeys(KINDS, 0)
        self._text = b""
        self._server: ThreadingHTTPServer | None = None

    def open(self) -> None:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/metrics"
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", _TYPE)
                self.end_headers()
                self.wfile.write(sink._text if known else b"see /metrics\n")

            def log_message(self, format: str, *args: Any) -> None:
                """Requests are nothing to tell the user of."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        except OSError as error:
            raise UsageError(
                f"Prometheus cannot listen on 127.0.0.1:{self.port}: {error.strerror}\n"
                "  give another port, or 0 for any that is free"
            ) from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        thread = threading.Thread(target=self._server.serve_forever, name="fxzero", daemon=True)
        thread.start()

    def write(self, record: Record) -> None:
        for alarm in record.alarms:
            self._alarms[alarm.kind] += 1
        self._text = exposition(record, self._alarms).encode()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def __repr__(self) -> str:
        return f"Prometheus({self.port})"


def exposition(record: Record, alarms: dict[str, int]) -> str:
    """A record, and how many alarms of each kind there were, in the text format."""
    lines = []
    for name, value in {"step": record.step, **record.numbers}.items():
        lines += [f"# TYPE fxzero_{name} gauge", f"fxzero_{name} {_number(value)}"]
    lines.append("# TYPE fxzero_alarms_total counter")
    lines += [f'fxzero_alarms_total{{kind="{kind}"}} {count}' for kind, count in alarms.items()]
    return "\n".join([*lines, ""])


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
