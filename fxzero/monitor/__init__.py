"""Watching a training: figures of every step, alarms, and what is done about them.

monitor = fxzero.monitor.Monitor(model, optimizer=optimizer)
with monitor.step(*inputs) as step:
    ...
"""

from fxzero.monitor.alarms import ACTIONS, KINDS, Thresholds
from fxzero.monitor.inputs import InputReference
from fxzero.monitor.monitor import Monitor, Step
from fxzero.monitor.prometheus import Prometheus
from fxzero.monitor.record import Alarm, Record
from fxzero.monitor.sinks import JsonLines, Sink, TensorBoard

__all__ = [
    "ACTIONS",
    "KINDS",
    "Alarm",
    "InputReference",
    "JsonLines",
    "Monitor",
    "Prometheus",
    "Record",
    "Sink",
    "Step",
    "TensorBoard",
    "Thresholds",
]
