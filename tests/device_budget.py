"""What an iteration of every method costs a GPU, counted on the emulated device.

`python tests/device_budget.py` writes `device_budget.json` anew, with --lines it prints where each copy and read is.
An entry is the difference between a run of three iterations and one of a single iteration:
what comes before the loop and after it falls out. Numbers are exact, for operators do not depend on the machine.
"""
import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from emulated_device import NAME, WAITS, Emulator

from ddrepro.core.compute import Compute
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import Part, RealData
from ddrepro.distill.loop import distill
from ddrepro.distill.method import Context
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.nets.pair_training import PairRecipe
from ddrepro.nets.recipes import Recipe
from helpers import squares

BUDGET = Path(__file__).with_name("device_budget.json")
REWRITE = "python tests/device_budget.py"
GPU_CHUNK = 1024        # as `resolve_compute` has it there
COUNTED = ("launch", *WAITS)
FEWER, MORE = 1, 3      # iterations or epochs of the two runs

STRATEGY = "color_crop_cutout_scale_rotate"


def patterns(*modalities) -> RealData:
    "Ten classes of eight noisy pictures, and of sounds that look like them"
    labels = torch.arange(10).repeat_interleave(8)

    def inputs(part):
        centres = {m: keyed_normal((10, 1, 16, 16), 0, "pattern", m) for m in modalities}
        return {m: centres[m][labels] + keyed_normal((80, 1, 16, 16), 0, part, m) / 2 for m in modalities}

    parts = [Part(inputs(name), labels) for name in ("train", "validation", "test")]
    normalisation = {m: Normalisation((.1,), (1.2,)) for m in modalities}
    return RealData("patterns", tuple("abcdefghij"), *parts, normalisation, STRATEGY)


PAIRS = dict(width=4, dim=6, experts=2, expert_epochs=2, expert_batch=8, expert_captions=0, ipc=6)
MATCHING = dict(ipc=2, width=8, batch=6, iterations=MORE)
SETTINGS = {
    "random": dict(ipc=2, width=8),
    "herding": dict(ipc=2, width=8),
    "kcenter": dict(ipc=2, width=8),
    "forgetting": PAIRS,
    "dm": MATCHING,
    "avdd": MATCHING | dict(ipc=1, start_from="random"),
    "dsdm": MATCHING | dict(lr=1., models=2, pool_epochs=2, pool_batch=32, smooth_iter=0),
    "mtt": dict(ipc=2, width=8, iterations=MORE, steps=3, span=1, max_start=2, experts=2, expert_epochs=2,
                expert_batch=32),
    "m3d": MATCHING | dict(lr=.1),
    "cafe": MATCHING | dict(probe=4, inner_cap=2),
    "cafe_dsa": MATCHING | dict(probe=4, inner_cap=2),
    "idm": MATCHING | dict(factor=2),
    "dc": MATCHING | dict(outer=2, inner=1),
    "dsa": MATCHING | dict(outer=2, inner=1),
    "idc": MATCHING | dict(factor=2),
    "dd": dict(ipc=2, width=8, iterations=MORE),
    "vldd": PAIRS | dict(iterations=MORE, steps=3, batch=4, max_start=2, alpha=.1, lr_image=5., lr_text=5.,
                         lr_rate=1e-5),
}
KEEP_NETWORKS = ("dsdm", "mtt", "vldd", "forgetting")      # in the store


def small(name: str, **changes):
    "A method in small, and data for it"
    if name in ("forgetting", "vldd"): real = squares()
    else: real = patterns("image", "audio") if name == "avdd" else patterns("image")
    return get_method(name, **SETTINGS[name] | changes), real


def run(method, real, device: str, precision: str = "float32", store=None, chunk: int = 16, **options):
    "Distil on a device, in chunks that are the same everywhere"
    compute = Compute(device, precision, chunk=chunk)
    with redirect_stdout(StringIO()):
        return distill(method, real, 0, compute=compute, store=store, progress=False, **options)


def difference(more: Counter, fewer: Counter) -> Counter:
    "(kind, name, line) → what the longer run had more of; less of something is kept too"
    longer = more.copy()
    longer.subtract(fewer)
    return Counter({key: n for key, n in longer.items() if n})


def by_kind(counts: Counter) -> dict:
    "Kind → how often, for a budget"
    return {kind: sum(n for key, n in counts.items() if key[0] == kind) for kind in COUNTED}


def by_line(counts: Counter, kinds: tuple = WAITS) -> list:
    "(how often, kind, name, line) of some kinds, the most frequent first"
    return sorted(((n, *key) for key, n in counts.items() if key[0] in kinds), reverse=True)


def forget():
    "Empty the caches of ddrepro's functions: what is done once in a process is then done in every run, and falls out"
    for name, module in list(sys.modules.items()):
        if not name.startswith("ddrepro."): continue
        for value in vars(module).values():
            if callable(getattr(value, "cache_clear", None)): value.cache_clear()


def counts_of_method(method, real, precision: str) -> Counter:
    "What the device does in two iterations"
    with Emulator() as device, TemporaryDirectory() as folder:
        store = folder if method.name in KEEP_NETWORKS else None
        with redirect_stdout(StringIO()):      # networks are trained and kept
            method.prepare(Context(real, 0, tuple(range(len(real.classes))), Compute(NAME, precision), Path(folder)))
        counts = []
        for iterations in (FEWER, MORE):
            forget()
            shorter = replace(method, iterations=iterations)
            with device.counting() as added: run(shorter, real, NAME, precision, store, GPU_CHUNK)
            counts.append(added)
    return difference(counts[1], counts[0])


TRAINING = Recipe("tiny", MORE, 16, "sgd", rate=.01, cutmix=.5, family="diffaug")
PAIR_TRAINING = PairRecipe("tiny", MORE, 4)


def counts_of_evaluation(name: str) -> Counter:
    "What the device does in two epochs of two evaluation networks, on a set of a coreset's"
    method, real = small("random", ipc=6) if name == "classes" else small("forgetting")
    recipe = TRAINING if name == "classes" else PAIR_TRAINING
    counts = []
    with Emulator() as device, TemporaryDirectory() as store:
        distilled = run(method, real, "cpu", store=store)
        for epochs in (FEWER, MORE):
            forget()
            with device.counting() as added:
                evaluate(distilled, real, recipe, 2, epochs=epochs, device=NAME, store=store)
            counts.append(added)
    return difference(counts[1], counts[0])


def entries() -> dict:
    "Entry of the budget → what counts it, a function and its arguments"
    every = {}
    for name in SETTINGS:
        method, _ = small(name)
        if not method.iterations: continue
        for precision in ("float32", "bfloat16"):
            if precision in method.precisions: every[f"{name}, {precision}"] = counts_of, name, precision
    return every | {f"evaluation of {what}": (counts_of_evaluation, what) for what in ("classes", "pairs")}


def counts_of(name: str, precision: str) -> Counter: return counts_of_method(*small(name), precision)


def count(entry: str) -> Counter:
    "What the device does for an entry of the budget"
    function, *words = entries()[entry]
    return function(*words)


def budget() -> dict: return json.loads(BUDGET.read_text())


def against_budget(entry: str, counts: Counter) -> str:
    "What to say about an entry's counts; empty where they are those of the budget"
    allowed, now = budget()["counts"].get(entry), by_kind(counts)
    if allowed is None: return f"{BUDGET.name} has no entry {entry!r}: {REWRITE}"
    more = [f"{kind}: {now[kind]}, {allowed[kind]} allowed" for kind in COUNTED if now[kind] > allowed[kind]]
    if more:
        lines = "\n".join(f"{n:6} {kind} {name} {line}" for n, kind, name, line in by_line(counts, COUNTED)[:30])
        return f"{entry} costs more than its budget ({'; '.join(more)})\n{lines}"
    fewer = [f"{kind}: {now[kind]}, {allowed[kind]} before" for kind in COUNTED if now[kind] < allowed[kind]]
    return f"{entry} has become cheaper ({'; '.join(fewer)}); write the lower numbers: {REWRITE}" if fewer else ""


def rewrite():
    "Count everything and write the budget"
    counts = {}
    for entry in entries():
        counts[entry] = by_kind(counted := count(entry))
        print(f"{entry}: {counts[entry]}", flush=True)
        if "--lines" in sys.argv:
            for line in by_line(counted): print("   ", *line)
    facts = dict(torch=torch.__version__.partition("+")[0], iterations=MORE - FEWER, counts=counts)
    BUDGET.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__": rewrite()
