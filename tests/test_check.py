"""``fxzero plan --check``: budget files, verdicts, what grew, and the patch, on plans by hand."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import MiB, gpt_plan

from fxzero.budget_file import Accepted, BudgetFile, Limits, _at_least
from fxzero.cli import main
from fxzero.errors import UsageError
from fxzero.plans import Plan, Value
from fxzero.report.check import exceeded, growths, render
from fxzero.units import parse_budget

DOCS = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "ci.md"
LIMITS = '# ours\n[plan]\nmodel = "gpt2"  # small\n\n[limits]\npeak = "6 GiB"   # of 24\n'


def written(path: Path, text: str = LIMITS, plan: Plan | None = None) -> BudgetFile:
    """A budget file, with a plan accepted in it."""
    path.write_text(text)
    if plan is not None:
        path.write_text(BudgetFile.read(path).updated(plan, {}))
    return BudgetFile.read(path)


def grown(plan: Plan, factor: int = 4) -> Plan:
    """The same with larger logits."""
    old = next(value for value in plan.peak.alive if value.name == "mm")
    new = dataclasses.replace(old, bytes=factor * old.bytes, shape="float32[8, 4096, 50257]")
    alive = tuple(new if value is old else value for value in plan.peak.alive)
    more = plan.peak_bytes + new.bytes - old.bytes
    peak = dataclasses.replace(plan.peak, bytes=more, alive=alive)
    return dataclasses.replace(plan, peak=peak, peak_bytes=more)


def without_budget(**changes: Any) -> Plan:
    return gpt_plan(budget=None, **changes)


# The file


def test_what_is_accepted_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = without_budget()
    file = written(tmp_path / "budget.toml", plan=plan)
    assert file.accepted == Accepted.of(plan)
    assert file.limits == Limits(peak="6 GiB")
    assert file.plan == {"model": "gpt2"}
    assert file.updated(plan, {}) == file.text


def test_recorded_values_are_sorted_and_few(tmp_path: Path) -> None:
    text = written(tmp_path / "budget.toml", plan=without_budget()).text
    names = re.findall(r'^"(.*?)" = \{', text, re.MULTILINE)
    assert names == sorted(names)
    assert 5 < len(names) <= 12
    assert (
        '"lm_head mm, temporary" = { size = "1.53 GiB", count = 1, '
        'shape = "float32[8, 1024, 50257]", line = "modeling_gpt2.py:712" }'
    ) in text
    assert '"transformer.h.#.mlp.c_fc addmm, saved" = { size = "1.12 GiB", count = 12,' in text


def test_comments_and_limits_that_hold_stay_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path / "budget.toml", plan=without_budget())
    assert file.text.startswith(LIMITS)


def test_only_the_limits_that_are_exceeded_are_raised(tmp_path: Path) -> None:
    text = LIMITS + "step_seconds = 1.0\n"
    plan = without_budget()
    file = written(tmp_path / "budget.toml", text, plan)
    assert 'peak = "6 GiB"   # of 24\n' in file.text
    assert file.limits.step_seconds == 1.98
    assert not exceeded(file, plan)


@pytest.mark.parametrize("size", [1, 999, 1024**2 + 1, 5_368_709_121, 10_687_283_201, 3 * 10**12])
def test_a_raised_limit_is_large_enough_and_hardly_larger(size: int) -> None:
    limit = parse_budget(_at_least(size))
    assert limit is not None
    assert size <= limit <= 1.02 * size + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plan", "is not TOML"),
        ("[limit]\n", "unknown table 'limit'; known: plan, limits, accepted"),
        ("limits = 3\n", "limits must be an object, not int"),
        ("[limits]\npaek = '1GiB'\n", "limits: missing [], unknown ['paek']"),
        ("[limits]\npeak = 3\n", "limits.peak must be str, not int"),
        ("[limits]\npeak = '-3GiB'\n", "limits.peak='-3GiB' must be a positive size"),
        ("[limits]\npeak = '90%'\n", "limits.peak='90%' must be a positive size"),
        ("[limits]\nmemory_budget = '0GiB'\n", "limits.memory_budget='0GiB' must be a positive"),
        ("[limits]\nstep_seconds = 0\n", "limits.step_seconds=0.0 must be a positive number"),
        ("[limits]\nstep_seconds = nan\n", "limits.step_seconds=nan must be a positive number"),
        ("[limits]\nstep_seconds = '1 s'\n", "limits.step_seconds must be float, not str"),
        ("plan = 'gpt2'\n", "plan must be an object, not str"),
        ("[plan]\nmemory_budget = '1GiB'\n", "plan.memory_budget belongs to the table [limits]"),
        ("[accepted]\npeak = '1GiB'\n", "accepted: missing ['step_seconds', 'values']"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_names_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        BudgetFile.read(path)
    assert str(caught.value).startswith(f"[FXZ101] {path}")
    assert message in str(caught.value)


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    with pytest.raises(UsageError, match="cannot read"):
        BudgetFile.read(path)
    path.write_text("#" * 2**21)
    with pytest.raises(UsageError, match="2097152 bytes, more than the 65536 that are read"):
        BudgetFile.read(path)


def test_tables_after_the_accepted_ones_are_not_lost_but_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "budget.toml", plan=without_budget())
    file = written(file.path, file.text + "\n[plan.more]\n")
    with pytest.raises(UsageError, match="must stand before"):
        file.updated(without_budget(), {})


def test_limits_in_another_notation_are_to_be_raised_by_hand(tmp_path: Path) -> None:
    file = written(tmp_path / "budget.toml", 'limits = { peak = "1GiB" }\n')
    with pytest.raises(UsageError, match="a line of its own"):
        file.updated(without_budget(), {})


# The verdict


def test_a_model_within_its_budget_is_one_line(tmp_path: Path) -> None:
    plan = without_budget()
    file = written(tmp_path / "budget.toml", plan=plan)
    assert exceeded(file, plan) == []
    assert render(file, plan, file.text) == (
        f"{file.path}: gpt2 within its budget, peak 4.62 GiB, step 1.98 s modelled"
    )


def test_a_model_that_outgrew_its_budget_names_the_tensor_and_gives_a_patch(tmp_path: Path) -> None:
    file = written(tmp_path / "budget.toml", plan=without_budget())
    plan = grown(without_budget())
    assert exceeded(file, plan) == ["peak           6.00 GiB, planned 9.22 GiB"]
    (growth,) = growths(file, plan)
    assert (growth.name, growth.least) == ("lm_head mm, temporary", pytest.approx(4713 * MiB, 1e-2))
    text = render(file, plan, file.updated(plan, {}))
    assert "gpt2 OUTGREW its budget, peak 9.22 GiB" in text.splitlines()[0]
    assert " +4.61 GiB  lm_head mm, temporary  modeling_gpt2.py:712\n" in text
    assert "float32[8, 1024, 50257] -> float32[8, 4096, 50257], 1.53 GiB -> 6.14 GiB\n" in text
    assert '-peak = "6 GiB"   # of 24\n+peak = "9.22 GiB"   # of 24\n' in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_report_is_a_patch_that_git_applies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(Path("budget.toml"), plan=without_budget())
    plan = grown(without_budget())
    updated = file.updated(plan, {})
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(
        ["git", "apply"], input=render(file, plan, updated) + "\n", text=True, check=True
    )
    assert file.path.read_text() == updated
    assert not exceeded(BudgetFile.read(file.path), plan)


def test_a_budget_that_nothing_meets_is_exceeded(tmp_path: Path) -> None:
    text = LIMITS.replace("peak", "memory_budget")
    plan = grown(gpt_plan(budget=6 * 1024 * MiB, status="infeasible"))
    file = written(tmp_path / "budget.toml", text, None)
    (sentence,) = exceeded(file, plan)
    assert sentence.startswith("memory_budget  6.00 GiB, the smallest with a plan is 4.")
    limits = tomllib.loads(file.updated(plan, {}))["limits"]
    assert (parse_budget(limits["memory_budget"]) or 0) >= plan.minimum_budget


def test_more_layers_are_named_by_their_number(tmp_path: Path) -> None:
    plan = without_budget()
    file = written(tmp_path / "budget.toml", plan=plan)
    layer = next(v for v in plan.peak.alive if v.module == "transformer.h.0.mlp.c_fc")
    more = [
        dataclasses.replace(layer, module=f"transformer.h.{i}.mlp.c_fc", name="addmm_99")
        for i in (12, 13)
    ]
    alive = (*plan.peak.alive, *more)
    plan = dataclasses.replace(plan, peak=dataclasses.replace(plan.peak, alive=alive))
    (growth,) = growths(file, plan)
    assert (growth.before and growth.before.count, growth.after.count) == (12, 14)


def test_gathered_parameters_of_all_layers_are_one_line_whatever_their_numbers() -> None:
    def names(first: int) -> list[str]:
        values = tuple(
            Value(f"primals_{first + 9 * i}_gathered", MiB, "f", f"h.{i}.mlp", "", "saved")
            for i in range(3)
        )
        plan = without_budget()
        peak = dataclasses.replace(plan.peak, alive=values)
        return list(Accepted.of(dataclasses.replace(plan, peak=peak, peak_bytes=MiB)).values)

    assert names(7) == names(11) == ["h.#.mlp primals_gathered, saved"]


def test_what_was_too_small_to_be_recorded_counts_only_as_far_as_it_surely_grew(
    tmp_path: Path,
) -> None:
    plan = without_budget()
    values = [Value(f"v{i}", 100 * MiB + i, "float32[8]", "", "", "saved") for i in range(20)]
    many = dataclasses.replace(plan, peak=dataclasses.replace(plan.peak, alive=tuple(values)))
    file = written(tmp_path / "budget.toml", plan=many)
    assert growths(file, many) == []
    larger = tuple(dataclasses.replace(v, bytes=150 * MiB) for v in values)
    many = dataclasses.replace(many, peak=dataclasses.replace(plan.peak, alive=larger))
    assert {growth.least for growth in growths(file, many)} == {50 * MiB}


# The command


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def ran(*args: Any) -> tuple[int, str, str]:
        code = main([str(arg) for arg in args])
        return (code, *capsys.readouterr())

    return ran


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each plan that the command makes; planning itself is left out."""
    calls: list[dict[str, Any]] = []

    def make(**options: Any) -> Plan:
        calls.append(options)
        return grown(without_budget()) if options["batch"] == 32 else without_budget()

    monkeypatch.setattr("fxzero.cli._make_plan", make)
    return calls


def test_options_of_the_file_are_defaults_that_the_command_line_overrides(
    run: Any, planned: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(
        '[plan]\nmodel = "gpt2"\nbatch = 8\nzero = 3\noffload = true\nmesh = "dp=8"\n'
        '[limits]\nmemory_budget = "24GiB"\n'
    )
    assert run("plan", "--check", path)[0] == 0
    assert run("plan", "gpt2-xl", "--batch", 4, "--check", path, "--memory-budget", "1GiB")[0] == 0
    names = ("model", "batch", "zero", "offload", "mesh", "memory_budget")
    assert [tuple(options[name] for name in names) for options in planned] == [
        ("gpt2", 8, "3", True, "dp=8", "24GiB"),
        ("gpt2-xl", 4, "3", True, "dp=8", "1GiB"),
    ]


@pytest.mark.usefixtures("planned")
def test_accept_writes_a_file_that_holds_until_the_model_outgrows_it(
    run: Any, tmp_path: Path
) -> None:
    path = tmp_path / "budget.toml"
    code, out, err = run("plan", "gpt2", "--batch", 8, "--check", path, "--accept")
    assert (code, out, err) == (0, "", f"wrote {path}\n")
    assert tomllib.loads(path.read_text())["plan"] == {"model": "gpt2", "batch": 8}
    assert run("plan", "--check", path)[0] == 0
    path.write_text(path.read_text().replace("batch = 8", "batch = 32"))
    code, out, _ = run("plan", "--check", path)
    assert code == 3
    assert "lm_head mm, temporary" in out
    assert run("plan", "--check", path, "--accept")[0] == 0
    assert run("plan", "--check", path)[0] == 0


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        ("", [], "Missing argument 'MODEL'"),
        ("bacth = 3", ["gpt2"], "plan: unknown option 'bacth'; did you mean 'batch'?"),
        ("json = 'x'", ["gpt2"], "plan: unknown option 'json'"),
        ("batch = '3'", ["gpt2"], "plan.batch must be int, not str"),
        ("batch = 0", ["gpt2"], "plan.batch=0 must be positive"),
        ("offload = 1", ["gpt2"], "plan.offload must be bool, not int"),
        ("zero = 7", ["gpt2"], "plan.zero: '7' is not one of"),
        ("mesh = [8]", ["gpt2"], "plan.mesh must be str, not list"),
        ("model = 'gpt2'", ["--batch", "3", "--accept"], "--accept beside --batch: "),
    ],
)
@pytest.mark.usefixtures("planned")
def test_wrong_use_is_one_clear_line(
    run: Any, tmp_path: Path, plan: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "budget.toml"
    path.write_text(f"[plan]\n{plan}\n")
    code, _, err = run("plan", *arguments, "--check", path)
    assert code == 2
    assert message in err


@pytest.mark.usefixtures("planned")
def test_check_and_accept_say_what_they_need(run: Any, tmp_path: Path) -> None:
    code, _, err = run("plan", "gpt2", "--accept")
    assert (code, "--accept is for the file of --check" in err) == (2, True)
    code, _, err = run("plan", "gpt2", "--check", tmp_path / "none.toml")
    assert (code, "no such file, or an empty one" in err) == (2, True)


# The documentation


@pytest.mark.slow
def test_the_documentation_is_what_the_command_does(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = DOCS.read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (report,) = re.findall(r"```\n(budget.toml: .*?)\.\.\.\n```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("train.py").write_text(code)
    (write,) = re.findall(r"^fxzero (plan train:make .* --accept)$", text, re.MULTILINE)
    assert run(*write.split())[0] == 0
    assert Path("budget.toml").read_text() == toml
    assert "run: fxzero plan --check budget.toml\n" in text
    assert run("plan", "--check", "budget.toml")[0] == 0
    monkeypatch.delitem(sys.modules, "train")
    Path("train.py").write_text(code.replace("1024", "1536") + "\n# another size than the cached")
    importlib.invalidate_caches()
    code, out, _ = run("plan", "--check", "budget.toml")
    assert code == 3
    assert out.startswith(report)
    monkeypatch.delitem(sys.modules, "train")
