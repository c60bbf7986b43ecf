"""Damaged, missing and unwritable files: what is proved intact is used, the rest made again, bit by bit."""
import subprocess
import sys

import pytest
import torch

from ddrepro.core.compute import EXACT
from ddrepro.core.files import load_tensors
from ddrepro.data.registry import load_data
from ddrepro.distill.coresets import coreset
from ddrepro.distill.loop import Checkpoints, distill, run_identity
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.nets.networks import spec_for
from ddrepro.nets.recipes import Recipe
from helpers import DAMAGES, Stop, damages, flipped, one_process, truncated

METHOD = get_method("avdd", "digits_av", ipc=1, width=4, batch=8, start_from="random", iterations=6)
STOPPED = 4   # iterations before the run is stopped


@pytest.fixture(scope="module")
def real(): return load_data("digits_av")


def stop(real, folder, store=None):
    "A run with a checkpoint after every iteration, stopped after four"
    def after(t, loss, S):
        if t == STOPPED: raise Stop
    where = dict(folder=folder, store=store)
    with pytest.raises(Stop):
        distill(METHOD, real, compute=EXACT, checkpoint_every=0., progress=False, on_iteration=after, **where)
    return Checkpoints(folder, "").files()

def finish(real, folder=None, store=None) -> tuple:
    "(distilled set, iteration at which it went on)"
    made = []
    distilled = distill(METHOD, real, compute=EXACT, folder=folder, store=store, progress=False,
                        on_iteration=lambda t, loss, S: made.append(t))
    return distilled, made[0]

@pytest.fixture(scope="module")
def whole(real): return finish(real)[0]

def same(a, b) -> bool: return a.curve == b.curve and all(torch.equal(a.tensors[m], b.tensors[m]) for m in b.tensors)


@damages
def test_newest_checkpoint(real, whole, tmp_path, capsys, damage):
    older, newest = stop(real, tmp_path)
    damage(newest)
    distilled, started = finish(real, tmp_path)
    assert started == STOPPED - 1 and same(distilled, whole)
    printed = capsys.readouterr().out
    assert f"{newest} " in printed and "going back to the checkpoint before it" in printed


@damages
def test_all_checkpoints(real, whole, tmp_path, capsys, damage):
    files = stop(real, tmp_path)
    for file in files: damage(file)
    distilled, started = finish(real, tmp_path)
    assert started == 0 and same(distilled, whole)
    printed = capsys.readouterr().out
    assert all(f"{file} " in printed for file in files)


def test_newest_checkpoint_is_missing(real, whole, tmp_path):
    stop(real, tmp_path)[-1].unlink()
    distilled, started = finish(real, tmp_path)
    assert started == STOPPED - 1 and same(distilled, whole)


def test_temporary_files_of_a_killed_run_are_not_read(real, whole, tmp_path):
    store, folder = tmp_path / "store", tmp_path / "run"
    newest = stop(real, folder, store)[-1]
    for path in [newest, *store.rglob("*.safetensors"), *store.rglob("key.json")]:
        path.with_name(f".{path.name}.half").write_bytes(path.read_bytes()[:100])
    distilled, started = finish(real, folder, store)
    assert started == STOPPED and same(distilled, whole)


@pytest.fixture
def stored(real, tmp_path):
    "A store that holds every mean of the run: folder, shards"
    finish(real, store=tmp_path / "store")
    shards = sorted((tmp_path / "store").rglob("block*.safetensors"))
    assert len(shards) == 2 * 10                                             # modalities × classes, one block each
    return tmp_path / "store", shards

@damages
def test_shard_of_the_means_store(real, whole, stored, capsys, damage):
    store, shards = stored
    before = {s: load_tensors(s, "means") for s in shards}
    broken = [shards[k] for k in (0, 7, 19)]
    for s in broken: damage(s)
    capsys.readouterr()
    assert same(finish(real, store=store)[0], whole)
    printed = capsys.readouterr().out
    assert all(f"means store: {s} " in printed for s in broken) and "computing these means again" in printed
    for s, (tensors, meta) in before.items():                                # and the store is whole again
        mended, its_meta = load_tensors(s, "means")
        assert its_meta == meta and all(torch.equal(mended[k], tensors[k]) for k in tensors)


def test_shards_of_the_means_store_are_missing(real, whole, stored):
    store, shards = stored
    for s in shards[::3]: s.unlink()
    assert same(finish(real, store=store)[0], whole)
    assert sorted(store.rglob("block*.safetensors")) == shards


def test_shard_belongs_to_other_means(real, whole, stored):
    "An intact shard of the other modality in the wrong place is not believed"
    store, shards = stored
    a, b = shards[0], shards[10]
    assert a.parents[1] != b.parents[1]
    a.write_bytes(b.read_bytes())
    assert same(finish(real, store=store)[0], whole)


def test_herding_list(real, tmp_path, capsys):
    specs, recipe = {m: spec_for(s, 4) for m, s in real.shapes.items()}, Recipe("tiny", epochs=1, batch=256, rate=1e-3)

    def chosen():
        rows = coreset("herding", real, 3, specs=specs, recipe=recipe, store=tmp_path)
        return {c: i.tolist() for c, i in rows.items()}

    first = chosen()
    file, = tmp_path.rglob("*.safetensors")
    flipped(0)(file)
    assert chosen() == first
    printed = capsys.readouterr().out
    assert f"{file} " in printed and "herding again" in printed
    assert chosen() == first and "herding again" not in capsys.readouterr().out


def never(t, loss, S): raise AssertionError(f"iteration {t} was computed for a folder that cannot be written")

@pytest.mark.parametrize("below", ["sub", "sub/further/down"])
def test_output_below_a_regular_file(real, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    experiment = Experiment(METHOD, eval_seeds=1)
    refused = pytest.raises(OSError, match=f"cannot write .*{tmp_path / 'file'}.* is a file, not a folder")
    compute = dict(compute=EXACT, checkpoint_every=0., on_iteration=never)
    with refused: distill(METHOD, real, folder=folder, progress=False, **compute)
    with refused: distill(METHOD, real, store=folder, progress=False, **compute)
    for runs, store in ((folder, tmp_path / "store"), (tmp_path / "runs", folder)):
        with refused: run_all([experiment], real, runs=runs, store=store, compute=compute, progress=False)
    assert (tmp_path / "file").read_text() == "mine"


LIMITED = '''
import resource, sys
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.core.compute import EXACT
from ddrepro.data.registry import load_data
folder, store = sys.argv[1], sys.argv[2] or None
most = int(sys.argv[3])
real = load_data("digits_av")
method = get_method("avdd", "digits_av", ipc=1, width=4, batch=8, start_from="random", iterations=6)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
distill(method, real, compute=EXACT, folder=folder, store=store, checkpoint_every=0., progress=False)
'''

@pytest.mark.parametrize("what, most", [("checkpoint", 100_000), ("block", 1_500)])
def test_a_write_that_fails_half_way(real, whole, tmp_path, what, most):
    "As on a full disk: a clear end, nothing lost, and the run finishes when there is room"
    folder = tmp_path / "run"
    store = tmp_path / "store" if what == "block" else None
    files = stop(real, folder, store)
    identity = run_identity(METHOD, real, 0, tuple(range(10)))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    command = [sys.executable, "-c", LIMITED, folder, store or "", str(most)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 1
    last = child.stderr.strip().split("\n")[-1]
    assert f"CannotWrite: cannot write {tmp_path}" in last and what in last
    assert "File too large" in last and "what was there before is untouched" in last
    # nor is a temporary file left
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert Checkpoints(folder, identity).load().t == STOPPED and Checkpoints(folder, identity).files() == files
    distilled, started = finish(real, folder, store)
    assert started == STOPPED and same(distilled, whole)


RECIPE = Recipe("tiny", epochs=1, batch=32, rate=1e-3)
EXPERIMENT = Experiment(METHOD, recipe=RECIPE, eval_seeds=1, part="validation")

@pytest.fixture(scope="module")
def finished(real, tmp_path_factory):
    "A finished experiment: runs, folder of its one run, rows"
    runs = tmp_path_factory.mktemp("finished")
    rows = again(real, runs)
    folder, = (p for p in runs.iterdir() if p.name != "store")
    return runs, folder, rows

def again(real, runs):
    with one_process():
        return run_all([EXPERIMENT], real, runs=runs, store=runs / "store", compute=dict(compute=EXACT), progress=False)

def removed(path): path.unlink()

SOME = {k: DAMAGES[k] for k in ("empty", "half of the header", "something else", "flipped bit 0")}
SOME |= {"missing": removed, "end missing": truncated(-30)}
CHECKED = ("distilled.safetensors", "distilled.json")
CASES = [(name, k) for name in (*CHECKED, "certificate.txt") for k in SOME if name in CHECKED or k != "flipped bit 0"]

@pytest.mark.parametrize("name, damage", CASES)
def test_distilled_set_is_made_again(real, finished, capsys, name, damage):
    runs, folder, rows = finished
    card = (folder / "distilled.json").read_bytes()
    SOME[damage](folder / name)
    capsys.readouterr()
    assert again(real, runs).equals(rows)
    printed = capsys.readouterr().out
    if (name, damage) != ("certificate.txt", "missing"): assert f"{name} " in printed and "making it again" in printed
    assert (folder / "distilled.json").read_bytes() == card
    again(real, runs)
    assert "making it again" not in capsys.readouterr().out


def test_a_set_from_disk_is_evaluated_like_one_from_memory(real, finished):
    "Rows made in the run that distilled, and rows made by a later one that reads the set, are the same"
    runs, folder, rows = finished
    for file in folder.glob("rows-*.csv"): file.unlink()
    assert again(real, runs).equals(rows)
