"""What several tests share: children to kill, files to damage, small data, a server, commands as people type them."""
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from ddrepro.core.files import digest, load_tensors
from ddrepro.core.seeding import keyed_int, keyed_normal
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.pairs import PairData, PairPart
from ddrepro.data.real import RealData
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData

TESTS = Path(__file__).parent
PATIENCE = 300  # seconds after which a child that does nothing fails its test
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}  # metadata of a notebook


# Results are bit-equal at equal thread counts: children compute on one thread, and so do tests that compare with them

MODULES = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))  # children import this file
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "DDREPRO_WORKERS": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": MODULES,
}


@contextmanager
def one_process():
    "Train and evaluate in this process, without workers"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDREPRO_WORKERS", "0")
        yield


@contextmanager
def one_thread():
    "Compute as the children do: in this process, on one thread"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_process(): yield
    finally: torch.set_num_threads(before)


# Children

def python(script, *words, **options):
    "Start a script in a process of its own"
    command = [sys.executable, "-c", script, *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, **options)


def run_script(script, *words):
    "Run a script in a process of its own to its end"
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)


def die_at(nth: int, moment: str | None):
    "SIGKILL to this very process at the nth file it writes, from 1: \"half written\", \"written\" or \"just moved\""
    fsync, replace = os.fsync, os.replace
    written = []

    def die_now(at):
        if at == moment and len(written) == nth: os.kill(os.getpid(), signal.SIGKILL)

    def flush(handle):
        written.append(handle)
        if moment == "half written" and len(written) == nth: os.ftruncate(handle, os.fstat(handle).st_size // 2)
        die_now("half written")
        fsync(handle)
        die_now("written")

    def move(old, new):
        replace(old, new)
        die_now("just moved")

    os.fsync, os.replace = flush, move


# What a warm process does after a script that defines do(job): it forks a child for every job it is sent
SERVE = '''
import traceback

def child(job):
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 0
    try: do(job)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

def answer(question):
    if "job" in question: return os.fork() or child(question["job"])
    pid, status = os.waitpid(question["status"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None

print(json.dumps("ready"), flush=True)
for line in sys.stdin: print(json.dumps(answer(json.loads(line))), flush=True)
'''


class Warm:
    "A process that has imported torch once, and forks a fresh child for every run"
    def __init__(self, script: str): self.process = python(script + SERVE, stdin=subprocess.PIPE)

    def __enter__(self):
        assert json.loads(self.process.stdout.readline()) == "ready"
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        assert self.process.wait(60) == 0

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


def job_in(place, **options) -> dict:
    "A job that keeps everything in one folder"
    place.mkdir(parents=True, exist_ok=True)
    files = {"folder": "run", "store": "store", "log": "log", "said": "said", "result": "distilled"}
    job = {k: place / name for k, name in files.items()} | options
    return {k: str(v) if isinstance(v, Path) else v for k, v in job.items()}


def said(job) -> str: return Path(job["said"]).read_text()


def iterations(job) -> list[int]:
    "Iterations that the job's newest child has finished"
    try: lines = Path(job["log"]).read_text().split("\n")[:-1]
    except FileNotFoundError: return []
    return [int(line) for line in lines]


def kill_at(warm, job, moment, iteration_seconds=.05) -> list[int]:
    "Start the job, kill it at a moment; the iterations it had finished"
    Path(job["log"]).unlink(missing_ok=True)
    pid = warm.start(job)
    end = time.monotonic() + PATIENCE
    while moment >= 0 and (iterations(job) or [-1])[-1] + 1 < max(1, int(moment)):
        assert warm.ask(status=pid) is None and time.monotonic() < end, said(job)
        time.sleep(.002)
    time.sleep(iteration_seconds * (abs(moment) % 1))
    os.kill(pid, signal.SIGKILL)
    assert warm.wait(pid) == -signal.SIGKILL
    return iterations(job)


def bits(job) -> str:
    "The card of the distilled set, with SHA-256 over every bit of tensors and loss curve, which loading verifies"
    DistilledData.load(job["result"])
    return Path(job["result"] + ".json").read_text()


# Damage

class Stop(Exception): "The run is stopped here"


def truncated(length):
    def damage(path): path.write_bytes(path.read_bytes()[:length])
    return damage


def flipped(nth):
    "One bit of one byte, drawn by key, is turned over"
    def damage(path):
        content = bytearray(path.read_bytes())
        content[keyed_int(len(content), 0, "test/flip", nth)] ^= 1 << keyed_int(8, 0, "test/flip bit", nth)
        path.write_bytes(content)
    return damage


def overwritten(path): path.write_bytes(b"\x80\x04K\x01." * 50)


DAMAGES = {
    "empty": truncated(0),
    "first bytes only": truncated(7),
    "half of the header": truncated(200),
    "last byte missing": truncated(-1),
    **{f"flipped bit {k}": flipped(k) for k in range(6)},
    "something else": overwritten,
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())


def snapshot_digests(root) -> dict[str, str]:
    "File → digest over the tensors and metadata of an expert's snapshot, which loading verifies"
    return {p.name: digest(*load_tensors(p, "trajectory")) for p in root.rglob("expert*.safetensors")}


# Numbers of the authors' code (fixtures/README.md)

def reference(file) -> dict[str, torch.Tensor]:
    with np.load(TESTS / "fixtures" / file, allow_pickle=False) as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def cases(numbers, kind) -> list[str]:
    "Keys of one kind, without their last part"
    return sorted({key.rpartition("/")[0] for key in numbers if key.startswith(kind + "/")})


def reference_input(stream, shape) -> torch.Tensor:
    "The keyed input of a case, whose shape is written as in '3x3x16x16'"
    size = tuple(map(int, shape.split("x")))
    return keyed_normal(size, 0, "reference/" + stream, *size)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"max abs difference {difference:.1e}, allowed {tolerance:.0e}"


# Data sets

COLOURS = ("red", "green", "blue", "grey")


def squares(train: int = 24) -> PairData:
    "Noisy squares of a colour on the left or the right, two captions each"
    def part(name, count):
        images = .1 * keyed_normal((count, 3, 16, 16), 0, name).abs()
        captions = []
        for i in range(count):
            colour, place = i % 4, i // 4 % 2
            images[i, :, 4:12, 8 * place:8 * place + 8] += torch.eye(4, 3)[colour][:, None, None] if colour < 3 else .5
            word, side = COLOURS[colour], "right" if place else "left"
            captions.append([f"a {word} square on the {side}", f"{word} thing, {side} side"])
        return PairPart((images.clamp(0, 1) * 255).byte(), captions)

    parts = part("train", train), part("validation", 8), part("test", 8)
    return PairData("squares", *parts, normalisation={"image": Normalisation((.2,) * 3, (.3,) * 3)})


def few_digits(a_class: int = 12, test: int = 40) -> RealData:
    "The embedded digits with a few training samples of every class"
    digits = load_data("digits")
    kept = torch.cat([torch.from_numpy(rows[:a_class]) for rows in digits.train.by_class.values()])
    return replace(digits, train=digits.train.select(kept), test=digits.test.select(range(test)))


def idx(array) -> bytes:
    "An array in the format of MNIST's files, compressed"
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): return


@contextmanager
def served(folder):
    "Serve a folder on this machine; its address"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        try: yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            server.server_close()


# Commands

DDREPRO = [sys.executable, "-c", "import sys; from ddrepro.cli import main; sys.exit(main())"]


def run_command(command, folder):
    "Run a command in a folder, in this machine's plain environment; the finished process"
    env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "DDREPRO_RUNS")}
    env |= {"OMP_NUM_THREADS": "1", "DDREPRO_WORKERS": "0"}
    return subprocess.run([str(c) for c in command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def papermill(notebook, folder, *words, output="out.ipynb"):
    "Execute a notebook by bare papermill in a folder; the finished process"
    command = [sys.executable, "-m", "papermill", notebook, output, *words, "--no-progress-bar"]
    return run_command(command, folder)


def kept_files(folder) -> dict:
    "Every file of runs and store, but the executed notebooks"
    files = [p for p in folder.glob("runs/**/*") if p.is_file() and p.parent.name != "notebooks"]
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}
