"""The DSDM notebook as people run it: one table alone, two places together, bare papermill, and what it refuses."""
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from ddrepro.cli import main
from ddrepro.core.share import share_path
from helpers import DDREPRO, kept_files, papermill, run_command

NOTEBOOK = share_path("nbs/repro_dsdm.ipynb")
WORDS = ["run", "dsdm", "-p", "profile", "test"]
ABLATION = ["L_proto", "+ pool", "+ L_SD", "+ L_h (DSDM)"]


def headings(page) -> list: return re.findall(r"<h[23][^>]*>(?:<[^>]+>)*((?:Table|Figure) \d)", page)

def images(notebook) -> int:
    outputs = [o for c in json.loads(notebook.read_text())["cells"] for o in c.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory):
    "Table 4 alone, through the command, in an empty folder"
    folder = tmp_path_factory.mktemp("table4")
    done = run_command([*DDREPRO, *WORDS, "-p", "table", "4"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_a_table_alone(ablation):
    folder, printed = ablation
    page = (folder / "reports/dsdm_table4_test.html").read_text()
    assert headings(page) == ["Table 4"]
    assert printed.rsplit("report: ", 1)[1].strip() == str(folder / "reports/dsdm_table4_test.html")
    assert not re.findall(r"<(?:script|link|img|audio|source|iframe)[^>]*(?:src|href)=[\"']?https?:", page)
    assert "<script" not in page
    assert "In these points this run differs from the paper" in page and ">Provenance" in page
    for row in ABLATION: assert row in printed and row in page


def test_rows_of_the_ablation(ablation):
    rows = pd.read_csv(ablation[0] / "reports/dsdm_table4_test.csv")
    assert rows.row.tolist() == ABLATION
    assert set(rows.place) == {"Table 4"}
    assert set(rows.dataset) == {"digits"}
    assert set(rows.ipc) == {2}
    assert rows.accuracy.between(0, 100).all() and rows.best.ge(rows.accuracy).all() and rows.run.nunique() == 4
    specs = [json.loads((ablation[0] / "runs" / r / "spec.json").read_text())["method"] for r in rows.run]
    terms = [(s["source"], s["lambda_sd"], s["lambda_h"]) for s in specs]
    assert terms == [("random", 0, 0), ("pool", 0, 0), ("pool", 50, 0), ("pool", 50, .2)]


def test_a_second_run_computes_nothing(ablation):
    "Bare papermill reads what the command left, and neither changes nor adds a file"
    folder, _ = ablation
    before = kept_files(folder)
    # two networks, after epoch 0 and 1
    assert sum(p.name == "certificate.txt" for p in before) == 4
    assert sum(p.name.startswith("net") for p in before) == 2 * 2
    done = papermill(NOTEBOOK, folder, "-p", "profile", "test", "-p", "table", "4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert kept_files(folder) == before


def test_a_table_and_a_figure(tmp_path):
    words = "-p table 1 -p figure 8 -p dataset digits -p ipc 2"
    done = run_command([*DDREPRO, *WORDS, *words.split()], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    name = "dsdm_digits_table1_figure8_ipc2_test"
    page, rows = (tmp_path / f"reports/{name}.html").read_text(), pd.read_csv(tmp_path / f"reports/{name}.csv")
    assert headings(page) == ["Table 1", "Figure 8"] and images(tmp_path / f"runs/notebooks/{name}.ipynb") >= 2
    assert set(rows.place) == {"Table 1", "Figure 8"} and set(rows.ipc) == {0, 2}
    table = rows[rows.place == "Table 1"]
    methods = {"Random", "Herding", "K-Center", "DD", "DC", "DSA", "CAFE", "CAFE+DSA", "IDM", "M3D", "DM", "DSDM", "Whole data"}
    assert methods | {"DM, equal steps", "DSDM without factor"} == set(table.row)
    assert table[table.row == "DM, equal steps"].steps.min() >= table[table.row == "DSDM"].steps.min()
    figure = rows[rows.place == "Figure 8"]
    # the figure's sets are the table's
    assert figure.row.tolist() == ["DM", "DSDM"] and set(figure.run) < set(table.run)


REFUSED = {
    "tabel": (["-p", "tabel", "4"], "'table'"),
    "ipc as a word": (["-p", "ipc", "ten"], "ipc"),
    "data set": (["-p", "dataset", "digit"], "'digits'"),
    "ipc": (["-p", "table", "1", "-p", "ipc", "28"], "ipc can be at most 27"),
    "table": (["-p", "table", "5"], "table must be one of 1, 2, 3, 4; got 5"),
}

@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    "Case → finished papermill and its folder, two at a time"
    folders = {case: tmp_path_factory.mktemp("refused") for case in REFUSED}

    def execute(case): return papermill(NOTEBOOK, folders[case], "-p", "profile", "test", *REFUSED[case][0])

    with ThreadPoolExecutor(2) as pool: done = pool.map(execute, REFUSED)
    return {case: (d, folders[case]) for case, d in zip(REFUSED, done)}

@pytest.mark.parametrize("case", REFUSED)
def test_bare_papermill_refuses(refusals, case):
    done, folder = refusals[case]
    assert done.returncode != 0 and REFUSED[case][1] in done.stderr, done.stderr[-2000:]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("wrong, words", [
    (["-p", "tabel", "4"], "'table'"),
    (["-p", "table", "four"], "must be list[int]"),
])
def test_command_refuses_before_a_kernel_starts(tmp_path, monkeypatch, capsys, wrong, words):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, *wrong]) == 2
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed and not list(tmp_path.iterdir())
