"""The command line: what each command calls, prints and returns, without tracing a model."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from synthetic import MiB, gpt_plan
from torch import nn

from fxzero.cli import cli, main
from fxzero.errors import BudgetError, CaptureError, InternalError, PlanError, UsageError
from fxzero.plans import Plan
from fxzero.precision import Precision

FACTORY = "cli_factory:make"


@pytest.fixture(autouse=True)
def _factory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the command line can import, with a model and its inputs."""
    module = types.ModuleType("cli_factory")
    module.make = lambda: (nn.Linear(4, 2), torch.randn(3, 4))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cli_factory", module)


Stub = Callable[..., None]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts a module with these names in the place of a module of fxzero."""

    def put(name: str, **names: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)

    return put


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def ran(*args: Any) -> Ran:
        code = main([str(arg) for arg in args])
        return Ran(code, *capsys.readouterr())

    return ran


# Start-up


@pytest.mark.parametrize("args", [["--help"], ["plan", "--help"], ["--version"], ["diff", "-h"]])
def test_help_is_fast_and_does_not_import_torch(tmp_path: Path, args: list[str]) -> None:
    code = (
        "import sys; from fxzero.cli import main; code = main(sys.argv[1:]);"
        "print('torch' in sys.modules, 'fxzero.plans' in sys.modules); sys.exit(code)"
    )
    seconds = []
    for _ in range(5):  # the best of five: the machine may be busy
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "False False"
    assert min(seconds) < 0.3


def test_the_set_of_commands_and_options_is_this() -> None:
    planning = {
        "model", "batch", "seq", "dtype", "memory_budget", "optimizer", "recompute", "objective",
        "offload",
        "accumulate",
        "update",
        "devices",
        "hardware",
        "mesh",
        "zero",
        "send_weights",
        "send_gradients",
        "pipeline",
        "schedule",
        "microbatches",
    }  # fmt: skip
    found = {
        name: {parameter.name for parameter in command.params}
        for name, command in cli.commands.items()
    }
    assert found == {
        "plan": planning
        | {"json", "html", "memory_viz", "trace", "sweep", "card", "check", "accept"},
        "explain": planning,
        "diff": {"before", "after", "html"},
        "search": {
            "model",
            "hardware",
            "devices",
            "global_batch",
            "goal",
            "price",
            "batch",
            "seq",
            "dtype",
            "memory_budget",
            "optimizer",
            "zero",
            "offload",
            "send_codes",
            "rows",
            "json",
        },
        "hardware": set(),
        "passes": set(),
        "verify": {"model", "memory_budget", "inner", "json"},
        "replay": {"directory"},
        "calibrate": {"model", "batch", "seq", "dtype", "inner", "hardware_file"},
        "doctor": set(),
        "demo": {"memory_budget", "steps", "out"},
    }


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help(name: str, run: Callable[..., Ran]) -> None:
    result = run(name, "--help")
    assert result.code == 0
    assert cli.commands[name].help
    assert isinstance(cli.commands[name], click.Command)


# plan and explain


def test_plan_prints_the_report_and_returns_0_where_it_fits(
    run: Callable[..., Ran], stub: Stub
) -> None:
    calls = []

    def plan(model: nn.Module, args: Any, **options: Any) -> Plan:
        calls.append((model, args, options))
        return gpt_plan()

    stub("fxzero.forecast", plan=plan)
    result = run("plan", FACTORY, "--memory-budget", "22GiB", "--optimizer", "sgd")
    assert (result.code, result.out, result.err) == (0, f"{gpt_plan()}\n", "")
    ((model, args, options),) = calls
    assert isinstance(model, nn.Linear)
    assert model.weight.is_meta
    assert args[0].shape == (3, 4)
    assert options == {
        "kwargs": {},
        "name": FACTORY,
        "memory_budget": "22GiB",
        "optimizer": "sgd",
        "recompute": "auto",
        "objective": "time",
        "offload": False,
        "accumulate": False,
        "update": "step",
        "pipeline": None,
        "devices": None,
        "hardware": None,
        "mesh": None,
        "zero": "auto",
        "precision": Precision(),
        "sweep": 0,
    }


def test_a_plan_that_does_not_fit_is_printed_and_returns_3(
    run: Callable[..., Ran], stub: Stub
) -> None:
    stub("fxzero.forecast", plan=lambda *_, **__: gpt_plan(budget=MiB, status="infeasible"))
    for command in ("plan", "explain"):
        result = run(command, FACTORY)
        assert result.code == 3
        assert "DOES NOT FIT" in result.out.splitlines()[0]


def test_plan_writes_its_views(run: Callable[..., Ran], stub: Stub, tmp_path: Path) -> None:
    stub("fxzero.forecast", plan=lambda *_, **__: gpt_plan())
    json, html = tmp_path / "plan.json", tmp_path / "plan.html"
    for option, name in (("--memory-viz", "plan.pickle"), ("--trace", "trace.json")):
        assert run("plan", FACTORY, option, tmp_path / name).code == 0
        assert (tmp_path / name).stat().st_size > 1000
    result = run("plan", FACTORY, "--json", json, "--html", html)
    assert result.code == 0
    assert Plan.load(json) == gpt_plan()
    assert html.read_text().startswith("<!doctype html>")
    assert result.err == f"wrote {json}\nwrote {html}\n"


def test_diff_prints_and_writes_a_page(run: Callable[..., Ran], tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    gpt_plan().save(before)
    gpt_plan(recomputed=12).save(after)
    page = tmp_path / "diff.html"
    result = run("diff", before, after, "--html", page)
    assert (result.code, result.err) == (0, f"wrote {page}\n")
    assert "-192 MiB" in result.out
    assert "-192 MiB" in page.read_text()


def test_a_file_that_cannot_be_written_is_a_usage_error(
    run: Callable[..., Ran], stub: Stub, tmp_path: Path
) -> None:
    stub("fxzero.forecast", plan=lambda *_, **__: gpt_plan())
    result = run("plan", FACTORY, "--json", tmp_path / "missing" / "plan.json")
    assert result.code == 2
    assert "cannot write" in result.err


def test_explain_prints_reasons(run: Callable[..., Ran], stub: Stub) -> None:
    stub("fxzero.forecast", plan=lambda *_, **__: gpt_plan())
    result = run("explain", FACTORY)
    assert result.code == 0
    assert "input of a matmul, 2.0-2.9 ms to compute again" in result.out


# Errors


BUDGET = BudgetError(budget_bytes=5, required_bytes=9, fixed={"parameters": 7})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u"), 2),
        (CaptureError("c"), 2),
        (PlanError("p"), 2),
        (BUDGET, 3),
        (InternalError("i"), 4),
        (AssertionError("a"), 4),
        (RuntimeError("r"), 4),
    ],
)
def test_exit_code_and_one_message_for_every_error(
    run: Callable[..., Ran],
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
) -> None:
    def plan(*_: Any, **__: Any) -> Plan:
        raise error

    monkeypatch.delenv("FXZERO_DEBUG", raising=False)
    stub("fxzero.forecast", plan=plan)
    result = run("plan", FACTORY)
    assert (result.code, result.out) == (code, "")
    assert str(error) in result.err
    assert "Traceback" not in result.err
    assert ("this is a bug of fxzero" in result.err) == (code == 4)


def test_debug_shows_the_traceback(
    run: Callable[..., Ran], stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any, **__: Any) -> Plan:
        raise RuntimeError("inside")

    monkeypatch.setenv("FXZERO_DEBUG", "1")
    stub("fxzero.forecast", plan=plan)
    assert "Traceback" in run("plan", FACTORY).err


def test_a_bug_names_its_reproducer(run: Callable[..., Ran], stub: Stub) -> None:
    error = InternalError("a pass failed")
    error.reproducer = "/tmp/fxzero-1"  # type: ignore[attr-defined]

    def plan(*_: Any, **__: Any) -> Plan:
        raise error

    stub("fxzero.forecast", plan=plan)
    assert "with /tmp/fxzero-1, which `fxzero replay` runs again" in run("plan", FACTORY).err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["plan"], "Missing argument 'MODEL'"),
        (["plna"], "No such command 'plna'"),
        (["plan", "gpt2", "--sequence", "3"], "No such option"),
        (["plan", "gpt2", "--recompute", "maybe"], "'maybe' is not one of"),
        (["plan", "gpt-2"], "did you mean 'gpt2'?"),
        (["plan", "gpt2", "--batch", "0"], "batch=0 must be positive"),
        (["plan", "gpt2", "--memory-budget", "-5GiB"], "memory_budget='-5GiB' must be positive"),
        (["plan", "gpt2", "--memory-budget", "-5"], "memory_budget=-5 must be positive"),
        (
            ["plan", "gpt2", "--devices", "6", "--mesh", "pp=4,dp=2"],
            "mesh has 8 ranks (pp 4 x dp 2), devices=6; leave one of them out",
        ),
        (["plan", "no_such_module:f"], "cannot import 'no_such_module': ModuleNotFoundError"),
        (["plan", "/no/config.json"], "cannot read /no/config.json: No such file or directory"),
        (["verify", "gpt2"], "'gpt2' is not a factory"),
        (["diff", "/no/a.json", "/no/b.json"], "cannot read /no/a.json: No such file"),
        (["replay", "/no/directory"], "does not exist"),
        (["calibrate"], "Missing argument 'MODEL', or --hardware-file"),
        (["calibrate", "--hardware-file", "mine.json"], "mine.json: the name of a description"),
        (["plan", "gpt2", "--hardware", "h100-sxm"], "did you mean 'h100-sxm-80gb'?"),
        (["plan", "gpt2", "--hardware", "/no/mine.toml"], "cannot read /no/mine.toml"),
    ],
)
def test_wrong_use_returns_2_and_says_why(
    run: Callable[..., Ran], args: list[str], expected: str
) -> None:
    result = run(*args)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err


# The other commands


def test_diff_prints_what_changed(run: Callable[..., Ran], tmp_path: Path) -> None:
    gpt_plan().save(tmp_path / "a.json")
    gpt_plan(recomputed=12).save(tmp_path / "b.json")
    result = run("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert result.code == 0
    assert "recomputed values            10 -> 12" in result.out


def test_hardware_lists_every_device_with_its_memory_and_links(run: Callable[..., Ran]) -> None:
    result = run("hardware")
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert "79.6 GiB" in lines["h100-sxm-80gb"]
    assert "989.4 TFLOP/s  3350 GB/s" in lines["h100-sxm-80gb"]
    assert "8 x 450 GB/s" in lines["h100-sxm-80gb"]
    assert len(lines) == 16


def test_an_optimizer_may_be_bytes_for_a_parameter(run: Callable[..., Ran], stub: Stub) -> None:
    given = []

    def plan(*_: Any, optimizer: object, **__: Any) -> Plan:
        given.append(optimizer)
        return gpt_plan()

    stub("fxzero.forecast", plan=plan)
    assert run("plan", FACTORY, "--optimizer", "12").code == 0
    assert run("plan", FACTORY, "--optimizer", "lion").code == 0
    assert given == [12.0, "lion"]


def test_passes_lists_name_numerics_and_summary(run: Callable[..., Ran]) -> None:
    lines = run("passes").out.splitlines()
    assert [line.split()[:2] for line in lines[:8]] == [
        ["shard", "exact"],
        ["quantize", "changes"],
        ["deduplicate", "exact"],
        ["accumulate", "exact"],
        ["update", "exact"],
        ["offload", "exact"],
        ["rematerialize", "exact"],
        ["write_back", "exact"],
    ]
    assert lines[7].endswith("exact    Buffer updates become writes at the end of the forward.")


@dataclass(frozen=True)
class Verification:
    ok: bool

    def __str__(self) -> str:
        return f"equal: {self.ok}"

    def to_json(self) -> str:
        return "{}"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_verify_compiles_real_tensors_and_returns_1_where_they_differ(
    run: Callable[..., Ran], stub: Stub, tmp_path: Path, ok: bool, code: int
) -> None:
    calls = []

    def compile(model: nn.Module, args: Any, **options: Any) -> Any:
        calls.append((model, args, options))
        return types.SimpleNamespace(verify=lambda *args, **kwargs: Verification(ok))

    stub("fxzero.compiler", compile=compile)
    file = tmp_path / "report.json"
    result = run("verify", FACTORY, "--memory-budget", "1GiB", "--inner", "eager", "--json", file)
    assert file.read_text() == "{}"
    assert (result.code, result.out) == (code, f"equal: {ok}\n")
    ((model, args, options),) = calls
    assert model.weight.device.type == "cpu"
    assert args[0].device.type == "cpu"
    assert options == {"memory_budget": "1GiB", "inner": "eager"}


def test_replay_prints_what_the_runner_says(
    run: Callable[..., Ran], stub: Stub, tmp_path: Path
) -> None:
    stub("fxzero.passes.runner", replay=lambda path: f"replayed {path}")
    assert run("replay", tmp_path).out == f"replayed {tmp_path}\n"


def test_demo_passes_its_options_on(run: Callable[..., Ran], stub: Stub, tmp_path: Path) -> None:
    calls: list[Any] = []
    stub("fxzero.demo", run=lambda **options: calls.append(options))
    assert run("demo", "--memory-budget", "9MiB", "--steps", 3, "--out", tmp_path).code == 0
    assert calls == [{"memory_budget": "9MiB", "steps": 3, "out": tmp_path}]


def test_doctor_names_versions_devices_and_the_inner_compiler(run: Callable[..., Ran]) -> None:
    result = run("doctor")
    assert result.code == 0
    facts = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert facts["torch"].startswith(torch.__version__)
    assert "supported (2.11 to 2.13)" in facts["torch"]
    assert facts["inner"].split()[0] in ("inductor", "eager")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.10.1", "NOT supported"),
        ("2.11.0", "supported"),
        ("2.13.0+cu130", "supported"),
        ("2.14.0a0+git", "NOT supported"),
        ("3.0", "NOT supported"),
    ],
)
def test_doctor_knows_the_supported_versions(version: str, expected: str) -> None:
    from fxzero.report.environment import _support

    assert _support(version) == f"{expected} (2.11 to 2.13)"


def test_what_libraries_print_while_a_plan_is_made_is_no_result() -> None:
    script = (
        "import os\nfrom fxzero.cli import _results_alone\n"
        "with _results_alone():\n    os.write(1, b'noise\\n')\n"
        "print('result')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("result\n", "noise\n")
