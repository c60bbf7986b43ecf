"""A run that is killed, again and again, ends in the bits of one that never was."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddrepro.distilled import DistilledData, merge
from ddrepro.method import STEP_RULES
from ddrepro.seeding import keyed

# What every child does. A job is plain data; each finished iteration is one line of the job's log.
RUN = '''
import json, os, signal, sys, tempfile
from pathlib import Path
import torch
from ddrepro.data import load_data
from ddrepro.distill import distill
from ddrepro.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.training import Recipe

torch.set_num_threads(1)
real = load_data("digits_av")
assert real.fingerprint
eager = dict(device="cpu", precision="float32", compile=False)
method = lambda job: get_method("avdd", "digits_av", ipc=1, start_from="random", **job["hyper"])

def distil(job):
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    distilled = distill(method(job), real, seed=5, classes=job.get("classes"), store=job.get("store"), folder=job.get("folder"), progress=False,
                        checkpoint_every=job.get("checkpoint_every", 30.), on_iteration=lambda t, loss, S: os.write(log, b"%d\\n" % t), **eager)
    distilled.save(job["result"])

def experiment(job):
    recipe = Recipe("tiny", epochs=1, batch=32, rate=1e-3)
    e = Experiment(method(job), seed=5, recipe=recipe, eval_seeds=1, part="validation")
    rows = run_all([e], real, runs=job["runs"], store=job["store"], compute=eager | {"checkpoint_every": 0.}, progress=False)
    rows.to_csv(job["result"])

def die_writing(name, nth, moment):
    "SIGKILL to this very process while it writes the nth file (from 0) whose name holds `name`"
    mkstemp, fsync, replace, seen = tempfile.mkstemp, os.fsync, os.replace, []
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    def begin(*args, prefix, **kw):
        seen.append(name in prefix)
        return mkstemp(*args, prefix=prefix, **kw)
    now = lambda at: at == moment and seen[-1:] == [True] and sum(seen) == nth + 1
    def flush(handle):
        if now("half written"):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            kill()
        fsync(handle)
    def move(old, new):
        if now("not yet moved"): kill()
        replace(old, new)
        if now("just moved"): kill()
    tempfile.mkstemp, os.fsync, os.replace = begin, flush, move

def do(job):
    if "die_writing" in job: die_writing(*job["die_writing"])
    (experiment if "runs" in job else distil)(job)
'''

FORK = RUN + '''
import traceback

def child(job):
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    try: do(job)
    except BaseException:
        traceback.print_exc()
        status = 1
    else: status = 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)

def answer(question):
    if "job" in question: return os.fork() or child(question["job"])
    pid, status = os.waitpid(question["status"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None

print(json.dumps("ready"), flush=True)
for line in sys.stdin: print(json.dumps(answer(json.loads(line))), flush=True)
'''

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DDREPRO_WORKERS": "0", "CUDA_VISIBLE_DEVICES": ""}
HYPER = dict(width=8, batch=32, iterations=40)
SMALL = dict(width=4, batch=8, iterations=4)
PATIENCE = 300   # seconds after which a child that does nothing fails its test


def python(script, *args, **kw):
    return subprocess.Popen([sys.executable, "-c", script, *args], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **kw)


class Warm:
    "A process that has imported torch once, and forks a fresh child for every run"
    def __init__(self): self.process = python(FORK, stdin=subprocess.PIPE)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, job) -> int: return self.ask(job=job)

    def wait(self, pid) -> int:
        "Exit status, negative where a signal ended it"
        end = time.monotonic() + PATIENCE
        while (status := self.ask(status=pid)) is None:
            assert time.monotonic() < end, "the child hangs"
            time.sleep(.002)
        return status

    def run(self, job) -> int: return self.wait(self.start(job))


@pytest.fixture(scope="module")
def warm():
    w = Warm()
    assert json.loads(w.process.stdout.readline()) == "ready"
    yield w
    w.process.stdin.close()
    assert w.process.wait(60) == 0


def job_in(place, **options):
    "A job that keeps everything in a folder of its own"
    place.mkdir(parents=True, exist_ok=True)
    given = dict(folder=place / "run", store=place / "store", log=place / "log", said=place / "said", result=place / "distilled") | options
    return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}


def said(job): return open(job["said"]).read()

def iterations(job) -> list:
    "Iterations that the job's newest child has finished"
    try: lines = open(job["log"]).read().split("\n")[:-1]
    except FileNotFoundError: return []
    return [int(l) for l in lines]

def bits(job) -> str:
    "The card of the distilled set: configuration, versions, and SHA-256 over every bit of tensors and loss curve, which loading verifies"
    DistilledData.load(job["result"])
    return Path(job["result"] + ".json").read_text()

def leftovers(place) -> list: return [p for p in place.rglob(".*") if p.is_file()]


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
    "Sorted random moments: 7.25 is a quarter of an iteration after seven iterations; every fifth, negative, falls into the start instead"
    draw = keyed(0, "test/kill", run)
    moments = np.sort(draw.random(KILLS) * .8 * HYPER["iterations"])         # a kill that comes late must still find the run going on
    return [-draw.random() if k % 5 == 4 else m for k, m in enumerate(moments)]

def kill_at(warm, job, moment, iteration_seconds=.05) -> list:
    "Start the job, kill it at a moment; the iterations it had finished"
    if os.path.exists(job["log"]): os.remove(job["log"])
    pid = warm.start(job)
    end = time.monotonic() + PATIENCE
    while moment >= 0 and (iterations(job) or [-1])[-1] + 1 < max(1, int(moment)):
        assert warm.ask(status=pid) is None and time.monotonic() < end, said(job)
        time.sleep(.002)
    time.sleep(iteration_seconds * (abs(moment) % 1))
    os.kill(pid, signal.SIGKILL)
    assert warm.wait(pid) == -signal.SIGKILL
    return iterations(job)

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
    if checkpoint_every == 0.:                                               # nothing is lost but the iteration that was going on
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

def experiment_in(place, **options): return job_in(place, runs=place / "runs", result=place / "rows.csv", hyper=SMALL, **options)

def kept(job) -> dict:
    "What an experiment left that must not depend on its history: rows, curve, and the card with the checksum of all tensors"
    files = [p for name in ("rows-*.csv", "distilled.json", "loss.csv") for p in Path(job["runs"]).glob(f"*/{name}")]
    for p in files:
        if p.name == "distilled.json": DistilledData.load(p)
    return {str(p.relative_to(job["runs"])): p.read_bytes() for p in files} | {"table": open(job["result"], "rb").read()}

@pytest.mark.parametrize("name, nth", [("spec.json", 0), ("key.json", 0), ("block", 7), ("checkpoint-", 1), ("distilled.safetensors", 0),
                                       ("distilled.json", 0), ("loss.csv", 0), ("certificate.txt", 0), ("rows-", 0)])
def test_killed_in_the_middle_of_writing(warm, one_experiment, tmp_path, name, nth):
    "One experiment, killed three times around the writing of the same file"
    for moment in ("half written", "not yet moved", "just moved"):
        assert warm.run(experiment_in(tmp_path, die_writing=[name, nth, moment])) == -signal.SIGKILL
    left = 0 if name == "checkpoint-" else 2                                 # temporary files of the first two kills: a run removes its own checkpoints', nobody minds the rest
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
