"""Runs that go on on another device, in another precision, on another machine; arithmetic that no setting changes."""
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from ddrepro.cli_answers import doctor
from ddrepro.core.arithmetic import core_count, machine_facts
from ddrepro.core.compute import EXACT, Compute
from ddrepro.core.files import load_tensors, save_tensors
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.real import RealData
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.loop import Asked, Checkpoints, Saved, computed_by, distill, state_on
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.nets.encoders import NFConvNet
from ddrepro.nets.networks import ConvNet
from ddrepro.nets.pair_training import PairRecipe
from ddrepro.nets.recipes import Recipe
from helpers import Stop, flipped, one_thread, squares, truncated

STOPPED = 3   # iterations that a run has done when it is stopped
DM = get_method("dm", ipc=2, iterations=6, width=4, batch=4, strategy="color_crop")
DSDM = get_method("dsdm", ipc=1, factor=1, iterations=6, width=4, batch=4, models=2, pool_epochs=1, smooth_iter=-1)
VLDD = get_method("vldd", width=4, dim=6, experts=2, expert_epochs=2, expert_batch=8, expert_captions=0, ipc=6,
                  iterations=6, steps=2, batch=4, max_start=2, alpha=.1, lr_image=5., lr_text=5., lr_rate=1e-5)
METHODS = {"dm": DM, "dsdm": DSDM, "vldd": VLDD}
ON_GPU = dict(device="cuda:1", chunk=1024, threads=16)
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module", autouse=True)
def one_thread_here():
    with one_thread(): yield

@pytest.fixture(scope="module")
def pictures():
    x = keyed_normal((48, 3, 16, 16), 0, "moves") + torch.arange(48).view(-1, 1, 1, 1) % 4
    labels = torch.arange(48) % 4
    return RealData.from_tensors("pictures", {"image": x}, labels, {"image": x[:12]}, labels[:12])

@pytest.fixture(scope="module")
def pairs(): return squares()

@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("store")

@pytest.fixture
def run(pictures, pairs, store):
    "Distil by a method, by name or itself, on data that suit it"
    def run(method, seed=1, **options):
        method = METHODS.get(method, method)
        real = pairs if "retrieval" in method.tasks else pictures
        return distill(method, options.pop("real", real), seed, store=store, progress=False, **options)
    return run

@pytest.fixture
def stopped(run, tmp_path):
    "A folder with the checkpoints of a run that was stopped"
    def stopped(method, at=STOPPED, **options):
        def stop(t, loss, S):
            if t == at: raise Stop
        folder = options.pop("folder", tmp_path / "run")
        with pytest.raises(Stop): run(method, folder=folder, checkpoint_every=0., on_iteration=stop, **options)
        return folder
    return stopped

def rewritten(folder, forget=(), **parts):
    "The newest checkpoint, as it would come from elsewhere: changes of its compute, its machine"
    file = Checkpoints(folder, "").files()[-1]
    tensors, meta = load_tensors(file, "checkpoint")
    for part, facts in parts.items(): meta[part] |= facts
    for part in forget: del meta[part]
    save_tensors(file, tensors, "checkpoint", meta)

def same(a, b): return a.curve == b.curve and all(torch.equal(a.tensors[m], b.tensors[m]) for m in b.tensors)

def computed(t, loss, S): raise AssertionError(f"iteration {t} was computed")

@pytest.fixture
def no_gpu(monkeypatch): monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("ddrepro.core.compute.compiler_lacks", lambda device: "")


# Where nothing changed

@every_method
def test_a_run_that_did_not_move_says_nothing_and_has_the_same_card(run, stopped, capsys, name):
    whole = run(name)
    folder = stopped(name)
    capsys.readouterr()
    resumed = run(name, folder=folder)
    assert same(resumed, whole) and resumed.card == whole.card
    assert "goes on" not in capsys.readouterr().out

def test_a_checkpoint_without_a_machine_is_taken_as_it_is(run, stopped, capsys):
    folder = stopped("dm")
    rewritten(folder, forget=("machine", "run", "moves"))
    resumed = run("dm", folder=folder)
    assert same(resumed, run("dm")) and "moves" not in resumed.card["compute"]
    assert "goes on" not in capsys.readouterr().out

def test_what_a_checkpoint_has_goes_before_what_would_be_chosen_now(run, stopped):
    how = dict(compute=Compute(precision="bfloat16", chunk=3))
    whole = run("dm", **how)
    resumed = run("dm", folder=stopped("dm", **how))
    assert same(resumed, whole) and resumed.card == whole.card
    assert (whole.card["compute"]["precision"], whole.card["compute"]["chunk"]) == ("bfloat16", 3)


# Other devices and precisions

@every_method
@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_a_checkpoint_of_a_gpu_goes_on_without_one(run, stopped, no_gpu, capsys, name, asked):
    whole, folder = run(name), stopped(name)
    rewritten(folder, compute=ON_GPU, machine=dict(processor="Some GPU"))
    capsys.readouterr()
    resumed = run(name, folder=folder, device=asked)
    printed = capsys.readouterr().out
    assert f"goes on at iteration {STOPPED} of 6 with another device (cuda, now cpu)" in printed
    assert "chunk (1024, now 64)" in printed and "no longer bit for bit" in printed
    assert ("were trained on cuda" in printed) == (name != "dm")             # the pool and the experts are others
    compute = resumed.card["compute"]
    assert compute["device"] == "cpu" and compute["moves"][0]["t"] == STOPPED
    assert compute["moves"][0]["changed"]["device"] == ["cuda", "cpu"]
    assert same(resumed, whole)                                          # it was a CPU's after all
    again = run(name, folder=folder, on_iteration=computed)
    assert again.card == resumed.card and same(again, resumed)

@every_method
def test_another_precision_by_name(run, stopped, capsys, name):
    whole, folder = run(name), stopped(name)
    resumed = run(name, folder=folder, precision="float64")
    assert "precision (float32, now float64)" in capsys.readouterr().out
    assert all(x.dtype == torch.float64 for x in resumed.tensors.values())
    assert resumed.curve[:STOPPED] == whole.curve[:STOPPED] and resumed.curve != whole.curve
    for m, x in resumed.tensors.items(): assert torch.allclose(x.float(), whole.tensors[m], rtol=1e-2, atol=1e-2)
    state = load_tensors(Checkpoints(folder, "").files()[-1], "checkpoint")[0]
    floats = {k: x.dtype for k, x in state.items() if x.is_floating_point()}
    assert set(floats.values()) == {torch.float64} and len(floats) > 2

def test_bfloat16_goes_on_in_float32_where_it_is_not_native(run, stopped, no_gpu, monkeypatch):
    monkeypatch.setattr("ddrepro.core.compute.has_bfloat16", lambda device: False)
    folder = stopped("dm")
    rewritten(folder, compute=ON_GPU | dict(precision="bfloat16", compile=True))
    changed = run("dm", folder=folder).card["compute"]["moves"][0]["changed"]
    assert changed["precision"] == ["bfloat16", "float32"] and changed["compile"] == [True, False]

def test_two_moves_are_both_on_the_card(run, stopped):
    folder = stopped("dm", at=2)
    stopped("dm", at=4, folder=folder, precision="float64")
    moves = run("dm", folder=folder, precision="float32").card["compute"]["moves"]
    assert [m["t"] for m in moves] == [2, 4]
    assert moves[1]["changed"]["precision"] == ["float64", "float32"]

@pytest.mark.parametrize("part, facts, words", [
    ("compute", dict(chunk=7), "chunk (7, now 64)"),
    ("machine", dict(torch="2.10.0"), f"torch (2.10.0, now {torch.__version__})"),
    ("machine", dict(processor="Another CPU"), "processor (Another CPU, now "),
    ("machine", dict(threads=2), "threads (2, now 1)"),
])
def test_other_machines(run, stopped, capsys, part, facts, words):
    folder = stopped("dm", compute=EXACT)
    rewritten(folder, **{part: facts})
    resumed = run("dm", folder=folder, compute=Compute(threads=0))
    assert words in capsys.readouterr().out
    assert list(resumed.card["compute"]["moves"][0]["changed"]) == list(facts) and same(resumed, run("dm"))

def test_threads_of_a_larger_machine_are_kept_and_said(run, stopped, capsys):
    folder, many = stopped("dm"), core_count() + 1
    rewritten(folder, compute=dict(threads=many), machine=dict(threads=many))
    seen = []
    resumed = run("dm", folder=folder, on_iteration=lambda t, loss, S: seen.append(torch.get_num_threads()))
    assert set(seen) == {many} and "moves" not in resumed.card["compute"]
    printed = capsys.readouterr().out
    assert f"goes on with the {many} threads it began with, on {core_count()} cores" in printed

def test_what_a_method_keeps_moves_with_the_run():
    state = {"S/image": torch.zeros(2), "bank/image": torch.zeros(3, 2).T,
             "updates/image": torch.zeros(1, dtype=torch.int64), "sums": torch.zeros(1, dtype=torch.float64),
             "S/rate/image": torch.tensor(.1), "draws": 4}
    there = state_on(state, Compute(), SimpleNamespace(device="meta", dtype=torch.float64))
    assert there.pop("draws") == 4
    counts = there.pop("updates/image")                       # read without waiting for a GPU
    assert (counts.dtype, counts.device.type) == (torch.int64, "cpu")
    assert {x.device.type for x in there.values()} == {"meta"} and all(x.is_contiguous() for x in there.values())
    assert {x.dtype for x in there.values()} == {torch.float64}
    back = state_on(state, Compute(precision="float64"), Compute())
    assert back["sums"].dtype == torch.float32 and back["bank/image"].dtype == torch.float32

def test_a_run_in_the_store_keeps_its_moves_in_the_certificate(pictures, tmp_path):
    def stop(t, loss, S):
        if t == STOPPED: raise Stop
    e = Experiment(DM, seed=1, recipe=Recipe("tiny", epochs=1, batch=8, rate=1e-3), eval_seeds=1)
    with pytest.raises(Stop):
        run_all([e], pictures, runs=tmp_path, progress=False, compute=dict(checkpoint_every=0., on_iteration=stop))
    folder, = {file.parent for file in tmp_path.rglob("checkpoint-*")}
    rows = run_all([e], pictures, runs=tmp_path, progress=False, compute=dict(precision="float64"))
    assert rows.accuracy.between(0, 100).all()
    assert '"moves"' in (folder / "certificate.txt").read_text()
    assert DistilledData.load(folder / "distilled").card["compute"]["moves"][0]["t"] == STOPPED


# What is asked for by name and cannot be

@pytest.mark.parametrize("asked, words", [
    (dict(device="cuda"), "device 'cuda' was asked for and torch finds no CUDA GPU"),
    (dict(compute=Compute("cuda")), "device 'cuda' was asked for and torch finds no CUDA GPU"),
    (dict(device="mps"), "device must be one of 'auto', 'cpu', 'cuda'; got 'mps'"),
    (dict(device="cuda:one"), "device must name a GPU as 'cuda' or 'cuda:1'"),
    (dict(precision="float16"), "precision 'float16' is not for dm"),
    (dict(compile="yes"), "compile must be one of"),
    (dict(compute=EXACT, precision="float64"), "precision='float64' and compute are given"),
])
def test_refused_before_a_checkpoint_is_read(run, stopped, no_gpu, asked, words):
    folder = stopped("dm")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for where in (folder, None):
        with pytest.raises(ValueError) as refusal: run("dm", folder=where, on_iteration=computed, **asked)
        assert words in str(refusal.value)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before

def test_a_gpu_that_is_not_among_those_here(run, two_gpus):
    with pytest.raises(ValueError, match="the last GPU that torch finds is 'cuda:1'"): run("dm", device="cuda:2")

def test_torch_compile_without_a_compiler(run, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = pytest.raises(ValueError, match="compile=True was asked for .* no-such-compiler is not on PATH")
    with refused: run("dm", compile=True)
    with pytest.raises(ValueError, match="no-such-compiler"): run("dm", compute=Compute(compile=True))
    if not torch.cuda.is_available():
        assert dict(doctor())["compiler"].startswith("torch.compile is not used: no C++ compiler: no-such-compiler")

@pytest.mark.parametrize("name", ["mtt", "vldd", "random", "herding", "kcenter", "forgetting"])
def test_cards_say_what_methods_do(two_gpus, name):
    method = get_method(name)
    assert Asked().resolved(method) == Compute("cuda", chunk=1024, threads=torch.get_num_threads())
    assert Asked("cpu").resolved(method) == Compute(chunk=64, threads=torch.get_num_threads())
    bfloat16 = Compute("cuda", "bfloat16", compile=True)                 # as older cards of these methods had it
    now = Asked().resolved(method, bfloat16)
    assert (now.precision, now.compile) == ("float32", False)
    for asked in (Asked(precision="bfloat16"), Asked(compute=Compute(precision="bfloat16"))):
        with pytest.raises(ValueError, match=f"precision 'bfloat16' is not for {name}, which computes in float32"):
            asked.resolved(method)
    with pytest.raises(ValueError, match=f"compile=True is not for {name}"): Asked(compile=True).resolved(method)
    assert Asked("cpu", "float64").resolved(method).precision == "float64"

def test_methods_that_match_features_take_what_suits_a_gpu(two_gpus):
    for name in ("dm", "avdd", "dsdm"):
        compute = Asked().resolved(get_method(name))
        assert (compute.device, compute.precision, compute.compile) == ("cuda", "bfloat16", True)
    assert Asked().resolved(get_method("dm", iterations=0)).precision == "float32"      # nothing is matched


# Checkpoints that do not belong, or did not arrive whole

@pytest.mark.parametrize("changes, words", [
    (dict(method=DM.replace(lr=2.)), "lr is 1.0 there and 2.0 here"),
    (dict(method=DSDM), "method is dm there and dsdm here"),
    (dict(seed=2), "seed is 1 there and 2 here"),
    (dict(classes=[0, 1]), r"classes is \[0, 1, 2, 3\] there and \[0, 1\] here"),
    (dict(real="other"), r"data is pictures \(\w+\) there and others \(\w+\) here"),
])
def test_another_run_is_refused_by_what_is_other(run, stopped, pictures, changes, words):
    folder = stopped("dm")
    changes = dict(changes)
    if "real" in changes:
        x = pictures.train.inputs["image"] + 1
        labels = pictures.train.labels
        changes["real"] = RealData.from_tensors("others", {"image": x}, labels, {"image": x}, labels)
    with pytest.raises(ValueError, match=f"holds checkpoints of another run .*{words}"):
        run(changes.pop("method", DM), folder=folder, on_iteration=computed, **changes)

def test_a_folder_for_parameters_is_no_other_run(run, stopped, tmp_path):
    folder = stopped(VLDD.replace(spill=str(tmp_path / "here")))
    resumed = run(VLDD.replace(spill=str(tmp_path / "there")), folder=folder)
    assert same(resumed, run("vldd")) and str(tmp_path) not in str(resumed.card)

def test_a_checkpoint_of_another_program(run, stopped):
    folder = stopped("dm")
    rewritten(folder, compute=dict(precision="float8"))
    with pytest.raises(ValueError, match="checkpoint-0.* another version of ddrepro .*'float8'"): run("dm", folder=folder)

@pytest.mark.parametrize("damage", [truncated(-100), truncated(0), flipped(1)])
def test_half_copied_checkpoints(run, stopped, capsys, damage, tmp_path):
    older, newest = Checkpoints(stopped("dm"), "").files()
    for files, begins in (([newest], STOPPED - 1), ([older, newest], 0)):
        there = shutil.copytree(older.parent, tmp_path / f"copy {begins}")
        for file in files: damage(there / file.name)
        done = []
        assert same(run("dm", folder=there, on_iteration=lambda t, loss, S: done.append(t)), run("dm"))
        assert done[0] == begins
        assert ("is intact; beginning at iteration 0" in capsys.readouterr().out) == (begins == 0)

def test_only_the_newest_checkpoint_was_copied(run, stopped, tmp_path):
    newest = Checkpoints(stopped("dm"), "").files()[-1]
    (tmp_path / "copy").mkdir()
    shutil.copy(newest, tmp_path / "copy")
    assert same(run("dm", folder=tmp_path / "copy"), run("dm"))

def test_a_folder_that_is_read_only_is_refused_at_once(run, stopped, monkeypatch):
    folder = stopped("dm")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: may(path, mode) and str(path) != str(folder))
    with pytest.raises(OSError, match=f"cannot write checkpoints to {folder}: it is read-only"):
        run("dm", folder=folder, on_iteration=computed)


# Steady arithmetic in every phase

def seen_in(monkeypatch, *networks) -> list:
    "What every forward pass of these networks will find set"
    seen = []
    def watched(forward):
        def watch(self, x):
            cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
            float32 = cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, mkldnn.matmul.fp32_precision
            seen.append((*float32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
            return forward(self, x)
        return watch
    for network in networks: monkeypatch.setattr(network, "forward", watched(network.forward))
    return seen

@pytest.fixture
def loose():
    "A process that allows TF32 and bfloat16 products and lets cuDNN choose by timing"
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    cudnn = torch.backends.cudnn
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
        assert (cudnn.benchmark, cudnn.allow_tf32, cudnn.deterministic) == (True, True, False)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.benchmark = False

STEADY = {("ieee", "ieee", "ieee", False, True, False)}
TINY = Recipe("tiny", epochs=1, batch=8, rate=1e-3)

def test_classes(pictures, loose, monkeypatch, tmp_path):
    seen = seen_in(monkeypatch, ConvNet)
    phases = {}
    method = DSDM.replace(start_from="herding", iterations=0)
    phases["herding"] = distill(method, pictures, store=tmp_path, progress=False), len(seen)
    phases["pools"] = DSDM.pools(SimpleNamespace(real=pictures, store=tmp_path, compute=EXACT)), len(seen)
    made = distill(DSDM, pictures, store=tmp_path, progress=False)
    phases["iterations"] = made, len(seen)
    phases["evaluation"] = evaluate(made, pictures, TINY, seeds=1), len(seen)
    counts = [count for _, count in phases.values()]
    assert counts == sorted(set(counts)) and counts[0] > 0               # every phase was seen
    assert set(seen) == STEADY

def test_pairs(pairs, loose, monkeypatch, tmp_path):
    seen = seen_in(monkeypatch, NFConvNet)
    forgetting = get_method("forgetting", ipc=4, width=4, dim=6, experts=1, expert_epochs=1, expert_batch=8)
    distill(forgetting, pairs, store=tmp_path, progress=False)
    coresets = len(seen)
    made = distill(VLDD, pairs, store=tmp_path, progress=False)
    iterations = len(seen)
    evaluate(made, pairs, PairRecipe("tiny", 1, 4), seeds=1)
    assert 0 < coresets < iterations < len(seen) and set(seen) == STEADY

def test_settings_of_the_process_change_no_number(run, loose):
    found = run("dm")
    torch.set_float32_matmul_precision("highest")
    assert same(run("dm"), found)
    torch.set_float32_matmul_precision("medium")

def test_a_card_of_a_gpu_names_what_varies(pictures, pairs):
    def card(method, real, **compute):
        return computed_by(method, real, Saved(0, {}, [], Compute("cuda", **compute), {}))
    turned = DM.replace(strategy="color_rotate", factor=2)
    assert card(turned, pictures, compile=True)["varying"] == ["grid_sample", "interpolate", "torch.compile"]
    assert card(get_method("mtt", strategy="scale"), pictures)["varying"] == ["grid_sample"]
    for method, real in ((DM, pictures), (DSDM, pictures), (VLDD, pairs), (get_method("random"), pictures)):
        assert "varying" not in card(method, real)
    assert "varying" not in computed_by(turned, pictures, Saved(0, {}, [], EXACT, machine_facts("cpu")))
