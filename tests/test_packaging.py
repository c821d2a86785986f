"""The repository layout and what it installs as."""

import ast
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
MAPPED = ("passes", "kernels")

HELP = """
import sys
sys.argv = ["fxzero", "--help"]
from fxzero.cli import main
try:
    code = main()
except SystemExit as error:
    code = error.code
print("exit", code or 0, "torch" in sys.modules)
"""


def packages_in(folder: Path, name: str) -> set[str]:
    """The packages in a folder, without following symlinks to folders."""
    found = set()
    for path, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not (Path(path) / f).is_symlink()]
        if "__init__.py" in files:
            found.add(".".join((name, *Path(path).relative_to(folder).parts)))
    return found


def modules_in_tree() -> set[str]:
    """The Python files that a wheel should hold, by their names in it."""
    found = set()
    for name in SETUPTOOLS["packages"]:
        inside = Path(*name.split("."))
        found |= {(inside / file.name).as_posix() for file in (ROOT / inside).glob("*.py")}
    return found


def run(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def found_in_repository(name: str) -> list[str]:
    """Where in this repository a top-level module of that name is found."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return []
    places = [*(spec.submodule_search_locations or []), spec.origin or ""]
    return [p for p in places if Path(p).resolve().is_relative_to(ROOT)]


def test_listed_packages_equal_the_tree() -> None:
    in_tree = packages_in(ROOT / "fxzero", "fxzero")
    for name in MAPPED:
        in_tree |= packages_in(ROOT / name, f"fxzero.{name}")
    assert set(SETUPTOOLS["packages"]) == in_tree


def test_every_data_file_is_packaged() -> None:
    data = SETUPTOOLS["package-data"]
    packaged = {
        file
        for name, patterns in data.items()
        for pattern in patterns
        for file in ROOT.joinpath(*name.split(".")).glob(pattern)
    }
    kinds = (".toml", ".json", ".j2", ".typed")
    assert packaged == {file for file in (ROOT / "fxzero").rglob("*") if file.suffix in kinds} | {
        ROOT / "fxzero" / "py.typed"
    }


def test_mapped_folders_have_symlinks_for_editors() -> None:
    for name in MAPPED:
        assert SETUPTOOLS["package-dir"][f"fxzero.{name}"] == name
        assert os.readlink(ROOT / "fxzero" / name) == f"../{name}"


def test_no_file_puts_the_root_on_sys_path() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_kernels_init_is_a_docstring_and_nothing_else() -> None:
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert len(tree.body) == 1
    assert ast.get_docstring(tree)


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_are_not_top_level_modules(name: str) -> None:
    assert found_in_repository(name) == []


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_folders_are_not_top_level_modules_in_spawned_children(name: str) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(found_in_repository, (name,)) == []


def test_mapped_packages_import_outside_the_repository(tmp_path: Path) -> None:
    out = run(
        "import fxzero.passes, fxzero.kernels\n"
        "print(fxzero.passes.__file__)\n"
        "print(fxzero.kernels.__file__)",
        cwd=tmp_path,
    )
    expected = [ROOT / name / "__init__.py" for name in MAPPED]
    assert [Path(line).resolve() for line in out.split()] == expected


def _can_build() -> bool:
    if importlib.util.find_spec("pip") is None or importlib.util.find_spec("setuptools") is None:
        return False
    return int(version("setuptools").split(".")[0]) >= 77


@pytest.mark.slow
@pytest.mark.skipif(not _can_build(), reason="needs pip and setuptools >= 77")
def test_wheel_holds_only_fxzero(tmp_path: Path) -> None:
    # A copy, because a build leaves build/lib and *.egg-info behind.
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("fxzero", *MAPPED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--wheel-dir", tmp_path, source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")]
    info = f"fxzero-{PYPROJECT['project']['version']}.dist-info"
    assert {n.split("/")[0] for n in names} == {"fxzero", info}
    assert len(names) == len(set(names))
    assert {n for n in names if n.endswith(".py")} == modules_in_tree()
    assert "fxzero/py.typed" in names
    templates = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "fxzero/report/templates").glob("*.j2")
    }
    assert templates == {n for n in names if n.endswith(".j2")}


def test_dynamo_lists_and_loads_the_backend() -> None:
    from torch import _dynamo
    from torch._dynamo.backends.registry import lookup_backend

    assert "fxzero" in _dynamo.list_backends()
    assert callable(lookup_backend("fxzero"))


def test_help_is_fast_and_does_not_import_torch(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        out = run(HELP, cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
        assert out.splitlines()[-1] == "exit 0 False"
    assert min(seconds) < 1.0


def test_console_script_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).parent / "fxzero"
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "plan" in done.stdout
