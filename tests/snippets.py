"""Runs the fenced blocks of a page of Markdown, in order, in an empty folder.

    python tests/snippets.py docs/tutorial.md     # runs a page; without a page: what each would run

What a block is, its language says:

- ``python`` runs, all of a page in one namespace;
- ``console`` is commands after ``$`` and what they print; ``echo $?`` shows an exit code other
  than 0. ``fxzero`` runs in this process, ``python FILE`` and ``torchrun`` as others;
- ``sh``, or none with such a command in its first line, is commands alone;
- ``output`` is what the block above prints. If its last line is an error, the block above raises;
- all others are shown only.

In expected text ``...`` stands for anything, and a line of it for any lines.  Comments of HTML in
front of a block say the rest:

    <!-- run                        Python that readers need not see
    model, batch = ...
    -->
    <!-- file: train.py -->         the block lies in this file, too; Python runs from there
    <!-- processes: 2 -->           it runs in so many, with what is hidden right above it; the
                                    output is that of the first of them that lives
    <!-- exhaustive: REASON -->     it runs in `make test-all` only
    <!-- not run: REASON -->        it never does
"""

import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PROGRAMS = ("fxzero", "python", "python3", "torchrun", "make", "pip", "git")
_LANGUAGES = {"sh": "commands", "bash": "commands", "shell": "commands"} | {
    name: name for name in ("python", "console", "output")
}
_MARKS = ("file", "processes", "exhaustive", "not run")


@dataclass
class Block:
    """A fenced block: ``kind`` is "python", "console", "commands" or "shown"."""

    kind: str
    text: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)
    expected: str | None = None
    hidden: str = ""
    """Python that runs before it."""

    @property
    def runs(self):
        return self.kind != "shown" and "not run" not in self.marks


def pages():
    """README.md and all of docs/ but for notes on the design."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if ROOT / "docs" / "design" not in page.parents]


def read(page):
    """The blocks of a page."""
    from markdown_it import MarkdownIt

    blocks, marks, hidden = [], {}, ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{token.map[0] + 1}" if token.map else page.name
        if token.type == "html_block":
            for comment in re.findall(r"<!--\s*(.*?)\s*-->", token.content, re.DOTALL):
                name, _, value = (part.strip() for part in comment.partition(":"))
                if comment.startswith("run\n"):
                    hidden += comment.removeprefix("run\n") + "\n"
                elif name in _MARKS:
                    assert value, f"{where}: {name} needs a reason or a value"
                    marks[name] = value
        elif token.type == "fence":
            kind = _kind(token.info.strip(), token.content)
            if kind == "output":
                assert any(b.kind != "shown" for b in blocks[-1:]), f"{where}: output of what?"
                blocks[-1].expected = token.content
            else:
                blocks.append(Block(kind, token.content, token.map[0] + 1, marks, hidden=hidden))
                marks, hidden = {}, ""
    assert not marks, f"{page.name}: {marks} stands before no block"
    return blocks


def _kind(language, text):
    if language:
        return _LANGUAGES.get(language, "shown")
    words = text.split()
    if words[:1] == ["$"]:
        return "console"
    return "commands" if words and words[0] in _PROGRAMS else "shown"


def count(page):
    """(how many blocks run, how many of these only in `make test-all`, reasons of the others)"""
    blocks = [block for block in read(page) if block.kind != "shown"]
    dear = [block for block in blocks if block.runs and "exhaustive" in block.marks]
    reasons = [f"{b.line}: {b.marks['not run']}" for b in blocks if not b.runs]
    return len(blocks) - len(reasons), len(dear), reasons


def run(page, *, exhaustive=False):
    """Runs a page; raises AssertionError where it does not do what it shows.

    Unless ``exhaustive``, it runs as where there is no C++ compiler: generated code takes minutes.
    """
    page = Path(page)
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        before = os.getcwd()
        os.chdir(folder)
        sys.path.insert(0, folder)
        tempfile.tempdir = folder  # reproducers of planted bugs lie there
        if not exhaustive:
            os.environ["PATH"] = folder
        try:
            shell = _Shell(Path(folder).resolve(), page)
            for block in read(page):
                if not block.runs:
                    shell.write(block)
                elif exhaustive or "exhaustive" not in block.marks:
                    shell.run(block)
        finally:
            os.environ["PATH"] = path
            tempfile.tempdir = None
            sys.path.remove(folder)
            os.chdir(before)


class _Shell:
    """Runs the blocks of one page in a folder."""

    def __init__(self, folder, page):
        self.folder, self.page = folder, page
        self.module = types.ModuleType("page")
        sys.modules["page"] = self.module  # where classes of the page are

    def run(self, block):
        where = f"{self.page.name}:{block.line}"
        if "processes" in block.marks:
            printed = self._on_processes(int(block.marks["processes"]), block)
            self._check(where, block.expected, printed)
            return
        run_python(self.folder / "hidden.py", block.hidden, vars(self.module))
        path = self.write(block)
        if block.kind == "python":
            printed, error = run_python(path, block.text, vars(self.module), catch=True)
            if error and not _ends_in_an_error(block.expected):
                raise AssertionError(f"{where} raises\n{printed}") from error
            self._check(where, block.expected, printed)
        elif block.kind == "console":
            for command, expected in _commands(block.text, prompt="$ "):
                self._command(f"{where}: {command}", command, expected)
        elif block.kind == "commands":
            for command, _ in _commands(block.text, prompt=""):
                self._command(f"{where}: {command}", command, block.expected or "")

    def write(self, block):
        """The path of a block, which is written if the block is Python or names a file."""
        path = self.folder / block.marks.get("file", f"line_{block.line}.py")
        if block.kind == "python" or "file" in block.marks:
            path.write_text(block.text, encoding="utf-8")
            linecache.checkcache()
        return path

    def _command(self, where, command, expected):
        expected, _, status = expected.partition("$ echo $?\n")
        code, printed = _run_command(shlex.split(command, comments=True))
        asked = int(status or 0)
        assert code == asked, f"{where}: exits with {code}, not {asked}\n{printed}"
        self._check(where, expected or None, printed)

    def _on_processes(self, number, block):
        from pool import Pool

        with Pool(number) as pool:
            answers = pool.run(
                "snippets:run_on_rank",
                dying=range(1, number),
                folder=str(self.folder),
                hidden=block.hidden,
                text=block.text,
                raises=_ends_in_an_error(block.expected),
            )
        return next(answer for answer in answers if answer is not None)

    def _check(self, where, expected, printed):
        if expected is not None and not matches(expected, printed):
            raise AssertionError(f"{where} shows\n{expected}\nand prints\n{printed}")


def run_on_rank(folder, hidden, text, raises):
    """What a block printed in one process of several."""
    os.chdir(folder)
    module = types.ModuleType("page")
    sys.modules["page"] = module
    run_python(Path("hidden.py"), hidden, vars(module))
    printed, error = run_python(Path("block.py"), text, vars(module), catch=True)
    assert raises or not error, printed
    return printed


def run_python(path, text, namespace, *, catch=False):
    """(what it prints, the error that it raises if that is caught)"""
    out, error = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            exec(compile(text, str(path), "exec"), namespace)
        except Exception as raised:
            if not catch:
                raise
            error = raised
            print("".join(traceback.format_exception_only(error)), end="")
    return out.getvalue(), error


def _run_command(words):
    """(exit code, what is printed to both streams)"""
    if words[0] == "fxzero":
        from fxzero.cli import main

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = main(words[1:])
        return code, out.getvalue()
    if words[0] in ("python", "torchrun"):
        launcher = ["-m", "torch.distributed.run", "--standalone"] if words[0] == "torchrun" else []
        done = subprocess.run(
            [sys.executable, *launcher, *words[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""},
        )
        return done.returncode, done.stdout
    raise AssertionError(f"no way to run {shlex.join(words)}: mark it as not run, with a reason")


def _commands(text, prompt):
    """(command, what is printed after it), with backslashes joined."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(prompt) and not line.startswith("$ echo"):
            found.append((line.removeprefix(prompt), ""))
        else:
            command, printed = found[-1]
            found[-1] = command, f"{printed}{line}\n"
    return found


def _ends_in_an_error(expected):
    """Whether shown output has a line such as "fxzero.errors.BudgetError: ..."."""
    return bool(expected and re.search(r"^[\w.]*(Error|Exception)\b", expected, re.MULTILINE))


def matches(expected, printed):
    """Whether text is what a page shows, in which "..." stands for anything; empty lines aside."""
    pattern = ""
    for line in _lines(expected):
        if line.strip() == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part) for part in line.split("...")) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _lines(printed))) is not None


def _lines(text):
    return [line.rstrip() for line in text.splitlines() if line.strip()]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(Path(name).resolve())
    for page in [] if sys.argv[1:] else pages():
        ran, dear, reasons = count(page)
        print(f"{page.relative_to(ROOT)}: {ran} run, {dear} of them in make test-all only")
        print("".join(f"  not run, line {reason}\n" for reason in reasons), end="")
