"""The chores of the checkout, as make runs them."""
import re
import subprocess
import sys

import pytest

from ddrepro.core.checkout import notebooks_in
from ddrepro.core.share import project_root
from helpers import KERNEL

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="ddrepro runs from a wheel here; its chores need a checkout")


def chore(*words):
    command = [sys.executable, "-m", "ddrepro.project", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_chapter_that_is_not_there_is_an_error():
    done = chore("test", "02_shaer")
    assert done.returncode == 2
    assert "the nearest is '02_share'" in done.stderr


GO = """
import sys
from pathlib import Path
from ddrepro.project import run_chapters
if __name__ == "__main__": sys.exit(run_chapters([], Path.cwd()))
"""


def test_chapters_are_executed_and_saved(tmp_path):
    "A chapter in a project of its own: directives are honoured, outputs saved, a failing chapter left as it was"
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    (tmp_path / "nbs/core").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    good = ["6 * 7", "#| eval: false\n1 / 0", "#| slow\n1 / 0"]
    for path, sources in (("core/00_good", good), ("01_bad", ["1 / 0"])):
        notebook = new_notebook(cells=list(map(new_code_cell, sources)), metadata=KERNEL)
        nbformat.write(notebook, tmp_path / f"nbs/{path}.ipynb")
    before = (tmp_path / "nbs/01_bad.ipynb").read_bytes()
    (tmp_path / "go.py").write_text(GO)
    done = subprocess.run([sys.executable, "go.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "failed 01_bad.ipynb" in done.stdout

    cells = nbformat.read(tmp_path / "nbs/core/00_good.ipynb", as_version=4).cells
    assert cells[0].outputs[0].data["text/plain"] == "42"
    assert [c.outputs for c in cells[1:]] == [[], []]
    assert (tmp_path / "nbs/01_bad.ipynb").read_bytes() == before


def test_the_sidebar_names_every_chapter_once():
    nbs = ROOT / "nbs"
    named = re.findall(r"^ *- ([\w/]+\.ipynb)$", (nbs / "sidebar.yml").read_text(), re.M)
    assert sorted(named) == sorted(f.relative_to(nbs).as_posix() for f in notebooks_in(nbs).values())
