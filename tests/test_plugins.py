"""Methods and data of other packages: known everywhere once installed, hashed with their code, and named where they are broken."""
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from ddrepro.core.share import share_path
from ddrepro.data import load_data
from helpers import ENVIRONMENT

ROOT = share_path("nbs").parent
METHOD = '''
from dataclasses import dataclass

from ddrepro.distill import MeanMatching
from ddrepro.methods import register


@register
@dataclass(frozen=True)
class EvenPull(MeanMatching):
    "Distances instead of their squares"
    name = "even_pull"

    def match(self, real, synthetic): return sum(((real[m] - synthetic[m]).square().sum(1) + 1e-6).sqrt().sum() for m in real)
'''


def install(place: Path, name: str, source: str, group: str, points: str):
    "A package as pip leaves it in site-packages"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.py").write_text(source)
    about = place / f"{name}-0.3.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{points}\n")


@pytest.fixture
def place(tmp_path): return tmp_path / "site-packages"


def in_process(place: Path, code: str, **more):
    "A Python process that finds the packages of a place"
    path = os.pathsep.join([str(place), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300, **more)


def command(place: Path, *words, **more):
    return in_process(place, f"import sys; from ddrepro.cli import main; sys.exit(main({list(words)!r}))", **more)


def test_an_installed_method_is_known_and_a_broken_one_is_named(place):
    install(place, "even_pull", METHOD, "ddrepro.methods", "even_pull = even_pull:EvenPull")
    install(place, "halfway", "import a_package_that_nobody_has", "ddrepro.methods", "halfway = halfway:Halfway")
    listed = command(place, "methods")
    assert listed.returncode == 0 and "even_pull" in listed.stdout and "dsdm" in listed.stdout
    for words in ("the plug-in 'halfway' of ddrepro.methods", "brought by halfway 0.3", "a_package_that_nobody_has", "pip uninstall halfway"):
        assert listed.stderr.count(words) == 1, listed.stderr
    asked = command(place, "methods", "halfway")
    assert asked.returncode == 2 and "ddrepro: the plug-in 'halfway'" in asked.stderr
    shown = command(place, "methods", "even_pull")
    assert shown.returncode == 0 and "start_from" in shown.stdout


def test_a_plugin_cannot_take_a_name(place):
    thief = METHOD.replace("even_pull", "dm").replace("EvenPull", "DM")
    install(place, "thief", thief, "ddrepro.methods", "dm = thief:DM")
    done = in_process(place, "from ddrepro.methods import get_method; print(type(get_method('dm')).__module__)")
    assert done.stdout.strip() == "ddrepro.methods.dm" and "takes the name 'dm'" in done.stderr


def test_the_hash_of_a_run_follows_the_code_of_a_plugin(place):
    code = '''
from ddrepro.core.provenance import short_hash
from ddrepro.data import load_data
from ddrepro.evaluate import Experiment
from ddrepro.methods import get_method
real = load_data("digits")
for name in ("even_pull", "dm"): print(short_hash(Experiment(get_method(name, ipc=1)).distillation(real)))
'''
    hashes = []
    for source in (METHOD, METHOD.replace("1e-6", "1e-3")):
        install(place, "even_pull", source, "ddrepro.methods", "even_pull = even_pull:EvenPull")
        done = in_process(place, code)
        assert done.returncode == 0, done.stderr
        hashes.append(done.stdout.split())
    (mine, dm), (edited, dm_again) = hashes
    assert mine != edited and dm == dm_again


def test_a_paper_runs_with_a_method_and_with_data_of_ones_own(place, tmp_path):
    install(place, "even_pull", METHOD, "ddrepro.methods", "even_pull = even_pull:EvenPull")
    digits = load_data("digits").train
    for c in range(3):
        folder = tmp_path / "photos" / f"digit {c}"
        folder.mkdir(parents=True)
        for i in digits.by_class[c][:12].tolist():
            x = digits.inputs["image"][i, 0]
            Image.fromarray((x if x.dtype.is_floating_point is False else x * 255).byte().numpy()).save(folder / f"{i}.png")
    words = ("run", "dsdm", "-p", "dataset", "image_folder", "-p", "folder", "photos", "-p", "table", "1", "-p", "profile", "test", "-p", "ipc", "1",
             "-p", "methods", "DM", "even_pull", "-p", "controls", "false", "--name", "own")
    (tmp_path / "photos/digit 0/notes.txt").write_text("taken in May")
    done = command(place, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "reports/own.csv")
    assert set(rows.row) == {"DM", "even_pull"} and set(rows.dataset) == {"photos"}
    assert "photos" in (tmp_path / "reports/own.html").read_text()
    report = command(place, "report", "reports/own.csv", "--html", "mine.html", "--against", "DM", "--title", "Mine", cwd=tmp_path)
    assert report.returncode == 0 and "even_pull better than DM" in (tmp_path / "mine.html").read_text()


@pytest.mark.parametrize("words, said", [
    (("-p", "dataset", "image_folder"), "image_folder needs folder"),
    (("-p", "folder", "photos"), "folder is for image_folder and sound_folder"),
    (("-p", "dataset", "image_folder", "-p", "folder", "nowhere"), "'nowhere': there is none"),
    (("-p", "dataset", "image_folder", "-p", "speech", "sound_folder", "-p", "folder", "x"), "run one after the other"),
])
def test_a_folder_that_cannot_be_meant_is_said_before_compute(words, said, tmp_path):
    done = command(tmp_path, "run", "dsdm", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr


def test_data_of_a_package_are_known(place):
    source = '''
import torch
from ddrepro.data import RealData, dataset

@dataset("leaves", modalities=["image"], classes=2, sizes="16/4/4", source="drawn here")
def leaves() -> RealData:
    x, labels = torch.rand(20, 3, 16, 16), torch.arange(20) % 2
    return RealData.from_tensors("leaves of mine", {"image": x}, labels, {"image": x[:4]}, labels[:4])
'''
    install(place, "leaves", source, "ddrepro.data", "leaves = leaves\ntwigs = twigs")
    done = command(place, "data", "check", "leaves")
    assert done.returncode == 0 and "leaves: intact" in done.stdout, done.stderr
    absent = command(place, "data", "check", "twigs")
    assert absent.returncode == 1 and "the plug-in 'twigs' of ddrepro.data" in absent.stdout
