"""No module of ours loads pickles or runs what it reads: a scan of the sources.

Each allowed place stands below with its reason; one that is gone must be taken off the list.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("fxzero", "passes", "kernels")
_SOURCES = sorted(path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*.py"))

# Whatever is called by the last of these names, or imported from these modules.
_CALLS = {
    *("eval", "exec", "compile", "__import__", "import_module", "run_module", "run_path"),
    *("exec_module", "Unpickler", "find_class", "all_gather_object"),
    *("broadcast_object_list", "gather_object", "scatter_object_list", "recv_object_list"),
    *("system", "popen", "Popen", "check_output", "check_call", "spawn", "load_library"),
    *("unsafe_load", "full_load", "from_pretrained", "urlopen", "hf_hub_download", "torch.load"),
    *("pickle.load", "pickle.loads", "marshal.loads", "dill.loads", "numpy.load", "np.load"),
    *("json.load", "json.loads", "tomllib.load", "tomllib.loads", "yaml.load", "jit.load"),
    *("safe_open", "load_file"),
}
_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "subprocess",
            "socket", "runpy", "importlib", "ctypes", "urllib", "http", "requests"}  # fmt: skip

ALLOWED = {
    # Imports
    ("fxzero/__init__.py", "import_module"): "modules of fxzero itself, by names in its table",
    ("fxzero/__init__.py", "import importlib"): "the same",
    ("fxzero/integrations/__init__.py", "import_module"): "the same",
    ("fxzero/integrations/__init__.py", "import importlib"): "the same",
    ("fxzero/_torch.py", "import importlib"): "asks whether a module of torch is there",
    ("fxzero/_inductor.py", "import importlib"): "asks whether Triton is there",
    ("fxzero/report/environment.py", "import importlib"): "versions of libraries, for the doctor",
    ("fxzero/sources.py", "import_module"): "package.module:factory is the user's code, by design",
    ("fxzero/sources.py", "import importlib"): "the same",
    # Code that we write ourselves
    ("fxzero/generated.py", "compile"): "what Inductor wrote of a graph, without its kernels",
    ("fxzero/generated.py", "exec"): "the same",
    ("fxzero/execution.py", "compile"): "a graph as a function; its names are identifiers",
    ("fxzero/execution.py", "exec"): "the same",
    # Servers
    (
        "fxzero/monitor/prometheus.py",
        "import http",
    ): "serves figures on loopback",
    # Pickles
    ("fxzero/report/memory_viz.py", "import pickle"): "writes one, which is what memory_viz reads",
    ("fxzero/agreement.py", "all_gather_object"): "ranks of one job, which run the same code",
    ("fxzero/agreement.py", "broadcast_object_list"): "the same",
    ("fxzero/checkpoint/team.py", "all_gather_object"): "the same",
    # Data
    ("fxzero/documents.py", "json.loads"): "the one reader of JSON from outside",
    ("fxzero/documents.py", "tomllib.loads"): "the one reader of TOML from outside",
    ("fxzero/pipelining/planning.py", "json.loads"): "what another rank of the job chose",
    ("fxzero/checkpoint/tensor_files.py", "safe_open"): "the one reader of safetensors files",
}


def uses(tree: ast.AST) -> Iterator[str]:
    """Calls by name, 'eval' or 'json.loads', and imports of modules: 'import pickle'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Name(id=name) if name in _CALLS:
                    yield name
                case ast.Attribute(value=ast.Name(id="re" | "fxzero"), attr="compile"):
                    pass  # a regular expression, or a model
                case ast.Attribute(attr=name) if name in _CALLS:
                    yield name
                case ast.Attribute(value=ast.Name(id=of), attr=name) if f"{of}.{name}" in _CALLS:
                    yield f"{of}.{name}"
                case ast.Attribute(value=ast.Attribute(attr=of), attr=name) if (
                    f"{of}.{name}" in _CALLS
                ):
                    yield f"{of}.{name}"
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if (top := name.partition(".")[0]) in _MODULES:
                yield f"import {top}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("eval('1')", ["eval"]),
        ("import pickle", ["import pickle"]),
        ("from pickle import loads as f", ["import pickle"]),
        ("torch.load(path)", ["torch.load"]),
        ("x.torch.load(path, weights_only=True)", ["torch.load"]),
        ("os.system('ls')", ["system"]),
        ("json.loads(text)", ["json.loads"]),
        ("builtins.exec(code)", ["exec"]),
        ("re.compile('x')", []),
        ("fxzero.compile(model)", []),
        ("Plan.load(path)", []),
        ("model.eval_mode()", []),
    ],
)
def test_the_scan_finds(code: str, expected: list[str]) -> None:
    assert list(uses(ast.parse(code))) == expected


def test_nothing_that_is_read_is_run() -> None:
    found = {
        (str(path.relative_to(_ROOT)), use)
        for path in _SOURCES
        for use in uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(_SOURCES) > 150
    assert sorted(found - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - found) == []
