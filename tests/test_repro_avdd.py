"""The main job as people run it: bare papermill, the ddrepro command, and the wheel in a folder of its own."""
import json
import re
import sys
from pathlib import Path

import pytest

from ddrepro.core.share import share_path
from helpers import DDREPRO, papermill, run_command

NOTEBOOK = share_path("nbs/repro_avdd.ipynb")
SMALL = ["-p", "profile", "test", "-p", "ipc", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "The test profile through the command, in an empty folder"
    folder = tmp_path_factory.mktemp("work")
    done = run_command([*DDREPRO, "run", "avdd", *SMALL], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_command_prints_table_and_path(report):
    folder, printed = report
    rows = ["Random", "Herding", "DM", "AVDD", "Control (plain, rate × 21)", "JM alone", "MGM alone", "DM, equal steps"]
    for row in (*rows, "Whole data"): assert row in printed
    path = Path(printed.rsplit("report: ", 1)[1].strip())
    assert path == folder / "reports/avdd_digits_av_ipc2_test.html" and path.stat().st_size > 100_000


def test_report_is_whole(report):
    page = (report[0] / "reports/avdd_digits_av_ipc2_test.html").read_text()
    assert not re.findall(r"""<(?:script|link|img|audio|source|iframe)[^>]*(?:src|href)=["']?https?:""", page)
    assert "<script" not in page and page.count("<audio") >= 10 and "<math" in page
    for heading in ("The data", "Results", "Loss curves", "Distilled pairs", "The finding", "Provenance"):
        assert f">{heading}" in page
    assert "In these points this run differs from the paper" in page
    assert "no published numbers to set beside these" in page


def test_rows_beside_the_report(report):
    import pandas as pd
    rows = pd.read_csv(report[0] / "reports/avdd_digits_av_ipc2_test.csv")
    assert set(rows.modality) == {"A", "V", "AV"} and rows.accuracy.between(0, 100).all() and rows.run.nunique() >= 6
    assert rows[rows.row == "AVDD"].steps.gt(rows[rows.row == "DM"].steps.max()).all()      # four times the samples


def test_finding_holds_in_report(report):
    nb = json.loads((report[0] / "runs/notebooks/avdd_digits_av_ipc2_test.ipynb").read_text())
    cell = next(c for c in nb["cells"] if "".join(c["source"]).startswith("measured.style"))
    text = "".join("".join(o["data"]["text/html"]) for o in cell["outputs"] if "data" in o)
    assert text.count("True") == 4 and "False" not in text


def test_runs_are_kept_and_second_run_reads_them(report):
    folder, printed = report
    certificates = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/certificate.txt")}
    assert len(certificates) >= 6
    done = papermill(NOTEBOOK, folder, *SMALL, output="again.ipynb")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/certificate.txt")} == certificates


def test_rows_of_the_papers_table_that_the_default_leaves_out(tmp_path):
    "MTT beside the random choice, in a report that distils nothing else and has an embedding network to train"
    words = "-p profile test -p ipc 1 -p methods random mtt -p controls false"
    done = run_command([*DDREPRO, "run", "avdd", *words.split()], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^ *Random ", done.stdout, re.M)
    assert re.search(r"^ *MTT ", done.stdout, re.M)
    assert "AVDD" not in done.stdout


def test_tables_at_several_ipc(tmp_path):
    "Fusions at two IPC, retrieval at the larger one, each statement with a verdict; no row that was not asked for"
    import pandas as pd
    words = "-p profile test -p ipc 2 1 -p table 2 5 -p pictures false"
    done = run_command([*DDREPRO, "run", "avdd", *words.split()], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    name = next((tmp_path / "reports").glob("avdd_digits_av_table2-5_ipc2-1_test_*.csv")).stem
    rows = pd.read_csv(tmp_path / f"reports/{name}.csv")
    classes, of_class = rows[rows["place"].isna()], rows[rows["place"] == "Table 5"]
    assert set(classes.row) == {f"DM, {fusion}" for fusion in ("concat", "sum", "attention", "ensemble")} and set(classes.ipc) == {1, 2}
    assert classes[classes.ipc == 1].run.nunique() == 1                      # all fusions are scored on one distilled set
    assert set(of_class.row) == {"Random", "DM", "AVDD", "Control (plain, rate × 21)", "Whole data"} and set(of_class.ipc) == {0, 2}
    assert set(of_class[of_class.row == "AVDD"].modality) == {f"{way} {what}" for way in ("A->V", "V->A") for what in ("R@1", "R@5", "MedR")}
    page = (tmp_path / f"reports/{name}.html").read_text()
    for words in ("Table 2 of the paper", "Table 5 of the paper", "the ensemble is the best of the fusions", "sound → picture",
                  "Table 5 is at IPC 2; the paper’s is at IPC 20".replace("’", "&#x27;")):
        assert words in page or words.replace("&#x27;", "'") in page, words
    assert "retrieval by class" in done.stdout and "IPC 1" in done.stdout


@pytest.mark.parametrize("wrong, words", [
    (["-p", "icp", "3"], "'ipc'"), (["-p", "ipc", "ten"], "ipc"), (["-p", "ipc", "0"], "ipc must be at least 1, got 0"),
    (["-p", "dataset", "digits_aw"], "'digits_av'"), (["-p", "ipc", "28"], "ipc can be at most 27"),
    (["-p", "ipc", "1,28"], "ipc can be at most 27"), (["-p", "table", "6"], "table must be one of")])
def test_bare_papermill_refuses(tmp_path, wrong, words):
    done = papermill(NOTEBOOK, tmp_path, "-p", "profile", "test", *wrong)
    assert done.returncode != 0 and words in done.stderr
    assert not list(tmp_path.glob("runs/*/spec.json"))


def test_command_refuses_before_a_kernel_starts(tmp_path):
    for wrong, words in ((["-p", "icp", "3"], "'ipc'"), (["-p", "ipc", "ten"], "must be list[int]")):
        done = run_command([*DDREPRO, "run", "avdd", *wrong], tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_imports_need_no_notebook_packages(tmp_path):
    "Importing the library leaves papermill, nbconvert, IPython kernels and the like alone"
    heavy = "papermill nbconvert nbclient timm peft transformers av jupyterlab ipykernel nbdev".split()
    code = ("import sys, ddrepro, ddrepro.data.real, ddrepro.methods, ddrepro.distill.loop, ddrepro.evaluate.tasks; "
            "import ddrepro.evaluate.experiment; "
            f"ddrepro.methods.get_method('avdd'); print([m for m in {heavy} if m in sys.modules])")
    done = run_command([sys.executable, "-c", code], tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
