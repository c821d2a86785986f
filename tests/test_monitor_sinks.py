"""Where the monitor's records go: JSON lines, TensorBoard, Prometheus, and sinks that fail."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from monitor_cases import Net, nan_at, plain, quiet, train

from fxzero import AlarmWarning, UsageError
from fxzero.monitor import JsonLines, Monitor, Prometheus, Record, TensorBoard


def test_json_lines_are_json_and_are_added(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    for _ in range(2):
        records = []
        model, optimizer = plain()
        sinks = [JsonLines(path), records.append]
        monitor = Monitor(model, every=2, optimizer=optimizer, sinks=sinks, actions=quiet())
        train(model, optimizer, 4, monitor, scale=lambda n: nan_at(n, 4))
        monitor.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4] * 2
    last = lines[-1]
    assert (last["loss"], last["gradient_norm"]) == ("nan", records[-1].gradient_norm) or (
        last["loss"] == "nan" and last["gradient_norm"] == "nan"
    )
    assert last["alarms"][0]["kind"] == "not_finite"
    assert last["measured_peak_bytes"] == records[-1].measured_peak_bytes
    assert set(last) == set(vars(records[-1]))


def test_prometheus_text_is_what_its_format_says() -> None:
    model, optimizer = plain()
    sink = Prometheus(0)
    monitor = Monitor(model, every=2, optimizer=optimizer, sinks=[sink], actions=quiet())
    train(model, optimizer, 4, monitor, scale=lambda n: nan_at(n, 4))
    url = f"http://127.0.0.1:{sink.port}"
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/other", timeout=10)
    monitor.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
    kinds, values = parsed(text)
    assert values["fxzero_step"] == 4
    assert math.isnan(values["fxzero_loss"])
    assert values['fxzero_alarms_total{kind="not_finite"}'] == 1
    assert values['fxzero_alarms_total{kind="peak"}'] == 0
    assert kinds["fxzero_step_seconds"] == "gauge"
    assert kinds["fxzero_alarms_total"] == "counter"


def parsed(text: str) -> tuple[dict[str, str], dict[str, float]]:
    """Types and values in Prometheus' text format, whose every line must be of it."""
    kinds, values = {}, {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            mark, word, name, kind = line.split(" ")
            assert (mark, word) == ("#", "TYPE")
            assert kind in ("gauge", "counter")
            assert name not in kinds
            kinds[name] = kind
        else:
            name, value = line.split(" ")
            assert name.partition("{")[0] in kinds  # the type comes first
            assert name not in values
            values[name] = float(value)
    return kinds, values


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is optional"
    )
    model, optimizer = plain()
    records: list[Record] = []
    sinks = [TensorBoard(tmp_path), records.append]
    monitor = Monitor(model, every=2, optimizer=optimizer, sinks=sinks, actions=quiet())
    train(model, optimizer, 4, monitor, scale=lambda n: nan_at(n, 4))
    read = accumulators.EventAccumulator(str(tmp_path))
    read.Reload()
    times = [(e.step, e.value) for e in read.Scalars("fxzero/step_seconds")]
    assert times == [(r.step, pytest.approx(r.step_seconds, rel=1e-6)) for r in records]
    (event,) = read.Tensors("alarms/not_finite/text_summary")
    assert event.step == 4
    text = event.tensor_proto.string_val[0].decode()
    assert text == "step 4: the loss of step 4 is nan (recorded)"
    monitor.close()


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"needs the package tensorboard") as caught:
        Monitor(Net(), sinks=[TensorBoard(tmp_path)])
    assert 'pip install "fxzero[tensorboard]", or use JsonLines' in str(caught.value)


def test_a_sink_that_fails_is_dropped_and_training_goes_on() -> None:
    calls: list[int] = []
    others: list[Record] = []

    def full(record: Record) -> None:
        calls.append(record.step)
        raise OSError(28, "No space left on device")

    model, optimizer = plain()
    monitor = Monitor(model, every=2, optimizer=optimizer, sinks=[full, others.append])
    text = r"the sink .*full failed and is given no more records: OSError: .*No space left"
    with pytest.warns(AlarmWarning, match=text):
        train(model, optimizer, 4, monitor)
    assert calls == [1]
    assert [r.step for r in others] == [1, 2, 4]
    assert any("failed and is given no more" in note for note in others[1].notes)
