"""A notebook that papermill executed, rendered: complete, closed to the network, and harmless."""
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ddrepro.cli import main
from ddrepro.cli_runs import papers
from ddrepro.report.index import report_index
from ddrepro.report.report import render_report, tagged_output
from helpers import KERNEL

PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
SOUND = "import numpy as np\nfrom IPython.display import Audio\nAudio(np.sin(np.arange(800) / 8), rate=8000)"
NOISE = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass\nprint('</pre><script>alert(1)</script>')"
TABLE = "import pandas as pd\npd.DataFrame({'method': ['dm', '<b>'], 'AV': [61.2, 63.9]})"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tags = {"tags": ["final-table"]}
    cells = [new_markdown_cell("# Title\n\n> Lead.\n\n## Part\n\n$x^2$")]
    cells += [*map(new_code_cell, [PLOT, SOUND, NOISE]), new_code_cell(TABLE, metadata=tags)]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), folder / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "in.ipynb", "out.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return render_report(folder / "out.ipynb", folder / "reports/run.html", headline="avdd 63.9 %")


def test_everything_is_inside(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert soup.find("img")["src"].startswith("data:image/png;base64,")
    assert soup.find("audio").find("source")["src"].startswith("data:audio/wav;base64,")
    assert soup.find("math") and soup.nav.find("a", href="#part")
    tags = [tag for tag in soup.find_all(True) if tag.name != "a"]
    loaded = [tag.get(name) for tag in tags for name in ("src", "href", "srcset") if tag.get(name)]
    assert all(value.startswith("data:") for value in loaded)


def test_nothing_runs(page):
    text = page.read_text()
    soup = BeautifulSoup(text, "html.parser")
    assert soup.find("script") is None
    assert "&lt;script&gt;alert(1)" in text
    assert [td.get_text() for td in soup.tbody.find_all("td")] == ["dm", "61.2", "<b>", "63.9"]
    assert "3/3" not in text and "IProgress" not in text


def test_index_and_handed_on_table(page):
    assert "63.9" in tagged_output(page.parent.parent / "out.ipynb", "final-table")
    soup = BeautifulSoup(report_index(page.parent).read_text(), "html.parser")
    assert [td.get_text() for td in soup.find(id="runs").find_next("tbody").find_all("td")][:2] == ["Title", "avdd 63.9 %"]


def test_machinery_stays_behind_and_code_behind_one_switch(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert len(soup.select("input[type=checkbox]")) == 1 and not soup.select("details.code, details.messages")
    assert all("code" in block.parent["class"] for block in soup.select("main .highlight"))
    assert soup.select(".files a[download='run.ipynb']")[0]["href"].startswith("data:application/x-ipynb+json;base64,")


def test_pictures_open_without_a_script(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    frame = soup.find(class_="zoom")
    assert frame.find("img")["alt"] == "Figure in “Part”"
    assert all(soup.find(id=link["href"][1:]) for link in frame.find_all("a"))


ABSENT = "<table><tr><th>ViT-Tiny<br><small class=\"absent\">not run: no weights</small></th><td>–</td></tr></table>"
TINY = {
    "parameters": [
        "profile: str = 'quick'  # of the run",
        "lines: list[str] = []  # that have a result",
        "device: str = 'auto'",
    ],
    "table": ["from IPython.display import HTML", f"HTML({ABSENT!r})"],
    "final-table": ["print(lines if lines else 'Empty DataFrame')"],
    "rows": [
        "if lines: print('dataset,row,ipc,modality,seed,eval_seed,accuracy')",
        "for line in lines: print(f'digits,{line},1,A,0,0,50')",
    ],
    "provenance": ["print('{}')"],
}

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`ddrepro run tiny -p …`, whose notebook has a few lines and belongs to no paper:
    (status, what it printed, the folder of reports)"""
    cells = [new_code_cell("\n".join(lines), metadata={"tags": [tag]}) for tag, lines in TINY.items()]
    (tmp_path / "nbs").mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), tmp_path / "nbs/repro_tiny.ipynb")
    monkeypatch.setattr("ddrepro.cli_runs.share_path", lambda name: tmp_path / name)
    monkeypatch.setenv("DDREPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)

    def call(*words):
        status = main(["run", "tiny", "--reports", str(tmp_path / "reports"), *words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, tmp_path / "reports"
    return call


def test_a_report_and_its_rows_belong_together(command):
    status, _, reports = command("--name", "same", "-p", "lines", "DM")
    assert status == 0 and "digits,DM,1" in (reports / "same.csv").read_text()
    status, printed, _ = command("--name", "same")
    assert (reports / "same.html").exists() and not (reports / "same.csv").exists()
    assert status == 1 and "no line of this report has a result" in printed
    assert "ViT-Tiny: not run: no weights" in printed
    assert "Empty DataFrame" not in printed and str(reports / "same.html") in printed


def test_other_parameters_make_another_report(command):
    for words in (["lines", "DM"], ["lines", "AVDD"], ["lines", "AVDD", "-p", "device", "cpu"]):
        reports = command("-p", *words)[2]
    first, second = sorted(p.stem for p in reports.glob("*.csv") if p.stem != "index")
    assert {first[:11], second[:11]} == {"tiny_quick_"} and len(first) == len(second) == 17
    assert {p.stem for p in reports.glob("*.html") if not p.stem.startswith("paper-")} == {first, second, "index"}


def test_help_is_of_one_paper(capsys):
    calls = {"run --help": [], "run vldd --help": ["vldd"], "run --help dsdm": ["dsdm"]}
    for words, shown in calls.items():
        with pytest.raises(SystemExit) as stop: main(words.split())
        text = capsys.readouterr().out
        assert stop.value.code == 0 and [p for p in papers() if f"parameters of {p}:" in text] == shown
        assert all(f"ddrepro run {p} --help" in text for p in papers()) == (not shown)
