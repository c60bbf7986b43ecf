"""Several processes that want the same rows of one folder, and a process that wants what another one works at."""
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest

from helpers import Warm, job_in, said

# What every child does: two distillations of three evaluation networks each, with a checkpoint after every iteration
RUN = '''
import json, os, sys, time
from pathlib import Path
import torch
from ddrepro.data.real import RealData
from ddrepro.distill.loop import distill
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.nets.pair_training import PairRecipe
from ddrepro.nets.recipes import Recipe
from ddrepro.core.seeding import keyed_normal
from helpers import squares

torch.set_num_threads(1)
eager = dict(device="cpu", precision="float32", compile=False)

def of_classes():
    x, y = keyed_normal((30, 1, 16, 16), 0, "two writers").sigmoid(), [i % 3 for i in range(30)]
    real = RealData.from_tensors("mine", {"image": x}, y, {"image": x[:9]}, y[:9])
    return real, get_method("dm", ipc=1, iterations=12, width=4), Recipe("tiny", 1, 8)

def of_pairs():
    small = dict(width=4, dim=8, experts=1, expert_epochs=2, expert_batch=8, max_start=1, span=1, steps=2, iterations=4)
    return squares(), get_method("vldd", ipc=2, **small), PairRecipe("tiny", 1, 8)

def do(job):
    real, method, recipe = of_pairs() if job["pairs"] else of_classes()
    experiments = [Experiment(method, seed, recipe, eval_seeds=3) for seed in (0, 1)]
    while not Path(job["go"]).exists(): time.sleep(.001)      # all children at once
    compute = eager | dict(checkpoint_every=0.)
    where = dict(store=job["store"], progress=False)
    if job.get("alone"): distill(method, real, folder=job["runs"], **where, **compute).save(job["result"])
    else: run_all(experiments, real, runs=job["runs"], compute=compute, **where).to_csv(job["result"])
'''


@pytest.fixture(scope="module")
def warm():
    with Warm(RUN) as process: yield process


def jobs_of(place, count, **options) -> list:
    "Jobs that share runs and store"
    shared = {name: place / name for name in ("runs", "store", "go")}
    return [job_in(place / str(i), **shared, **options) for i in range(count)]


def together(warm, place, count, **options) -> list:
    "Start so many processes at one moment and wait for all; their jobs"
    jobs = jobs_of(place, count, **options)
    children = [warm.start(job) for job in jobs]
    (place / "go").touch()
    for job, child in zip(jobs, children): assert warm.wait(child) == 0, said(job)
    return jobs


def check_rows(jobs):
    "Every process has every row once, the same ones, and they stand once on disk"
    tables = [pd.read_csv(job["result"], index_col=0) for job in jobs]
    for rows in tables:
        assert rows.groupby(["seed", "eval_seed"]).size().tolist() == [len(rows) / 6] * 6
        assert not rows.duplicated(["modality", "seed", "eval_seed"]).any()
        pd.testing.assert_frame_equal(rows, tables[0])
    files = list(Path(jobs[0]["runs"]).glob("*/rows-*.csv"))
    assert len(files) == 2
    for file in files: assert not pd.read_csv(file, comment="#").duplicated(["modality", "seed", "eval_seed"]).any()


def left_behind(folder) -> list:
    return [p.name for p in Path(folder).rglob("*") if p.name.startswith("checkpoint-") or p.name.endswith(".part")]


@pytest.mark.parametrize("pairs", [False, True], ids=["classes", "pairs"])
@pytest.mark.parametrize("attempt", range(2))
def test_three_processes_want_the_same_rows(warm, tmp_path, pairs, attempt):
    jobs = together(warm, tmp_path, 3, pairs=pairs)
    check_rows(jobs)
    assert left_behind(tmp_path / "runs") == []


def test_two_distillations_into_one_folder(warm, tmp_path):
    "The second waits, reads the last checkpoint of the first, and has the same set"
    jobs = together(warm, tmp_path, 2, pairs=False, alone=True)
    cards = [json.loads(Path(job["result"] + ".json").read_text()) for job in jobs]
    assert cards[0] == cards[1]


def test_a_killed_owner_holds_nothing(warm, tmp_path):
    jobs = jobs_of(tmp_path, 2, pairs=False)
    first = warm.start(jobs[0])
    (tmp_path / "go").touch()
    while not list((tmp_path / "runs").glob("*/checkpoint-*")): assert warm.ask(status=first) is None, said(jobs[0])
    os.kill(first, signal.SIGKILL)
    assert warm.wait(first) == -signal.SIGKILL
    assert warm.run(jobs[1]) == 0, said(jobs[1])
    check_rows(jobs[1:])
    assert left_behind(tmp_path / "runs") == []
