"""The README's numbers are those of the committed rows."""
import re

import pandas as pd
import pytest

from ddrepro.evaluate import summarise
from ddrepro.share import project_root

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="the README and the committed rows belong to a checkout")


@pytest.mark.parametrize("column, ipc", [(1, 1), (2, 10)])
def test_accuracies(column, ipc):
    kept = summarise(pd.read_csv(ROOT / f"reports/avdd_digits_av_ipc{ipc}.csv"), ("row", "modality")).set_index(["row", "modality"])
    printed = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    found = {cells[0]: cells[column] for cells in printed if len(cells) == 4 and "±" in cells[column]}
    assert {"Random", "Herding", "DM", "AVDD", "Whole data"} <= set(found)
    for row, text in found.items(): assert text == f"{kept.loc[(row, 'AV'), 'mean']:.1f} ± {kept.loc[(row, 'AV'), 'std']:.1f}", row
