"""docs/performance.md is what its script writes from the results that lie in benchmarks/."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "performance_page.py"
    spec = importlib.util.spec_from_file_location("performance_page", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_script_writes(script):
    committed = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert committed == script.page(ROOT / "benchmarks" / "results")


def test_every_kind_of_result_has_a_section_and_every_section_a_script(script):
    written = script.page(ROOT / "benchmarks" / "results")
    assert "## More" not in written
    for section in script._SECTIONS:
        if f"## {section.title}\n" in written:
            assert (ROOT / "benchmarks" / section.script).exists()


def test_the_newest_of_each_kind_is_shown_with_its_versions(script, tmp_path):
    for date, cell in (("2026-01-02", "older"), ("2026-01-03", "newer")):
        (tmp_path / f"{date}-forecast.md").write_text(f"| a |\n|---|\n| {cell} |\n\n| b |\n")
    document = {"versions": {"torch": "2.13"}, "machine": {"cpu": "A", "cores": 2}}
    (tmp_path / "2026-01-03-forecast.json").write_text(json.dumps(document))
    (tmp_path / "2026-01-03-strange.md").write_text("| c |\n" * 40)
    page = script.page(tmp_path)
    assert "| newer |" in page
    assert "older" not in page
    assert "| b |" not in page
    assert "**forecast**, 2026-01-03, torch 2.13 (" in page
    assert "A, 2 cores. No result of a GPU" in page
    assert page.endswith("results/2026-01-03-strange.md))\n\n")


def test_a_result_of_a_gpu_is_announced(script, tmp_path):
    (tmp_path / "2026-01-03-gpt2-cuda.md").write_text("| a |\n|---|\n| b |\n")
    machine = {"cpu": "A", "cores": 2, "accelerator": "H100"}
    (tmp_path / "2026-01-03-gpt2-cuda.json").write_text(json.dumps({"machine": machine}))
    assert "No result of a GPU" not in script.page(tmp_path)
