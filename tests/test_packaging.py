"""The wheel must carry what a checkout has beside the package, and find it from any folder."""
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ddrepro.core.share import project_root

ROOT = project_root()
pytestmark = pytest.mark.skipif(ROOT is None, reason="ddrepro runs from a wheel here; building one needs a checkout")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the checkout, so that no build folder is left in it"
    work = tmp_path_factory.mktemp("wheel")
    left_behind = (".*", "runs", "store", "reports", "build", "dist", "*.egg-info", "__pycache__", "carry")
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*left_behind))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(work), str(work / "source")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(work.glob("*.whl"))


def test_wheel_carries_what_runs_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [f for f in ROOT.glob("data/**/*") if f.is_file() and "__pycache__" not in f.parts]
    wanted = [f.relative_to(ROOT).as_posix() for f in (*ROOT.glob("nbs/repro_*.ipynb"), *data)]
    assert wanted
    assert [name for name in wanted if f"ddrepro/_share/{name}" not in names] == []
    assert not any(name.startswith(("nbs/", "tests/", "data/")) for name in names)


def test_wheel_finds_its_files_from_any_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = ("import json; from ddrepro.core.share import project_root, share_path; "
            "print(json.dumps([project_root(), str(share_path('data/report/page.html.j2'))]))")
    env = {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root, page = json.loads(done.stdout)
    assert root is None
    assert Path(page) == tmp_path / "site/ddrepro/_share/data/report/page.html.j2"
    assert Path(page).read_bytes() == (ROOT / "data/report/page.html.j2").read_bytes()


def test_entry_point(wheel):
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "ddrepro = ddrepro.cli:main" in archive.read(entry).decode()


def test_description_leads_to_the_repository(wheel):
    "Wherever the README is shown as the description of the package, its links and pictures are absolute"
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 5
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_requirements_hold_the_tested_set(wheel):
    archive = zipfile.ZipFile(wheel)
    lines = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode().splitlines()
    wanted = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist")]
    tested = {r.name: next(iter(r.specifier)).version for r in wanted if "tested" in str(r.marker)}
    assert set(tested) == {"torch", "torchvision", "torchaudio"}
    for r in wanted:
        if r.name in tested and "dev" not in str(r.marker): assert tested[r.name] in r.specifier, r


def test_wheel_runs_the_main_job_from_any_folder(wheel, tmp_path):
    "The package of the wheel alone, with this environment's other packages, in an empty folder"
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    env = {
        "PYTHONPATH": f"{site}:{packages}",
        "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "DDREPRO_WORKERS": "0",
    }
    code = ("import sys, ddrepro; from ddrepro.core.share import project_root; from ddrepro.cli import main; "
            "assert project_root() is None, ddrepro.__file__; "
            "sys.exit(main(['run', 'avdd', '-p', 'profile', 'test', '-p', 'ipc', '1', '-p', 'controls', 'false']))")
    command = [sys._base_executable, "-c", code]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = list((work / "reports").glob("avdd_digits_av_ipc1_test_*.html"))
    executed = list((work / "runs/notebooks").glob("avdd_digits_av_ipc1_test_*.ipynb"))
    assert len(reports) == len(executed) == 1, done.stdout
    assert f"{ROOT}/nbs" not in executed[0].read_text()
