"""Classes distilled apart by several processes at once, on one folder and one store: exactly the joint run."""
import os
import signal
from pathlib import Path

import pytest
import torch

from ddrepro.distill.distilled import DistilledData
from helpers import Warm, job_in, said

RUN = '''
import json, os, sys, time
from pathlib import Path
import torch
from ddrepro.distill import class_wise
from ddrepro.distill.class_wise import distill_by_class
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.data.registry import load_data

torch.set_num_threads(1)
class_wise.PATIENCE = .02
real = load_data("digits_av")
assert real.fingerprint

def do(job):
    method = get_method("avdd", "digits_av", start_from="random", width=8, batch=32, iterations=12, **job["hyper"])
    while not Path(job["go"]).exists(): time.sleep(.001)      # all children at once
    shared = dict(store=job["store"], device="cpu", precision="float32", compile=False, progress=False, checkpoint_every=0.)
    if job["joint"]: s = distill(method, real, 5, **shared)
    else: s = distill_by_class(method, real, 5, folder=job["folder"], parts=job["parts"], **shared)
    s.save(job["result"])
'''


@pytest.fixture(scope="module")
def warm():
    with Warm(RUN) as process: yield process

def children(warm, place, count, **options):
    "Jobs of so many processes that share folder and store, and of a joint run on the same store; none has begun"
    shared = {name: place / name for name in ("folder", "store", "go")} | dict(hyper={}, joint=False, parts=None) | options
    jobs = [job_in(place / str(i), **shared | dict(joint=i == count)) for i in range(count + 1)]
    return jobs, [warm.start(job) for job in jobs]

def check_sets(jobs):
    *apart, joint = [DistilledData.load(job["result"]) for job in jobs]
    for s in apart:
        assert s.labels == joint.labels
        for m in joint.tensors: assert torch.equal(s.tensors[m], joint.tensors[m])

def parts_made(job) -> list: return sorted(place.name for place in Path(job["folder"]).iterdir())


@pytest.mark.parametrize("hyper, parts", [
    (dict(ipc=1, factor=1), None),                             # one sample a class: the library rounds a sample alone otherwise
    (dict(ipc=2), 3),
    (dict(ipc=1, step_rule="per_class_own"), [[9, 0], [1, 2, 3, 4, 5, 6, 7], [8]]),
], ids=["a class each", "three parts", "parts by name"])
def test_two_processes_and_the_joint_run(warm, tmp_path, hyper, parts):
    "Two processes share the parts, a third distils all classes together; every one of them ends with the same bits"
    jobs, pids = children(warm, tmp_path, 2, hyper=hyper, parts=parts)
    (tmp_path / "go").touch()
    for job, pid in zip(jobs, pids): assert warm.wait(pid) == 0, said(job)
    check_sets(jobs)
    assert len(parts_made(jobs[0])) == (len(parts) if isinstance(parts, list) else parts or 10)
    assert not [file for file in Path(jobs[0]["folder"]).rglob("*") if file.name.startswith("checkpoint-")]

def test_a_killed_process_leaves_its_part_to_the_other(warm, tmp_path):
    jobs, (first, second, joint) = children(warm, tmp_path, 2, hyper=dict(ipc=1), parts=2)
    (tmp_path / "go").touch()
    while len(list((tmp_path / "folder").glob("*/checkpoint-*"))) < 2: assert warm.ask(status=second) is None, said(jobs[1])
    os.kill(first, signal.SIGKILL)
    assert warm.wait(first) == -signal.SIGKILL
    for job, pid in zip(jobs[1:], (second, joint)): assert warm.wait(pid) == 0, said(job)
    check_sets(jobs[1:])

def test_a_damaged_part_is_distilled_again(warm, tmp_path):
    jobs, pids = children(warm, tmp_path, 1, hyper=dict(ipc=1), parts=2)
    (tmp_path / "go").touch()
    for job, pid in zip(jobs, pids): assert warm.wait(pid) == 0, said(job)
    file = next((tmp_path / "folder").glob("*/distilled.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    again = jobs[0] | dict(result=str(tmp_path / "again"), said=str(tmp_path / "said"))
    assert warm.wait(warm.start(again)) == 0, said(again)
    assert "distilling these classes again" in said(again)
    check_sets([again, jobs[1]])
