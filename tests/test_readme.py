"""The README is short, its links lead somewhere, and its numbers are those of the committed rows."""
import re

import pandas as pd
import pytest

from ddrepro.core.share import project_root
from ddrepro.methods import registered
from ddrepro.papers.avdd import AVDD_CLAIMS
from ddrepro.papers.dsdm import claims_of_one
from ddrepro.papers.plan import compared
from ddrepro.papers.vldd import recall_claims

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="the README and the committed rows belong to a checkout")


@pytest.fixture(scope="module")
def readme(): return (ROOT / "README.md").read_text()


def printed(r) -> str:
    "A difference with its interval, as prose has it"
    return f"{r.difference:+.1f} [{r.low:+.1f}, {r.high:+.1f}]".replace("-", "−")


def finding(readme, name) -> str: return next(line for line in readme.splitlines() if line.startswith("- ") and f"**{name}**" in line)


def test_it_is_short(readme): assert len(readme.split()) <= 900


def test_links_and_pictures_are_there(readme):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", readme)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_methods_are_counted(readme):
    assert f"| {len(registered())} methods (`ddrepro methods`) |" in readme
    named = {name for line in readme.splitlines() if line.startswith("| ") for code in re.findall(r"`([\w ]+)`", line) for name in code.split()}
    assert set(registered()) <= named


def test_avdd_finding(readme):
    claims = compared(pd.read_csv(ROOT / "reports/avdd_digits_av_ipc10.csv"), AVDD_CLAIMS, "AV")
    control = claims[claims.margin.notna()].iloc[0]
    assert f"{printed(control)} points at IPC 10" in finding(readme, "AVDD")


def test_dsdm_finding(readme):
    rows = pd.read_csv(ROOT / "reports/dsdm_digits.csv")
    claims = claims_of_one(rows[(rows.place == "Table 1") & (rows.ipc == 10)]).set_index(["a", "b"])
    said = finding(readme, "DSDM")
    assert f"{printed(claims.loc['DSDM', 'DM'])} points on `digits` at IPC 10" in said
    assert f"{printed(claims.loc['DSDM', 'DM, equal steps'])} with DM at equal steps" in said


def test_vl_finding(readme):
    rows = pd.read_csv(ROOT / "reports/vldd_digit_scenes.csv")
    claims = recall_claims(rows[rows.place == "modality"], "modality").set_index(["a", "b", "modality"])
    there, back = (claims.loc["Both", "Text alone (T)", m] for m in ("TR R@1", "IR R@1"))
    assert f"{printed(there)} to R@1 from image to text, {printed(back)} from text to image" in finding(readme, "VL")


def test_minutes_of_a_set(readme):
    seconds = pd.read_csv(ROOT / "reports/cells/cifar10_dm_ipc1_draws100.csv").drop_duplicates("run").seconds.mean()
    assert f"IPC 1: {seconds / 60:.0f} minutes a set" in readme
