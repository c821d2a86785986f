"""Every page does what it shows: its blocks run, in order, in an empty folder (snippets.py)."""

import importlib
import re
import runpy
import textwrap
from pathlib import Path

import pytest
import snippets
from pool import Pool

from fxzero.errors import FxzeroError

PAGES = snippets.pages()


def _name(page):
    return str(page.relative_to(snippets.ROOT))


def _run(page, timeout=220, **options):
    if any("processes" in block.marks for block in snippets.read(page)):
        snippets.run(page, **options)  # a process of a pool may not start another pool
        return
    with Pool(1, connected=False) as pool:
        pool.run("snippets:run", page=page, timeout=timeout, **options)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_a_page_runs_as_it_stands(page):
    if snippets.count(page)[0]:
        _run(page)


@pytest.mark.exhaustive  # minutes: models of billions of weights are traced
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if snippets.count(page)[1]], ids=_name)
def test_a_page_runs_with_its_dear_blocks(page):
    _run(page, exhaustive=True, timeout=880)


def test_most_blocks_run():
    counts = [snippets.count(page) for page in PAGES]
    ran, dear = sum(ran for ran, _, _ in counts), sum(dear for _, dear, _ in counts)
    not_run = sum(len(reasons) for _, _, reasons in counts)
    assert ran > 40
    assert dear < ran / 4
    assert not_run < ran / 4


# The runner itself.


def _page(folder, text):
    page = Path(folder) / "page.md"
    page.write_text(textwrap.dedent(text).replace("~~~", "```"), encoding="utf-8")
    return page


def test_blocks_run_in_order_and_what_they_print_is_compared(tmp_path):
    page = """
        <!-- run
        first = 1
        -->
        ~~~python
        print("a", first + 1, "b")
        print("more")
        ~~~
        ~~~output
        a ... b
        ...
        ~~~
        ~~~toml
        of = "no account"
        ~~~
        """
    snippets.run(_page(tmp_path, page))
    with pytest.raises(AssertionError, match=r"page\.md:5 shows\na \.\.\. c"):
        snippets.run(_page(tmp_path, page.replace("... b", "... c")))


def test_an_error_is_shown_or_is_one(tmp_path):
    page = """
        ~~~python
        {}["key"]
        ~~~
        """
    with pytest.raises(AssertionError, match=r"page\.md:2 raises\nKeyError: 'key'"):
        snippets.run(_page(tmp_path, page))
    shown = textwrap.dedent(page) + "~~~output\nKeyError: 'key'\n~~~\n"
    snippets.run(_page(tmp_path, shown))
    with pytest.raises(AssertionError, match="and prints"):
        snippets.run(_page(tmp_path, shown.replace('{}["key"]', "pass")))


def test_commands_run_with_their_exit_codes(tmp_path):
    page = """
        <!-- file: script.py -->
        ~~~python
        import sys

        if len(sys.argv) > 1:
            print("given", sys.argv[1])
            sys.exit(3)
        ~~~
        ~~~console
        $ python script.py given
        given given
        $ echo $?
        3
        $ fxzero passes
        ...
        ~~~
        """
    wrong = page.replace("\n        3\n", "\n        0\n")
    snippets.run(_page(tmp_path, page.replace("len(sys.argv) > 1", 'sys.argv[-1] == "given"')))
    with pytest.raises(AssertionError, match=r"python script.py given: exits with 3, not 0"):
        snippets.run(_page(tmp_path, wrong.replace("len(sys.argv) > 1", "sys.argv[-1] == 'given'")))


@pytest.mark.parametrize("fence", ["~~~", "~~~sh"])
def test_a_command_that_cannot_run_says_why(tmp_path, fence):
    page = f"{fence}\nmake demo\n~~~\n"
    with pytest.raises(AssertionError, match="no way to run make demo: mark it as not run"):
        snippets.run(_page(tmp_path, page))
    with pytest.raises(AssertionError, match="not run needs a reason"):
        snippets.run(_page(tmp_path, "<!-- not run: -->\n" + page))
    snippets.run(_page(tmp_path, "<!-- not run: it installs -->\n\n" + page))
    assert snippets.count(_page(tmp_path, "<!-- not run: it installs -->\n\n" + page)) == (
        0,
        0,
        ["3: it installs"],
    )


def test_a_mark_without_a_block_is_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="stands before no block"):
        snippets.read(_page(tmp_path, "<!-- file: a.py -->\n"))


# Links and error pages.


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{_name(page)} links to {target}"


def _codes():
    """The codes of all errors and their classes."""
    found, kinds = {}, [FxzeroError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.setdefault(kind.code, kind)
    return found


def test_every_code_has_a_page_and_every_page_a_code():
    importlib.import_module("fxzero.monitor")
    folder = snippets.ROOT / "docs" / "errors"
    codes = {code: kind for code, kind in _codes().items() if kind is not FxzeroError}
    assert {page.stem for page in folder.glob("*.md")} == {*codes, "README"}
    index = (folder / "README.md").read_text(encoding="utf-8")
    for code, kind in codes.items():
        title, _, text = (folder / f"{code}.md").read_text(encoding="utf-8").partition("\n")
        meaning = title.removeprefix(f"# {code}: ")
        assert f"| [{code}]({code}.md) | `{kind.__name__}` | {meaning}" in index
        assert kind.__name__ in text
        assert f"[{code}]" in text, f"{code}.md shows no message"


def test_every_code_stands_once_and_in_one_file():
    written = re.compile(r'code\b.*= "(FXZ\d+)"')
    folders = [snippets.ROOT / name for name in ("fxzero", "passes", "kernels")]
    sources = [path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py")]
    assert sorted(code for text in sources for code in written.findall(text)) == sorted(_codes())


def test_the_index_has_every_page():
    index = snippets.ROOT / "docs" / "README.md"
    linked = re.findall(r"\]\(([^)#\s]+)", index.read_text(encoding="utf-8"))
    found = {(index.parent / target).resolve() for target in linked}
    errors = snippets.ROOT / "docs" / "errors"
    missing = [page for page in PAGES if page.resolve() not in found and page.parent != errors]
    assert [_name(page) for page in missing] == [_name(index)]


@pytest.mark.exhaustive  # 8 s of plans; only the tested version of torch gives the same bytes
def test_the_pictures_are_drawn_from_plans():
    script = runpy.run_path(str(snippets.ROOT / "docs" / "images" / "residency.py"))
    for name, draw in (("budgets", script["budgets"]), ("gathers", script["gathers"])):
        picture = snippets.ROOT / "docs" / "images" / f"residency-{name}.svg"
        assert draw() == picture.read_text(encoding="utf-8")
