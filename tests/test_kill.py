"""A run that is killed, again and again, ends in the bits of one that never was."""
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from ddrepro.core.seeding import keyed
from ddrepro.distill.distilled import DistilledData, merge
from ddrepro.distill.method import STEP_RULES
from helpers import PATIENCE, Warm, bits, iterations, job_in, kill_at, python, said

# What every child does. A job is plain data; each finished iteration is one line of the job's log.
RUN = '''
import json, os, signal, sys, tempfile
from pathlib import Path
import torch
from ddrepro.distill.loop import distill
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.data.registry import load_data
from ddrepro.nets.recipes import Recipe

torch.set_num_threads(1)
real = load_data("digits_av")
assert real.fingerprint
eager = dict(device="cpu", precision="float32", compile=False)

def method(job): return get_method("avdd", "digits_av", ipc=1, start_from="random", **job["hyper"])

def distil(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    options = {k: job.get(k) for k in ("classes", "store", "folder")}
    options["checkpoint_every"] = job.get("checkpoint_every", 30.)
    def finished(t, loss, S): os.write(log, b"%d\\n" % t)
    distill(method(job), real, seed=5, on_iteration=finished, progress=False, **options, **eager).save(job["result"])

def experiment(job):
    recipe = Recipe("tiny", epochs=1, batch=32, rate=1e-3)
    e = Experiment(method(job), seed=5, recipe=recipe, eval_seeds=1, part="validation")
    compute = eager | {"checkpoint_every": 0.}
    rows = run_all([e], real, runs=job["runs"], store=job["store"], compute=compute, progress=False)
    rows.to_csv(job["result"])

def die_writing(name, nth, moment):
    "SIGKILL to this very process while it writes the nth file (from 0) whose name holds `name`"
    mkstemp = tempfile.mkstemp
    fsync, replace = os.fsync, os.replace
    seen = []
    def kill(): os.kill(os.getpid(), signal.SIGKILL)
    def begin(*args, prefix, **kw):
        seen.append(name in prefix)
        return mkstemp(*args, prefix=prefix, **kw)
    def now(at): return at == moment and seen[-1:] == [True] and sum(seen) == nth + 1
    def flush(handle):
        if now("half written"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            kill()
        fsync(handle)
    def move(old, new):
        if now("not yet moved"): kill()
        replace(old, new)
        if now("just moved"): kill()
    tempfile.mkstemp = begin
    os.fsync, os.replace = flush, move

def do(job):
    if "die_writing" in job: die_writing(*job["die_writing"])
    (experiment if "runs" in job else distil)(job)
'''

HYPER = dict(width=8, batch=32, iterations=40)
SMALL = dict(width=4, batch=8, iterations=4)


@pytest.fixture(scope="module")
def warm():
    with Warm(RUN) as process: yield process


def leftovers(place) -> list: return list(place.rglob(".*.part"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    "Two processes that nobody disturbs, each with an empty store, side by side"
    jobs = [job_in(tmp_path_factory.mktemp("uninterrupted"), hyper=HYPER) for _ in range(2)]
    children = [python(RUN + "do(json.loads(sys.argv[1]))", json.dumps(job)) for job in jobs]
    for c in children: assert c.wait(PATIENCE) == 0, c.stdout.read()
    for c in children: c.stdout.close()
    return jobs


def test_the_same_seed_in_two_processes_gives_the_same_bits(uninterrupted):
    a, b = map(bits, uninterrupted)
    assert a == b
    s = DistilledData.load(uninterrupted[0]["result"])
    assert len(s.curve) == HYPER["iterations"] and sorted(s.tensors) == ["audio", "image"]


KILLS = 10   # in each of two runs

def kill_moments(run: int) -> list:
    """Sorted random moments: 7.25 is a quarter of an iteration after seven iterations;
    every fifth, negative, falls into the start instead"""
    draw = keyed(0, "test/kill", run)
    # a kill that comes late must still find the run going on
    moments = np.sort(draw.random(KILLS) * .8 * HYPER["iterations"])
    return [-draw.random() if k % 5 == 4 else m for k, m in enumerate(moments)]

@pytest.mark.parametrize("run, checkpoint_every", [(0, .02), (1, 0.)])
def test_killed_at_random_moments(warm, uninterrupted, tmp_path, run, checkpoint_every):
    job = job_in(tmp_path, hyper=HYPER, checkpoint_every=checkpoint_every)
    done = [kill_at(warm, job, moment) for moment in kill_moments(run)]
    in_the_loop = [d for d in done if d]
    assert len(in_the_loop) >= KILLS // 2 and all(d[-1] < HYPER["iterations"] - 1 for d in in_the_loop)
    assert warm.run(job) == 0, said(job)
    last = iterations(job)
    started = [d[0] for d in in_the_loop[1:]] + last[:1]
    assert sum(t > 0 for t in started) > len(started) / 2                    # it went on, it did not begin anew
    # nothing is lost but the iteration that was going on
    if checkpoint_every == 0.:
        assert all(t >= before[-1] for t, before in zip(started, in_the_loop))
    assert last[-1] == HYPER["iterations"] - 1 and len(last) < HYPER["iterations"]
    assert bits(job) == bits(uninterrupted[0])
    a, b = (DistilledData.load(j["result"]) for j in (job, uninterrupted[0]))
    assert a.curve == b.curve and all(torch.equal(a.tensors[m], b.tensors[m]) for m in b.tensors)


@pytest.fixture(scope="module")
def one_experiment(warm, tmp_path_factory):
    "An experiment that nobody disturbs"
    job = experiment_in(tmp_path_factory.mktemp("experiment"))
    assert warm.run(job) == 0, said(job)
    return job

def experiment_in(place, **options):
    return job_in(place, runs=place / "runs", result=place / "rows.csv", hyper=SMALL, **options)

def kept(job) -> dict:
    "What an experiment left that must not depend on its history: rows, curve, and the card with all checksums"
    files = [p for name in ("rows-*.csv", "distilled.json", "loss.csv") for p in Path(job["runs"]).glob(f"*/{name}")]
    for p in files:
        if p.name == "distilled.json": DistilledData.load(p)
    contents = {str(p.relative_to(job["runs"])): p.read_bytes() for p in files}
    return contents | {"table": Path(job["result"]).read_bytes()}

@pytest.mark.parametrize("name, nth", [
    ("spec.json", 0),
    ("key.json", 0),
    ("block", 7),
    ("checkpoint-", 1),
    ("distilled.safetensors", 0),
    ("distilled.json", 0),
    ("loss.csv", 0),
    ("certificate.txt", 0),
    ("rows-", 0),
])
def test_killed_in_the_middle_of_writing(warm, one_experiment, tmp_path, name, nth):
    "One experiment, killed three times around the writing of the same file"
    for moment in ("half written", "not yet moved", "just moved"):
        assert warm.run(experiment_in(tmp_path, die_writing=[name, nth, moment])) == -signal.SIGKILL
    # temporary files of the first two kills: a run removes those in its own folder, nobody minds the rest
    left = 2 if name in ("key.json", "block") else 0
    assert len(leftovers(tmp_path)) == left
    job = experiment_in(tmp_path)
    assert warm.run(job) == 0, said(job)
    assert kept(job) == kept(one_experiment)
    assert len(kept(job)) == 4


@pytest.mark.parametrize("rule", STEP_RULES)
def test_shards_of_classes_merge_into_the_joint_run(warm, tmp_path, rule):
    "Even classes, odd classes and all of them, at the same time and on the same store"
    parts = {"even": list(range(0, 10, 2)), "odd": list(range(1, 10, 2)), "joint": None}
    options = dict(store=tmp_path / "store", checkpoint_every=0., hyper=SMALL | {"step_rule": rule})
    jobs = {k: job_in(tmp_path / k, classes=c, **options) for k, c in parts.items()}
    pids = {k: warm.start(job) for k, job in jobs.items()}
    for k, pid in pids.items(): assert warm.wait(pid) == 0, said(jobs[k])
    even, odd, joint = (DistilledData.load(jobs[k]["result"]) for k in parts)
    merged = merge([odd, even])
    assert merged.labels == joint.labels
    for m in joint.tensors: assert torch.equal(merged.tensors[m], joint.tensors[m])
