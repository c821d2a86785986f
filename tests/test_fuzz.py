"""Some hundred damaged files for every loader; ``make fuzz`` has 100,000 (``tests/fuzz/run.py``).

A process of its own notes what a loader does: once it is asked, it notes until it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_RUN = Path(__file__).parent / "fuzz" / "run.py"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = (_RUN.parent, _RUN.parents[1], os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(str(each) for each in paths if each)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )


@pytest.mark.slow
def test_loaders_return_or_raise_our_errors_and_do_nothing_else() -> None:
    done = python(str(_RUN), "--inputs", "600", "--seed", "1000000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("600 inputs, 0 broke the law\n")


_BROKEN = {
    "code": "exec('x = 1')",
    "pickle": "import pickle; pickle.loads(pickle.dumps(Path('x')))",
    "command": "os.system('true')",
    "process": "subprocess.run(['true'])",
    "network": "__import__('socket').create_connection(('127.0.0.1', 9), timeout=1)",
    "secret": "(folder.parent / 'secret.json').read_text()",
    "write": "(folder.parent / 'x').write_text('')",
    "delete": "(folder.parent / 'secret.json').unlink()",
    "import": "__import__('planted')",
    "hang": "time.sleep(30)",
    "slow": "sum(range(10**8))",
    "memory": "bytearray(3 * 2**30)",
    "error": "{}['key']",
    "nameless": "raise UsageError('no file')",
}


def test_the_law_has_teeth() -> None:
    """A loader that does any of these breaks it; one that does not keeps it."""
    code = f"""
        import os, subprocess, sys, tempfile, time
        from pathlib import Path
        import fxzero, run
        from fxzero.errors import UsageError
        from guard import Guard, limit_memory

        def load(folder, _):
            if (folder / "x.json").read_bytes() != b"1":
                exec(code, globals(), {{"folder": folder}})

        def of(name):
            return run.Loader(name, 1, lambda: [{{"x.json": b"1"}}], load, 0.2, folders=False)

        with tempfile.TemporaryDirectory() as made:
            run.prepare(root := Path(made).resolve())
            limit_memory(2 * 2**30)
            guard = Guard()
            for name, text in {_BROKEN!r}.items():
                code = compile(text, fxzero.__file__, "exec")  # as if it were ours
                found = run.run(of(name), range(6), root, guard)
                print(name, len(found.failures), found.failures[:1])
            load = lambda folder, _: (folder / "x.json").read_bytes()
            print("none", len(run.run(of("none"), range(6), root, guard).failures))
    """
    done = python("-c", textwrap.dedent(code))
    failures = dict(line.split(" ", 2)[:2] for line in done.stdout.splitlines())
    assert failures.keys() == {*_BROKEN, "none"}, done.stderr[-2000:]
    assert [name for name, count in failures.items() if count == "0"] == ["none"], done.stdout
