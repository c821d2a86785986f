"""Some hundred damaged files for every loader; ``make fuzz`` has 100,000 (``tests/fuzz/run.py``).

A process of its own notes what a loader does: once it is asked, it notes until it ends.
"""

from __future__ import annotations

import ast
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
    done = python(str(_RUN), "--inputs", "300", "--seed", "1000000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("300 inputs, 0 broke the law\n")


# What a loader of ours must not do, and how the law says so.
_BROKEN = {
    "code": ("exec('x = 1')", "code '<string>' b'x = 1'"),
    "pickle": ("import pickle; pickle.loads(pickle.dumps(Path('x')))", "pickle.find_class"),
    "command": ("os.system('true')", "os.system"),
    "process": ("subprocess.run(['true'])", "subprocess.Popen"),
    "network": ("__import__('socket').create_connection(('127.0.0.1', 9))", "socket."),
    "secret": ("(folder.parent / 'secret.json').read_text()", "open "),
    "write": ("(folder.parent / 'x').write_text('')", "open "),
    "delete": ("(folder.parent / 'secret.json').unlink()", "change "),
    "import": ("__import__('planted')", "planted.py"),
    "hang": ("time.sleep(30)", "no end"),
    "slow": ("sum(range(3 * 10**7))", "s, at most 0.2"),
    "memory": ("bytearray(3 * 2**30)", "MemoryError"),
    "error": ("{}['key']", "KeyError: 'key'"),
    "nameless": ("raise UsageError('no file')", "the error names no file"),
    "nothing": ("pass", ""),
}


@pytest.mark.slow
def test_the_law_has_teeth() -> None:
    code = f"""
        import os, subprocess, tempfile, time
        from pathlib import Path
        import fxzero, run
        from fxzero.errors import UsageError
        from guard import Guard, limit_memory

        def load(folder, _):
            if (folder / "x.json").read_bytes() != b"1":
                exec(code, globals(), {{"folder": folder}})

        loader = run.Loader("x", 1, lambda: [{{"x.json": b"1"}}], load, 0.2, folders=False)
        with tempfile.TemporaryDirectory() as made:
            run.prepare(root := Path(made).resolve())
            limit_memory(2 * 2**30)
            guard = Guard()
            for text in {[text for text, _ in _BROKEN.values()]!r}:
                code = compile(text, fxzero.__file__, "exec")  # as if it were ours
                print(repr("".join(run.run(loader, range(1), root, guard).failures)))
    """
    done = python("-c", textwrap.dedent(code))
    said = done.stdout.splitlines()
    assert len(said) == len(_BROKEN), done.stderr[-2000:]
    for (name, (_, expected)), line in zip(_BROKEN.items(), said, strict=True):
        failure = ast.literal_eval(line)
        assert expected in failure, (name, failure)
        assert bool(failure) == bool(expected), (name, failure)
