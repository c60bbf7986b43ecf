"""Bare papermill must refuse what a notebook does not declare, before it computes."""
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from helpers import KERNEL


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    "A notebook with cells before its parameters, and a file it writes once it computes"
    path = tmp_path_factory.mktemp("guard") / "tiny.ipynb"
    parameters = [
        "ipc: int = 10  # synthetic examples a class",
        "methods: list[str] = ['dm']  # rows",
        "rate: float = 0.1",
        "device: str | None = None",
    ]
    cells = [
        new_code_cell("from pathlib import Path\nfrom ddrepro.report.parameters import guard_parameters"),
        new_code_cell("\n".join(parameters), metadata={"tags": ["parameters"]}),
        new_code_cell("params = guard_parameters()"),
        new_code_cell("Path('computed').write_text(repr(params))"),
    ]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def papermill(notebook, folder, *words):
    "Run papermill in a folder of its own; the finished process and what the notebook computed"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), "out.ipynb", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    computed = folder / "computed"
    return done, computed.read_text() if computed.exists() else None


@pytest.mark.parametrize("words, message", [
    (["-p", "icp", "3"], "got 'icp'; the nearest is 'ipc'"),
    (["-p", "ipc", "ten"], "parameter 'ipc' must be int; got 'ten'"),
    (["-p", "ipc", "2.5"], "parameter 'ipc' must be int; got 2.5, which is float"),
])
def test_refused_before_computing(notebook, tmp_path, words, message):
    done, computed = papermill(notebook, tmp_path, *words)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert computed is None


def test_accepted_and_converted(notebook, tmp_path):
    words = "-p ipc 20 -p methods dm,avdd -p rate 1 -p device None"
    done, computed = papermill(notebook, tmp_path, *words.split())
    assert done.returncode == 0, done.stderr
    assert computed == repr({"ipc": 20, "methods": ["dm", "avdd"], "rate": 1.0, "device": None})


def test_defaults_alone(notebook, tmp_path):
    done, computed = papermill(notebook, tmp_path)
    assert done.returncode == 0, done.stderr
    assert computed == repr({"ipc": 10, "methods": ["dm"], "rate": 0.1, "device": None})
