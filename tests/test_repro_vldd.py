"""The vision-language notebook as people run it: a table alone, everything, bare papermill, no pictures, refusals."""
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from ddrepro.cli import main
from ddrepro.core.share import share_path
from ddrepro.papers.vldd_settings import VL_TABLES
from helpers import DDREPRO, kept_files, papermill, run_command

NOTEBOOK = share_path("nbs/repro_vldd.ipynb")
WORDS = ["run", "vldd", "-p", "profile", "test"]
RECALLS = {f"{d} R@{k}" for d in ("TR", "IR") for k in (1, 5, 10)}


def execute(folder, *words): return papermill(NOTEBOOK, folder, "-p", "profile", "test", *words)

def outputs(notebook) -> str:
    "Everything an executed notebook shows, as one text"
    return json.dumps([c.get("outputs", []) for c in json.loads(notebook.read_text())["cells"]])


@pytest.fixture(scope="module")
def modality(tmp_path_factory):
    "The table of single modalities alone, through the command, in an empty folder"
    folder = tmp_path_factory.mktemp("modality")
    done = run_command([*DDREPRO, *WORDS, "-p", "table", "modality"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_a_table_alone(modality):
    folder, printed = modality
    page = (folder / "reports/vldd_tablemodality_test.html").read_text()
    assert printed.rsplit("report: ", 1)[1].strip() == str(folder / "reports/vldd_tablemodality_test.html")
    assert "One modality or both" in page and "Language encoders" not in page
    assert not re.findall(r"<(?:script|link|img|audio|source|iframe)[^>]*(?:src|href)=[\"']?https?:", page)
    assert "<script" not in page
    assert "<math" in page
    assert "In these points this run differs from the paper" in page
    assert ">Provenance" in page
    assert "Published recall in percent; other data" in page
    for line in ("Text alone (T)", "Image alone (I)", "Both"): assert line in printed and line in page


def test_rows_of_the_table(modality):
    rows = pd.read_csv(modality[0] / "reports/vldd_tablemodality_test.csv")
    assert rows.row.unique().tolist() == ["Text alone (T)", "Image alone (I)", "Both"]
    assert set(rows.modality) == RECALLS
    assert set(rows.ipc) == {20}
    assert rows.accuracy.between(0, 100).all() and rows.run.nunique() == 3
    specs = [json.loads((modality[0] / "runs" / r / "spec.json").read_text())["method"] for r in rows.run.unique()]
    assert [s["learn"] for s in specs] == ["text", "image", "both"]


def test_a_second_run_computes_nothing(modality):
    "Bare papermill reads what the command left, and neither changes nor adds a file"
    folder, _ = modality
    before = kept_files(folder)
    done = execute(folder, "-p", "table", "modality")
    assert done.returncode == 0, done.stderr[-2000:]
    assert kept_files(folder) == before


def test_without_pictures(modality):
    "No pixel and no caption of the data leaves"
    folder, _ = modality
    done = execute(folder, "-p", "table", "modality", "-p", "pictures", "false")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("Traceback") == 0
    from ddrepro.data.registry import load_data
    shown = outputs(folder / "out.ipynb")
    for caption in load_data("digit_scenes").train.captions[0]: assert caption not in shown
    assert "data:image" not in shown and "`pictures` is false" in shown


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    clock = time.monotonic()
    done = run_command([*DDREPRO, *WORDS], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, time.monotonic() - clock


def test_every_table(everything):
    rows = pd.read_csv(everything[0] / "reports/vldd_test.csv")
    assert set(rows.place) == set(VL_TABLES) and set(rows.modality) == RECALLS
    baselines = {"Random", "Herding", "K-Center", "Forgetting", "Distilled", "Whole data"}
    assert baselines == set(rows[rows.place == "baselines"].row)
    assert rows[rows.place == "cross"].net.nunique() == 2
    same = rows[(rows.row.isin(["Distilled", "Both", "Real images, real texts"]))]
    assert same.run.nunique() == 1 and same.groupby("modality").accuracy.nunique().max() == 1


def test_missing_lines_say_why(everything):
    page = (everything[0] / "reports/vldd_test.html").read_text()
    assert "not run: not in this profile" in page and "NFNet-L0" in page
    for heading in ("Selected and distilled pairs", "Image encoders", "Other architectures", "Where the pairs begin",
                    "Language encoders", "Learned pairs", "Losses and learned rates"):
        assert heading in page


REFUSED = {
    "tabel": (["-p", "tabel", "lora"], "'table'"),
    "pairs as a word": (["-p", "pairs", "ten"], "pairs"),
    "data set": (["-p", "dataset", "digit_scene"], "'digit_scenes'"),
    "pairs": (["-p", "table", "modality", "-p", "pairs", "1501"], "1,500 pairs"),
    "table": (["-p", "table", "modalty"], "'modality'"),
    "encoder": (["-p", "encoders", "ViT-Tinny"], "'ViT-Tiny'"),
}

@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    "Case → finished papermill and its folder, two at a time"
    folders = {case: tmp_path_factory.mktemp("refused") for case in REFUSED}
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda case: execute(folders[case], *REFUSED[case][0]), REFUSED)
    return {case: (d, folders[case]) for case, d in zip(REFUSED, done)}

@pytest.mark.parametrize("case", REFUSED)
def test_bare_papermill_refuses(refusals, case):
    done, folder = refusals[case]
    assert done.returncode != 0 and REFUSED[case][1] in done.stderr, done.stderr[-2000:]
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("wrong, words", [
    (["-p", "tabel", "lora"], "'table'"),
    (["-p", "pairs", "four"], "must be list[int]"),
])
def test_command_refuses_before_a_kernel_starts(tmp_path, monkeypatch, capsys, wrong, words):
    monkeypatch.chdir(tmp_path)
    assert main([*WORDS, *wrong]) == 2
    printed = capsys.readouterr().err
    assert words in printed and "Traceback" not in printed and not list(tmp_path.iterdir())


def test_captions_with_markup_reach_the_report_escaped(tmp_path):
    from PIL import Image
    lines = ["image,caption"]
    for i in range(60):
        Image.new("RGB", (32, 32), (4 * i, 40, 200 - 3 * i)).save(tmp_path / f"{i}.png")
        lines += [f"{i}.png,Picture number {i} shows thing{i}.",
                  f"{i}.png,<script>alert({i})</script> <b>bold</b> Übung {i}"]
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = "-p dataset caption_csv -p size 32 -p table modality -p pairs 12"
    done = run_command([*DDREPRO, *WORDS, *words.split(), "-p", "file", tmp_path / "mine.csv"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    page = next((tmp_path / "reports").glob("vldd*.html")).read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page and "<b>bold" not in page
