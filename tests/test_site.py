"""The documentation site: pages from notebooks, methods from the registry, links that lead somewhere."""
import json
import re
import subprocess
import sys

import pytest

from ddrepro.core.share import project_root
from ddrepro.methods import registered
from ddrepro.site.build import build_site, page_sources, sections, site_of, write_sources
from ddrepro.site.links import broken_links
from ddrepro.site.method_pages import committed_rows, method_page, printed_cells
from ddrepro.site.pages import page_link, with_callouts

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="ddrepro runs from a wheel here; the site needs a checkout")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Two pages of the site, built"
    pytest.importorskip("myst_nb", reason="the site needs the extra docs")
    pytest.importorskip("furo", reason="the site needs the extra docs")
    target = tmp_path_factory.mktemp("site") / "html"
    assert build_site(ROOT, target, ["distill/03_losses", "guide/start"]) == 0
    return target


def test_a_build_leaves_nothing_in_the_checkout(built):
    assert not (ROOT / "jupyter_execute").exists()
    assert not (built.parent / "html_pages_html").exists()


def test_a_chapter_has_formulas_callouts_and_definitions(built):
    page = (built / "distill/03_losses.html").read_text()
    assert "<math" in page and not re.search(r"<script[^>]*mathjax", page, re.I)
    assert 'class="admonition note"' in page
    assert 'id="covariance_loss"' in page and "(C, B, d), or a list of (B_c, d)" in page
    assert "#| export" not in page and ":::" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    assert "nbdev_export" not in page


def test_pages_fetch_nothing_from_elsewhere(built):
    for name in ("distill/03_losses.html", "guide/start.html", "index.html", "search.html"):
        page = (built / name).read_text()
        assert not re.findall(r"""<(?:script|img|iframe)[^>]*\bsrc=["'](?:https?:)?//""", page), name
        assert not re.findall(r"""<link[^>]*rel=["']stylesheet["'][^>]*href=["'](?:https?:)?//""", page), name


def test_search_knows_functions(built):
    index = (built / "searchindex.js").read_text()
    assert "covariance_loss" in index


def test_links_to_pages_that_were_left_out_are_found(built):
    "With two of all pages built the check has much to complain of, and it is right"
    faults = broken_links(built)
    assert any("papers/deviations.html#D-DSDM-1 is not there" in fault for fault in faults)
    assert not any(fault.startswith("guide/start.html: ../distill/03_losses") for fault in faults)
    missing = {fault.split(": ")[1].removesuffix(" is not there") for fault in faults if fault.endswith("is not there")}
    assert all(target.partition("#")[0].endswith(".html") for target in missing)


def test_links_between_made_up_pages(tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="top-of-a">A</h1><a href="b.html#part">b</a><img src="p.png" srcset="q.png 2x"><a href="mailto:x@y">m</a>')
    (tmp_path / "b.html").write_text('<a name="part"></a><a href="a.html#none">a</a><a href="/root.html">r</a><a href="c.html">c</a>')
    assert broken_links(tmp_path) == ["a.html: p.png is not there", "a.html: q.png is not there", "b.html: a.html#none has no such place",
                                      "b.html: /root.html leads out of the site", "b.html: c.html is not there"]
    for name in ("p.png", "q.png", "c.html"): (tmp_path / name).write_text("")
    (tmp_path / "b.html").write_text('<a name="part"></a><a href="a.html#top-of-a">a</a>')
    assert broken_links(tmp_path) == []


def test_an_empty_or_missing_site_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make docs"): broken_links(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"): broken_links(tmp_path / "none")


def test_every_method_has_a_page_with_its_parts():
    rows = committed_rows()
    assert len(rows) > 500
    for name in registered():
        page = method_page(name, rows)
        for part in ("## What it is", "## Run it", "## Hyper-parameters", "## Ours beside published"): assert part in page, (name, part)
        meanings = re.findall(r"^\| `\w+` \| `[^|]*` \| `[^|]*` \| ?(.*?) ?\|$", page, re.M)
        assert meanings and all(meanings), f"a hyper-parameter of {name} says nothing"


def test_numbers_of_a_page_are_those_of_the_rows():
    rows = committed_rows()
    own = rows[(rows.file == "reports/cells/cifar10_dm_ipc1_draws100.csv") & (rows.part == "test")].accuracy
    line = f"| cifar10 | 1 | image | {own.mean():.1f} ± {own.std(ddof=0):.1f} |"
    page = method_page("dm", rows)
    assert line in page
    printed = printed_cells("dm")
    value = printed[(printed.dataset == "cifar10") & (printed.ipc == "1")].published.iloc[0]
    assert f"| {value} | published | dc |" in page[page.index(line):].splitlines()[0]


def test_every_notebook_is_on_the_site_and_in_the_contents(tmp_path):
    listed = [path for paths in sections(ROOT).values() for path in paths]
    notebooks = [path for path in page_sources(ROOT) if path.endswith(".ipynb")]
    assert sorted(listed) == sorted(notebooks)
    pages = site_of(ROOT).pages
    assert pages["methods/dm.ipynb"] == "methods/dm" and pages["guide/index.md"] == "index"
    assert len(set(pages.values())) == len(pages)


def test_no_link_of_the_prose_is_left_to_the_repository_by_mistake():
    "A link to a notebook or guide that does not exist would become one to the repository"
    site = site_of(ROOT)
    for path, file in page_sources(ROOT).items():
        if not path.endswith(".md"): continue
        for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
            link = page_link(target, path, site)
            if link.startswith(site.repository): assert (ROOT / link.removeprefix(site.repository + "/").partition("#")[0]).exists(), (path, target)


def test_a_misspelt_page_is_refused():
    done = subprocess.run([sys.executable, "-m", "ddrepro.project", "docs", "methods/dmm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the nearest is 'methods/dm'" in done.stderr


def test_chapters_have_no_fences_and_no_front_matter_that_shows():
    for file in page_sources(ROOT).values():
        if file.suffix != ".ipynb": continue
        cells = json.loads(file.read_text())["cells"]
        assert not [c for c in cells if c["cell_type"] == "raw"], f"{file.name} shows a raw cell"
        assert not [c for c in cells if c["cell_type"] == "markdown" and re.search(r"^:{3,}", "".join(c["source"]), re.M)], file.name


def test_notebooks_that_run_papers_are_still_skipped_by_nbdev_test():
    from nbdev.test import test_nb
    for name in ("avdd", "dsdm", "vldd"): assert test_nb(ROOT / f"nbs/repro_{name}.ipynb") == (True, 0)


def test_callouts_of_two_kinds():
    text = with_callouts("> **Note**\n>\n> a\n\n> **Warning**\n>\n> b\n> c\n")
    assert text == "::::{note}\na\n::::\n\n::::{warning}\nb\nc\n::::\n"


def test_sources_of_a_subset(tmp_path):
    assert write_sources(ROOT, tmp_path / "pages", ["methods/dm"]) == ["index", "methods/dm"]
    assert "html_theme = 'furo'" in (tmp_path / "pages/conf.py").read_text()


def test_pages_can_be_used_by_the_keyboard(built):
    page = (built / "distill/03_losses.html").read_text()
    assert "<pre>" not in page and '<pre tabindex="0">' in page
    assert not re.search(r'role="heading"(?! aria-level)', page)
    images = re.findall(r"<img[^>]*>", page)
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
