"""The README's numbers are those of the committed rows."""
import re

import pandas as pd
import pytest

from ddrepro.core.share import project_root
from ddrepro.evaluate.statistics import compare
from ddrepro.evaluate.tasks import summarise
from ddrepro.papers.avdd import AVDD_CLAIMS, MTT_CLAIMS
from ddrepro.papers.dsdm import claims_of_one
from ddrepro.papers.plan import compared
from ddrepro.papers.vldd import VL_CLAIMS, recall_claims
from ddrepro.report.recall_tables import RECALLS

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="the README and the committed rows belong to a checkout")


@pytest.mark.parametrize("column, ipc", [(1, 1), (2, 10)])
def test_accuracies(column, ipc):
    rows = pd.read_csv(ROOT / f"reports/avdd_digits_av_ipc{ipc}.csv")
    kept = summarise(rows, ("row", "modality")).set_index(["row", "modality"])
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    printed = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in lines]
    accuracies = {cells[0]: cells[column] for cells in printed if len(cells) == 4 and "±" in cells[column]}
    assert {"Random", "Herding", "DM", "AVDD", "Whole data"} <= set(accuracies)
    for row, text in accuracies.items():
        assert text == f"{kept.loc[(row, 'AV'), 'mean']:.1f} ± {kept.loc[(row, 'AV'), 'std']:.1f}", row


def readme_tables():
    "Tables of the README: header cells, rows of cells"
    tables = []
    lines = (ROOT / "README.md").read_text().splitlines()
    for before, rule, *_ in zip(lines, lines[1:]):
        if not re.fullmatch(r"\|(---\|)+", rule): continue
        head = [cell.strip() for cell in before.strip("| ").split("|")]
        rows = []
        for line in lines[lines.index(before) + 2:]:
            if not line.startswith("|"): break
            rows.append([cell.strip() for cell in line.strip("| ").split("|")])
        tables.append((head, rows))
    return tables


def as_printed(accuracies) -> str: return f"{accuracies.mean():.1f} ± {accuracies.std(ddof=0):.1f}"


DSDM_FILES = {
    "digits": "dsdm_digits",
    "mnist": "dsdm_mnist_fashion_ipc10",
    "fashion_mnist": "dsdm_mnist_fashion_ipc10",
    "fsdd": "dsdm_fsdd",
}


def test_dsdm_accuracies():
    head, rows = next((h, r) for h, r in readme_tables() if h[0] == "row" and "mnist, IPC 10" in h)
    checked = 0
    for row, *cells in rows:
        for column, text in zip(head[1:], cells):
            name, ipc = re.fullmatch(r"(\w+), IPC (\d+)", column).groups()
            kept = pd.read_csv(ROOT / f"reports/{DSDM_FILES[name]}.csv")
            kept = kept[kept.place == ("Table 2" if name == "fsdd" else "Table 1")]
            kept = kept[(kept.dataset == name) & (kept.row == row)]
            kept = kept[kept.ipc == (0 if row == "Whole data" else int(ipc))]
            assert text == (as_printed(kept.accuracy) if len(kept) else "–"), (row, column)
            if len(kept): checked += 1
    assert checked >= 25


def test_mtt_table():
    _, rows = next((h, r) for h, r in readme_tables() if h[0] == "MTT on digits")
    kept = pd.read_csv(ROOT / "reports/mtt_digits.csv")
    for row, *cells in rows:
        for ipc, text in zip((1, 10), cells):
            column = kept[kept.ipc == ipc]
            if " − " in row:
                r = compare(column, MTT_CLAIMS, "image").set_index(["a", "b"]).loc[tuple(row.split(" − "))]
                assert text == f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}] {r.verdict}", (row, ipc)
            else: assert text == as_printed(column[column.row == row].accuracy), (row, ipc)
    assert len(rows) == 8


def recalls(file, pairs):
    """Mean ± std of every line and recall of a report's rows, as the README prints them;
    a line that several tables share counts once"""
    kept = pd.read_csv(ROOT / f"reports/{file}.csv").drop_duplicates(["row", "ipc", "modality", "seed", "eval_seed"])
    lines = kept[kept.ipc.isin([0, pairs])].groupby(["row", "modality"]).accuracy
    return {key: as_printed(values) if len(values) > 1 else f"{values.mean():.1f}" for key, values in lines}


@pytest.mark.parametrize("title, file, pairs", [
    ("digit_scenes, 100 pairs", "vldd_digit_scenes", 100),
    ("flickr8k at 64 px, 100 pairs", "vldd_flickr8k", 100),
    ("flickr8k at 64 px, 200 pairs", "vldd_flickr8k", 200),
])
def test_vl_recalls(title, file, pairs):
    head, rows = next((h, r) for h, r in readme_tables() if h[0] == title)
    kept = recalls(file, pairs)
    assert tuple(head[1:]) == RECALLS
    assert {"Random", "Herding", "K-Center", "Forgetting", "Distilled", "Whole data"} <= {row for row, *_ in rows}
    for row, *cells in rows:
        assert cells == [kept[row, m] for m in RECALLS], row


def test_vl_differences():
    _, rows = next((h, r) for h, r in readme_tables() if h[0] == "difference in R@1")
    kept = pd.read_csv(ROOT / "reports/vldd_digit_scenes.csv")
    claims = pd.concat([recall_claims(kept[kept.place == table], table) for table in ("baselines", "modality")])
    claims = claims.set_index(["a", "b", "modality"])
    assert len(rows) == len(VL_CLAIMS["baselines"]) + len(VL_CLAIMS["modality"])
    for pair, *cells in rows:
        for m, text in zip(("TR R@1", "IR R@1"), cells):
            r = claims.loc[(*pair.split(" − "), m)]
            assert text == f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}] {r.verdict}", (pair, m)


def difference(r) -> str: return f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}] {r.verdict}"


def test_avdd_differences():
    _, rows = next((h, r) for h, r in readme_tables() if h == ["comparison", "IPC 1", "IPC 10"])
    assert len(rows) == len(AVDD_CLAIMS)
    for i, ipc in enumerate((1, 10)):
        claims = compared(pd.read_csv(ROOT / f"reports/avdd_digits_av_ipc{ipc}.csv"), AVDD_CLAIMS, "AV")
        margins = ["" if pd.isna(margin) else f", within {margin:g}" for margin in claims.margin]
        expected = [f"{a} − {b}{margin}" for a, b, margin in zip(claims.a, claims.b, margins)]
        assert [row[0] for row in rows] == expected
        assert [row[1 + i] for row in rows] == [difference(r) for r in claims.itertuples()]


def test_dsdm_differences():
    head, rows = next((h, r) for h, r in readme_tables() if h[0] == "comparison" and "mnist, IPC 10" in h)
    checked = 0
    for i, column in enumerate(head[1:], 1):
        name, ipc = re.fullmatch(r"(\w+), IPC (\d+)", column).groups()
        kept = pd.read_csv(ROOT / f"reports/{DSDM_FILES[name]}.csv")
        kept = kept[kept.place == ("Table 2" if name == "fsdd" else "Table 1")]
        kept = kept[(kept.dataset == name) & (kept.ipc == int(ipc))]
        claims = {f"{r.a} − {r.b}": difference(r) for r in claims_of_one(kept).itertuples()}
        for row in rows: assert row[i] == claims.get(row[0], "–"), (row[0], column)
        checked += len(claims)
    assert checked == 22
