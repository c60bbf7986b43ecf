"""The chores of the checkout, as make runs them."""
import subprocess
import sys

import pytest

from ddrepro.share import project_root

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="ddrepro runs from a wheel here; its chores need a checkout")


def chore(*words):
    return subprocess.run([sys.executable, "-m", "ddrepro.project", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_chapter_that_is_not_there_is_an_error():
    done = chore("test", "01_shaer")
    assert done.returncode == 2
    assert "the nearest is '01_share'" in done.stderr


def test_chapters_are_executed_and_saved(tmp_path):
    "A chapter in a project of its own: directives are honoured, outputs saved, a failing chapter left as it was"
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    (tmp_path / "nbs").mkdir()
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    good = new_notebook(cells=[new_code_cell("6 * 7"), new_code_cell("#| eval: false\n1 / 0"), new_code_cell("#| slow\n1 / 0")], metadata=kernel)
    nbformat.write(good, tmp_path / "nbs/00_good.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")], metadata=kernel), tmp_path / "nbs/01_bad.ipynb")
    before = (tmp_path / "nbs/01_bad.ipynb").read_bytes()

    code = "import sys; from pathlib import Path; from ddrepro.project import run_chapters\nif __name__ == '__main__': sys.exit(run_chapters([], Path.cwd()))"
    (tmp_path / "go.py").write_text(code)
    done = subprocess.run([sys.executable, "go.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "failed 01_bad.ipynb" in done.stdout

    cells = nbformat.read(tmp_path / "nbs/00_good.ipynb", as_version=4).cells
    assert cells[0].outputs[0].data["text/plain"] == "42"
    assert [c.outputs for c in cells[1:]] == [[], []]
    assert (tmp_path / "nbs/01_bad.ipynb").read_bytes() == before
