"""The index of a folder of reports: what it says, how large it grows, and that it leaves committed files alone."""
import html
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from ddrepro.cli import main
from ddrepro.cli_runs import is_committed, render, reports_folder
from ddrepro.core.share import project_root
from ddrepro.papers import get_paper
from ddrepro.report.face import face_of
from ddrepro.report.index import report_index

MEGABYTE = 10**6


def write_report(folder: Path, name: str, cells: list, claims=(), date="2026-01-01 00:00:00 UTC", paper="avdd"):
    "A page with the head of a report"
    summary = dict(paper=paper, profile="paper", revision="", cells=cells, claims=list(claims))
    fields = dict(title=f"Report {name}", date=date, headline=f"AVDD, {name}", summary=json.dumps(summary))
    metas = "".join(f'<meta name="ddrepro:{key}" content="{html.escape(text)}">' for key, text in fields.items())
    (folder / f"{name}.html").write_text(f"<html><head>{metas}<style></style></head></html>")


def cell(row="AVDD", dataset="vggs10k", ipc=10, modality="AV", mean=55.0, status="reproduced", printed=54.99):
    return [dataset, row, ipc, modality, mean, 0.5, 5, 10, printed, 1.7, status, ""]


def corner(folder: Path, dataset: str, ipc: int) -> str:
    "What the matrix of AVDD says of a data set at an IPC"
    table = BeautifulSoup((folder / "paper-avdd.html").read_text(), "html.parser").find(class_="coverage")
    heads = [th.get_text() for th in table.thead.find_all("th")]
    line = next(tr for tr in table.tbody.find_all("tr") if tr.th.find(string=True) == dataset)
    return line.find_all(["th", "td"])[heads.index(str(ipc))].get_text(" ").strip()


@pytest.mark.parametrize("statuses, said", [
    (["reproduced", "reproduced"], "reproduced 2 of 2 measured"),
    (["reproduced", "below"], "differs 1 of 2 measured"),
    (["in small", "in small"], "in small 39 printed"),
])
def test_a_corner_says_how_its_cells_went(tmp_path, statuses, said):
    write_report(tmp_path, "one", [cell(row=row, status=status) for row, status in zip(("DM", "AVDD"), statuses)])
    (tmp_path / "cells").mkdir()                     # the project's own folder
    report_index(tmp_path)
    found = corner(tmp_path, "vggs10k", 10)
    assert found.split()[0] == said.split()[0] and ("printed" in said or found == said), found
    assert corner(tmp_path, "vggs10k", 20).startswith("not run reason") and corner(tmp_path, "ave", 20).startswith("published")


def test_the_newest_report_decides(tmp_path):
    write_report(tmp_path, "older", [cell(status="below")], [["AVDD better than DM", "vggs10k", 10, "AV", -1, -2, 0, "fails"]], "2025-01-01")
    write_report(tmp_path, "newer", [cell()], [["AVDD better than DM", "vggs10k", 10, "AV", 1.0, 0.5, 2.0, "holds"]])
    page = BeautifulSoup(report_index(tmp_path).read_text(), "html.parser")
    assert corner(tmp_path, "vggs10k", 10) == "reproduced 1 of 1 measured"
    claims = page.find("caption", string=lambda text: text and text.startswith("Claims")).parent.tbody
    assert [td.get_text() for td in claims.find_all(["th", "td"])] == ["AVDD better than DM", "1", "0", "0"]
    assert [a.get_text() for a in page.find(id="runs").find_next("tbody").select("td:first-child a")] == ["Report newer", "Report older"]
    cells = pd.read_csv(tmp_path / "index.csv")
    assert cells.report.tolist() == ["newer.html", "older.html"]


def test_kept_cells_stand_in_the_projects_own_folder_alone(tmp_path):
    write_report(tmp_path, "one", [cell()])
    report_index(tmp_path)
    assert pd.read_csv(tmp_path / "index.csv").report.tolist() == ["one.html"]
    (tmp_path / "cells").mkdir()
    report_index(tmp_path)
    cells = pd.read_csv(tmp_path / "index.csv")
    kept = cells.report == "published.html"
    assert set(cells.place[kept]) == {"kept cells"} and "reproduced" in set(cells.status[kept])
    assert cells.report[~kept].tolist() == ["one.html"]


def test_five_hundred_runs_stay_below_three_megabytes(tmp_path):
    for i in range(500):
        cells = [cell(row=f"row {j}", dataset="digits_av", ipc=1 + i % 50, status="", printed=None) for j in range(50)]
        claims = [[f"row {j} better than row 0", "digits_av", 1 + i % 50, "AV", 1.0, 0.5, 2.0, "holds"] for j in range(8)]
        write_report(tmp_path, f"run_{i}", cells, claims)
    index = report_index(tmp_path)
    assert index.stat().st_size < 3 * MEGABYTE
    assert all(page.stat().st_size < 3 * MEGABYTE for page in tmp_path.glob("paper-*.html"))
    assert index.read_text().count("Report run_") >= 500


def test_reports_say_nothing_that_is_code(tmp_path):
    write_report(tmp_path, "x", [cell(row="<script>alert(1)</script>", dataset="<b>", status="", printed=None)])
    for page in [report_index(tmp_path), *tmp_path.glob("paper-*.html")]: assert "<script" not in page.read_text()


def test_a_report_beside_committed_ones_changes_none_of_them(monkeypatch):
    root = project_root()
    if root is None or not (root / ".git").exists(): pytest.skip("needs a checkout")
    monkeypatch.chdir(root / "nbs")
    assert reports_folder() == root / "reports/local" and is_committed(root / "reports") and not is_committed(root / "reports/local")
    ignored = subprocess.run(["git", "check-ignore", "-q", "reports/local/x.html"], cwd=root)
    assert ignored.returncode == 0


def test_the_committed_index_is_not_made_anew_by_a_report(tmp_path, monkeypatch):
    import nbformat
    monkeypatch.setattr("ddrepro.cli_runs.project_root", lambda: tmp_path)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A report")]), tmp_path / "a.ipynb")
    render(tmp_path / "a.ipynb", tmp_path / "reports/a.html")
    assert [path.name for path in (tmp_path / "reports").iterdir()] == ["a.html"]
    render(tmp_path / "a.ipynb", tmp_path / "reports/local/a.html")
    assert "../index.html" not in (tmp_path / "reports/local/index.html").read_text()
    assert main(["index", str(tmp_path / "reports")]) == 0 and (tmp_path / "reports/index.html").exists()
    render(tmp_path / "a.ipynb", tmp_path / "reports/local/a.html")
    assert "../index.html" in (tmp_path / "reports/local/index.html").read_text()


KEPT = {"avdd_digits_av_ipc10": 8, "dsdm_digits": 9, "dsdm_fsdd": 6, "vldd_digit_scenes": 12, "vldd_flickr8k": 16}   # claims at least tested


@pytest.mark.parametrize("name", KEPT)
def test_kept_rows_give_a_verdict_in_three_sentences(name):
    root = project_root()
    if root is None: pytest.skip("needs a checkout")
    rows, paper = pd.read_csv(root / f"reports/{name}.csv"), get_paper(name.split("_")[0])
    face = face_of(paper, rows, dict(profile="quick"), dict(profile="quick"), "A title, implemented and checked")
    assert len(face.verdict) == 3 and all(sentence.endswith(".") for sentence in face.verdict)
    result, printed, claims = face.verdict
    assert result.startswith(f"{paper.rows[0]} reaches ") and rows.dataset.iloc[0] in result and rows.dataset.iloc[0] in printed
    assert f"Of {len(face.summary['claims'])} claims tested" in claims and len(face.summary["claims"]) >= KEPT[name]
    assert face.title.endswith("implemented and checked") and "<li>" in face.figure


def test_published_cells_that_were_reproduced_are_called_so():
    root = project_root()
    if root is None: pytest.skip("needs a checkout")
    rows = pd.concat(map(pd.read_csv, sorted((root / "reports/cells").glob("*.csv"))))
    rows = rows[rows.row.isin(["DM", "Random"]) & rows.dataset.isin(["cifar10", "fashion_mnist"])]
    full = dict(profile="laptop", iterations=20_000)
    face = face_of(get_paper("dsdm"), rows, dict(profile="laptop"), full, "A title, implemented and checked")
    assert face.title == "A title, 4 of 5 published cells reproduced"
    assert "Of 5 cells that the paper prints: 4 reproduced, 1 below" in face.verdict[1]
    rows = rows[rows.ipc == 1]
    face = face_of(get_paper("dsdm"), rows, dict(profile="laptop"), full, "A title, implemented and checked")
    assert face.title == "A title, reproduced" and "Of 4 cells that the paper prints: 4 reproduced" in face.verdict[1]
    small = face_of(get_paper("dsdm"), rows, dict(profile="laptop"), full | dict(iterations=10), "A title, implemented and checked")
    assert small.title.endswith("implemented and checked") and "none of 4 printed cells counts" in small.verdict[1]
