"""A notebook that papermill executed, rendered: complete, closed to the network, and harmless."""
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from ddrepro.report import render_report, report_index, tagged_output

PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2]); plt.show()"
SOUND = "import numpy as np\nfrom IPython.display import Audio\nAudio(np.sin(np.arange(800) / 8), rate=8000)"
NOISE = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass\nprint('</pre><script>alert(1)</script>')"
TABLE = "import pandas as pd\npd.DataFrame({'method': ['dm', '<b>'], 'AV': [61.2, 63.9]})"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    tags = {"tags": ["final-table"]}
    cells = [new_markdown_cell("# Title\n\n> Lead.\n\n## Part\n\n$x^2$"), *map(new_code_cell, [PLOT, SOUND, NOISE]), new_code_cell(TABLE, metadata=tags)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "in.ipynb", "out.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return render_report(folder / "out.ipynb", folder / "reports/run.html", headline="avdd 63.9 %")


def test_everything_is_inside(page):
    soup = BeautifulSoup(page.read_text(), "html.parser")
    assert soup.find("img")["src"].startswith("data:image/png;base64,")
    assert soup.find("audio").find("source")["src"].startswith("data:audio/wav;base64,")
    assert soup.find("math") and soup.nav.find("a", href="#part")
    loading = [tag.get(name) for tag in soup.find_all(True) if tag.name != "a" for name in ("src", "href", "srcset") if tag.get(name)]
    assert all(value.startswith("data:") for value in loading)


def test_nothing_runs(page):
    text = page.read_text()
    soup = BeautifulSoup(text, "html.parser")
    assert soup.find("script") is None
    assert "&lt;script&gt;alert(1)" in text
    assert [td.get_text() for td in soup.find_all("td")] == ["dm", "61.2", "<b>", "63.9"]
    assert "3/3" not in text and "IProgress" not in text


def test_index_and_handed_on_table(page):
    assert "63.9" in tagged_output(page.parent.parent / "out.ipynb", "final-table")
    soup = BeautifulSoup(report_index(page.parent).read_text(), "html.parser")
    assert [td.get_text() for td in soup.main.find_all("td")][:2] == ["Title", "avdd 63.9 %"]
