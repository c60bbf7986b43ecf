"""The way through a GPU, on a device that is emulated: every method gives the CPU's values there, at a known cost.

Everything runs in one process of its own, since torch cannot forget a device."""
import ast
import json
import multiprocessing
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from io import StringIO
from tempfile import TemporaryDirectory

import pytest
import torch
from device_budget import (
    MATCHING,
    PAIR_TRAINING,
    REWRITE,
    TRAINING,
    against_budget,
    budget,
    by_kind,
    count,
    counts_of_method,
    entries,
    patterns,
    run,
    small,
)
from emulated_device import NAME, Emulator, MixedDevices

from ddrepro.bench_gpu import Workload, failures, gpu_report, newest_report, show_report
from ddrepro.core.share import project_root
from ddrepro.distill.losses import dm_loss
from ddrepro.distill.sources import Pool
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import registered
from ddrepro.methods.dm import DM
from ddrepro.nets.experts import Experts
from ddrepro.nets.networks import spec_for
from ddrepro.project import flagged, flagged_cells
from helpers import Stop, one_thread, run_script

ROOT = project_root()
ITERATED = ("dm", "avdd", "dsdm", "mtt", "vldd", "m3d", "cafe", "cafe_dsa", "idm", "dc", "dsa", "idc", "dd")
CORESETS = ("random", "herding", "kcenter", "forgetting")

# Against the CPU: the distance of what was learned, as a share of the way it went. Equal bits are not to be had where
# kernels differ: pooling adds in another order on a GPU, and networks are trained there all at once
ROUNDING = {"float64": 1e-12, "float32": 5e-5}
OWN_NETWORKS = ("dsdm", "mtt", "vldd")      # trained in float32 on the device: float64 is no closer


@pytest.fixture(scope="module")
def child():
    "What calls a function of this file in the process that has the device"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as process:
        yield lambda function, *words: process.submit(alone, function, *words).result()


def alone(function, *words):
    with one_thread(): return function(*words)


# The device itself

def refusals() -> dict:
    "Operation → whether the device refuses it"
    operations = {
        "a + CPU": lambda a, b: a + b,
        "CPU @ a": lambda a, b: b @ a.T,
        "stack with a number of the CPU": lambda a, b: torch.stack([a[0, 0], b[0, 0]]),
        "convolution by CPU weights": lambda a, b: torch.conv2d(a[None, None], b[None, None]),
        "in place": lambda a, b: a.add_(b),
        "CPU in place": lambda a, b: b.add_(a),
        "write into a mask of the CPU": lambda a, b: a.masked_fill_(b > 0, 0.),
        "a × number of the CPU": lambda a, b: a * b[0, 0],
        "a[CPU indices]": lambda a, b: a[torch.tensor([1, 0])],
        "a.copy_(CPU)": lambda a, b: a.copy_(b),
        "a.masked_fill(a > 0, number of the CPU)": lambda a, b: a.masked_fill(a > 0, b[0, 0]),
        "a × Python number": lambda a, b: a * 2.,
    }
    with Emulator():
        def is_refused(operation):
            try: operation(torch.ones(3, 4, device=NAME), torch.ones(3, 4))
            except MixedDevices: return True
            return False
        return {name: is_refused(operation) for name, operation in operations.items()}

def test_it_refuses_what_cuda_refuses(child):
    refused = child(refusals)
    assert list(refused.values()) == [True] * 7 + [False] * 5, refused


def counted() -> tuple:
    "What a few lines cost"
    with Emulator() as device:
        x = torch.arange(6.).to(NAME)                   # to device
        y = (x.view(2, 3) * 2).sum(1)                   # view, two launches
        host = y.cpu()                                  # from device
        chosen = x[x > 2.]                              # launch, then a read, and a launch
        values = float(y[0]), bool(chosen[0] == 3)      # view and read; view, launch and read
        again = x[torch.tensor([0, 1])].tolist()        # to device, launch; from device
        torch.zeros(2, device=NAME)[0] = 1.             # launch, view, two launches
        torch.empty(3, device=NAME)
        return device.totals(), dict(device.bytes), (host.tolist(), values, again)

def test_it_counts(child):
    totals, copied, values = child(counted)
    assert values == ([6., 24.], (6., True), [0., 1.])
    assert totals == {"launch": 9, "view": 4, "to device": 2, "from device": 2, "read": 3}
    assert copied == {"to device": 6 * 4 + 2 * 8, "from device": 2 * 4 + 2 * 4}


def autocast_types() -> list:
    with Emulator(), torch.autocast(NAME, torch.bfloat16):
        x = torch.ones(2, 4, 5, 5, device=NAME)
        convolved = torch.conv2d(x, torch.ones(4, 4, 3, 3, device=NAME))
        return [x.dtype for x in (convolved, torch.group_norm(convolved, 2), convolved.relu(), x.double() @ x.double())]

def test_it_casts_as_cuda_does(child):
    assert child(autocast_types) == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64]


# Every method

def in_vectors(distilled):
    "Everything that was learned, as one vector"
    rates = list(distilled.card.get("rates", {}).values())
    return torch.cat([*(x.double().flatten() for x in distilled.tensors.values()), torch.tensor(rates).double()])


def distances(name: str) -> dict:
    "Precision → how far runs, and their first losses, are from those on the CPU, as shares of the way that they went"
    method, real = small(name)
    seen = {}
    with Emulator(), TemporaryDirectory() as stores:
        start = in_vectors(run(replace(method, iterations=0), real, "cpu", store=f"{stores}/cpu"))
        for precision in method.precisions:
            cpu, there = (run(method, real, device, precision, f"{stores}/{device}") for device in ("cpu", NAME))
            end = in_vectors(cpu)
            if precision == "float32": exact = end
            way = (end[:len(start)] - start).norm()
            seen[precision] = dict(
                moved=way.item(),
                device=((in_vectors(there) - end).norm() / way).item(),
                precision=((end - exact).norm() / way).item(),
                loss=abs(there.curve[0] / cpu.curve[0] - 1),
            )
    return seen

@pytest.fixture(scope="module")
def distances_of(child): return cache(partial(child, distances))

@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("name", ITERATED)
def test_methods_give_the_cpus_values(distances_of, name, precision):
    seen = distances_of(name)[precision]
    allowed = ROUNDING["float32" if name in OWN_NETWORKS else precision]
    assert seen["moved"] > 0 and seen["device"] < allowed and seen["loss"] < allowed, seen

@pytest.mark.parametrize("name", ("dm", "avdd", "dsdm"))
def test_bfloat16_is_as_near_as_the_cpus_own(distances_of, name):
    seen = distances_of(name)["bfloat16"]      # a GPU normalises in float32, a CPU does not
    assert 0 < seen["device"] < 2 * seen["precision"] and seen["loss"] < .02, seen

def coreset_is_equal(name: str) -> bool:
    method, real = small(name)
    with Emulator(), TemporaryDirectory() as stores:
        cpu, there = (run(method, real, device, store=f"{stores}/{device}") for device in ("cpu", NAME))
    return all(torch.equal(x, there.tensors[m]) for m, x in cpu.tensors.items())

@pytest.mark.parametrize("name", CORESETS)
def test_coresets_are_the_cpus_bit_for_bit(child, name): assert child(coreset_is_equal, name)


def test_no_method_is_left_out(): assert {*ITERATED, *CORESETS} == set(registered())


# Finitely many draws, and going on

def read_again(name: str, **changes) -> float:
    "The share of the way that features, or gradients, read from the store change a run"
    method, real = small(name, draws=2, **changes)
    with Emulator(), TemporaryDirectory() as store:
        first, again = (in_vectors(run(method, real, NAME, store=store)) for _ in range(2))
        start = in_vectors(run(replace(method, iterations=0), real, NAME, store=store))
    return ((first - again).norm() / (first - start).norm()).item()

def test_features_come_back_from_the_store(child): assert child(read_again, "dsdm") < 1e-6

def kept_gradients() -> float: return read_again("dsa", outer=1)

def test_gradients_come_back_from_the_store(child): assert child(kept_gradients) < 1e-6


def resumed(name: str, then: str) -> tuple:
    "Distance of a run that stopped on the device and went on elsewhere from one that did not stop; its card's moves"
    method, real = small(name)
    with Emulator(), TemporaryDirectory() as folder:
        store = f"{folder}/store"
        whole = run(method, real, NAME, store=store)

        def stop(t, loss, S):
            if t == 1: raise Stop
        going_on = dict(folder=f"{folder}/run", checkpoint_every=0.)
        try: run(method, real, NAME, store=store, on_iteration=stop, **going_on)
        except Stop: pass
        again = run(method, real, then, store=store, **going_on)
    distance = (in_vectors(again) - in_vectors(whole)).norm() / in_vectors(whole).norm()
    return distance.item(), again.curve[:1] == whole.curve[:1], again.card["compute"].get("moves")

@pytest.mark.parametrize("name", ("dsdm", "mtt"))
def test_a_run_goes_on_bit_for_bit(child, name): assert child(resumed, name, NAME) == (0., True, None)

def test_a_run_moves_from_device_to_cpu(child):
    distance, same_beginning, moves = child(resumed, "dm", "cpu")
    assert 0 < distance < 1e-5 and same_beginning
    assert moves[0]["changed"]["device"] == [NAME, "cpu"]


# Training: pool, experts, evaluation

def pool_distance() -> float:
    real = patterns("image")
    spec = spec_for(real.shapes["image"], 8)
    with Emulator(), TemporaryDirectory() as stores, redirect_stdout(StringIO()):
        pools = [Pool(real, "image", spec, 3, 2, recipe=replace(TRAINING, epochs=0), root=f"{stores}/{d}", device=d)
                 for d in ("cpu", NAME)]
        parameters = [[p for net in pool.open().nets for p in net.parameters()] for pool in pools]
        weights = [torch.cat([p.cpu().flatten() for p in every]) for every in parameters]
    return ((weights[1] - weights[0]).norm() / weights[0].norm()).item()

def test_the_pool_is_the_cpus(child): assert child(pool_distance) < 1e-5


def expert_distances() -> list:
    real = patterns("image")
    with Emulator(), TemporaryDirectory() as stores, redirect_stdout(StringIO()):
        buffers = [Experts(real, {"image": spec_for(real.shapes["image"], 8)}, f"{stores}/{d}", 2, 2, device=d).open()
                   for d in ("cpu", NAME)]
        ends = [[[buffer.load(i, epoch) for epoch in (0, 2)] for i in range(2)] for buffer in buffers]
    return [((a[1] - b[1]).norm() / (a[1] - a[0]).norm()).item() for a, b in zip(*ends)]

def test_experts_are_the_cpus(child): assert max(child(expert_distances)) < 1e-4


def scores(name: str) -> list:
    "Accuracies or recalls of three networks on the CPU, and on the device"
    method, real = small(name, ipc=6)
    recipe = PAIR_TRAINING if name == "forgetting" else TRAINING
    with Emulator(), TemporaryDirectory() as store:
        distilled = run(method, real, "cpu", store=store)
        rows = [evaluate(distilled, real, recipe, 3, device=device, store=store) for device in ("cpu", NAME)]
    return [list(map(tuple, table[["modality", "eval_seed", "accuracy", "steps"]].values)) for table in rows]

@pytest.mark.parametrize("name", ("random", "forgetting"))
def test_evaluation_gives_the_cpus_rows(child, name):
    cpu, there = child(scores, name)
    assert cpu == there and len({row[2] for row in cpu}) > 1


# The cost

@pytest.mark.parametrize("entry", entries())
def test_iterations_keep_to_their_budget(child, entry):
    complaint = against_budget(entry, child(count, entry))
    assert not complaint, complaint

def test_the_budget_is_of_this_torch_and_has_no_other_entries():
    assert budget()["torch"] == torch.__version__.partition("+")[0], f"counted with another torch: {REWRITE}"
    assert list(budget()["counts"]) == list(entries())


# `make gpu`, but for the GPU

def cell_runs(name: str, source: str):
    "Carry out a cell of a chapter with the device in place of a GPU, after the chapter's imports and definitions"
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    module = import_module("ddrepro." + re.search(r"default_exp (\S+)", "\n".join(cells))[1])
    scope = dict(vars(module))
    for cell in cells:
        if "nbdev_export()" in cell: continue
        imports = [line for line in ast.parse(cell).body if isinstance(line, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), notebook.name, "exec"), scope)
    with Emulator() as device:
        exec(source.replace('device = "cuda"', f'device = "{NAME}"'), scope)
        return device.totals()["launch"]

GPU_CELLS = [(name, cell) for name in flagged("gpu", ROOT) for cell in flagged_cells(ROOT / f"nbs/{name}.ipynb", "gpu")]

@pytest.mark.parametrize(("name", "source"), GPU_CELLS, ids=[name for name, _ in GPU_CELLS])
def test_cells_for_a_gpu_run(child, name, source):
    assert 'device = "cuda"' in source and child(cell_runs, name, source)


def suite(folder) -> dict:
    size = Workload(classes=3, width=4, batch=4, ipc=1, shape=(1, 16, 16), networks=2, epochs=1, samples=4, rounds=1)
    with Emulator(), redirect_stdout(StringIO()): path = gpu_report(NAME, NAME, folder, size)
    return json.loads(path.read_text())

def test_the_suite_writes_a_report(child, tmp_path, capsys):
    report = child(suite, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_emulated.json"]
    assert not failures(report) and newest_report(tmp_path) == report
    differences = {(row["what"], row["precision"]): row["difference"] for row in report["parity"]}
    for name in ("dm", "dsdm"):
        exact, single, half = (differences[f"gradient of {name}", p] for p in ("float64", "float32", "bfloat16"))
        assert exact < 1e-12 < single < 1e-4 < half
    assert [row["holds"] for row in report["settings"]] == [True] * 3
    assert report["compiled"]["lacking"] == f"it builds no code for devices of the kind {NAME}"
    assert {row["way"] for row in report["speed"]} >= {"plain loop, float32", "bfloat16", "stacked (train_together)"}
    show_report(report)
    assert "everything holds" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_written():
    before = sorted((ROOT / "reports").glob("gpu_*"))
    done = run_script("from ddrepro.bench_gpu import make_gpu; raise SystemExit(make_gpu())")
    assert done.returncode == 2 and "make gpu needs a CUDA GPU, and torch finds none here" in done.stderr
    assert sorted((ROOT / "reports").glob("gpu_*")) == before


# Faults that the tests above must see

@dataclass(frozen=True)
class LeftOnCPU(DM):
    "A tensor that nobody moved"
    def match(self, real, synthetic):
        weights = torch.ones(len(real["image"]), 1)
        return dm_loss(real["image"] * weights, synthetic["image"] * weights)

@dataclass(frozen=True)
class LossOnCPU(DM):
    "A loss that is taken on the CPU and brought back"
    def match(self, real, synthetic):
        loss = DM.match(self, {m: x.cpu() for m, x in real.items()}, {m: x.cpu() for m, x in synthetic.items()})
        return loss.to(synthetic["image"].device)

@dataclass(frozen=True)
class ReadPerSample(DM):
    "A look at every sample that the CPU waits for"
    def loss(self, context, S, state, t):
        for canvas in S["image"].flatten(0, 1): assert float(canvas.sum()) < 1e9
        return DM.loss(self, context, S, state, t)

@dataclass(frozen=True)
class DroppedCopy(DM):
    "A copy of all real data that nobody uses"
    def loss(self, context, S, state, t):
        context.real.train.inputs["image"].to(context.compute.device)
        return DM.loss(self, context, S, state, t)

@dataclass(frozen=True)
class OtherValues(DM):
    "A value that is another on the device alone"
    def match(self, real, synthetic): return DM.match(self, real, synthetic) * (1.001 if real["image"].is_cuda else 1.)


def faulty_counts(fault): return counts_of_method(fault(**MATCHING), patterns("image"), "float32")

def faulty_distance(fault) -> float:
    with Emulator():
        ends = [run(fault(**MATCHING), patterns("image"), device) for device in ("cpu", NAME)]
    start = in_vectors(run(DM(**MATCHING | dict(iterations=0)), patterns("image"), "cpu"))
    cpu, there = map(in_vectors, ends)
    return ((there - cpu).norm() / (cpu - start).norm()).item()

def test_a_tensor_left_on_the_cpu_is_refused(child):
    met = r"mul at .*: emulated\(10, 32\), cpu\(10, 1\)"
    with pytest.raises(MixedDevices, match=met): child(faulty_counts, LeftOnCPU)

@pytest.mark.parametrize(
    ("fault", "kind", "times"),
    [(LossOnCPU, "from device", 6), (ReadPerSample, "read", 2 * 20), (DroppedCopy, "to device", 2)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_costs_more_is_seen(child, fault, kind, times):
    counts = child(faulty_counts, fault)
    assert by_kind(counts)[kind] == budget()["counts"]["dm, float32"][kind] + times
    assert f"{kind}: {by_kind(counts)[kind]}, " in against_budget("dm, float32", counts)

def test_other_values_are_seen(child): assert child(faulty_distance, OtherValues) > 3 * ROUNDING["float32"]

def test_what_costs_less_asks_for_the_lower_number():
    allowed = budget()["counts"]["dm, float32"]
    fewer = Counter({(kind, "", ""): n - (kind == "launch") for kind, n in allowed.items()})
    assert against_budget("dm, float32", fewer).endswith(f"write the lower numbers: {REWRITE}")
    assert not against_budget("dm, float32", fewer + Counter({("launch", "", ""): 1}))
