"""DSDM as a whole: killed, damaged, misused, in shards, and against the authors' numbers (fixtures/README.md)."""
import json
import signal
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import ddrepro.distill.moments as moments
from ddrepro.core.compute import EXACT
from ddrepro.core.files import load_tensors
from ddrepro.core.seeding import keyed, keyed_normal, keyed_uniform
from ddrepro.data.augment import Augmentation, apply_dsa
from ddrepro.data.formation import decode, encode, per_canvas
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import FULL, Part, RealData
from ddrepro.data.registry import load_data
from ddrepro.data.signals import SPEECH_LOG
from ddrepro.distill.distilled import DistilledData, merge
from ddrepro.distill.loop import Checkpoints, distill
from ddrepro.distill.losses import covariance_loss, historical_loss, prototype_loss
from ddrepro.distill.memory_bank import MemoryBank
from ddrepro.distill.method import STEP_RULES
from ddrepro.distill.moments import Sampler
from ddrepro.distill.sources import Pool
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.methods.dsdm import dsdm_rate
from ddrepro.nets.networks import NetSpec, spec_for
from ddrepro.nets.recipes import Recipe, idc_recipe
from ddrepro.nets.training import new_net, train, train_together
from helpers import (
    PATIENCE,
    Stop,
    Warm,
    bits,
    cases,
    damages,
    iterations,
    job_in,
    kill_at,
    one_process,
    python,
    reference,
    reference_input,
    said,
)

# What every child does, as in test_kill.py
DSDM_RUN = '''
import json, os, signal, sys
import torch
import ddrepro.distill.sources as sources
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.nets.networks import NetSpec
from ddrepro.data.registry import load_data

torch.set_num_threads(1)
real = load_data("digits", train_per_class=16)
assert real.fingerprint

def log_of(job): return os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

train = sources.train
_watch = {}   # what a child watches for; by its underscore no part of the code that the pool's key is of

def watched(*args, after_epoch, **kw):
    index = args[-1]
    def after(epoch, loss):
        os.write(_watch["log"], b"%d\\n" % index)
        if _watch["dies_in"] == [index, epoch]: os.kill(os.getpid(), signal.SIGKILL)
        after_epoch(epoch, loss)
    train(*args, after_epoch=after, **kw)

def open_pool(job):
    _watch.update(log=log_of(job), dies_in=job["dies_in"])
    sources.train = watched
    sources.store_code = lambda *roots: "watched"      # else what watches would be part of the pool's code
    sources.Pool(real, "image", NetSpec(2, 4), models=4, epochs=3, root=job["store"]).open(progress=False)

def distil(job):
    log = log_of(job)
    method = get_method("dsdm", "digits", **job["hyper"])
    options = {k: job.get(k) for k in ("classes", "store", "folder")}
    options |= dict(device="cpu", precision="float32", compile=False, checkpoint_every=0.)
    def finished(t, loss, S): os.write(log, b"%d\\n" % t)
    distill(method, real, seed=5, on_iteration=finished, progress=False, **options).save(job["result"])

def do(job): (open_pool if "dies_in" in job else distil)(job)
'''
HYPER = dict(ipc=1, factor=2, iterations=30, width=4, batch=8, models=2, pool_epochs=1, smooth_iter=0)


@pytest.fixture(scope="module")
def warm():
    with Warm(DSDM_RUN) as process: yield process


@pytest.fixture(scope="module")
def digits(): return load_data("digits", train_per_class=16)


def pictures(size=8, each=12, classes=3, channels=1, test=12, name="pictures", strategy=FULL) -> RealData:
    "Keyed noise in [0, 1], classes in turn"
    def draw(part, n):
        images = keyed_uniform((n, channels, size, size), 0, f"reference/loop/{part}", n)
        return Part({"image": images}, torch.arange(n) % classes)

    parts = [draw(p, n) for p, n in (("train", each * classes), ("validation", each * classes), ("test", test))]
    normalisation = {"image": Normalisation((.5,) * channels, (.25,) * channels)}
    return RealData(name, tuple("abcdefghij"[:classes]), *parts, normalisation, strategy)


# The pool

def content(folder) -> dict:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(Path(folder).rglob("net*.safetensors"))}

def loaded(folder) -> dict:
    return {p.name: load_tensors(p, "pool network") for p in sorted(Path(folder).rglob("net*.safetensors"))}

def same_tensors(a, b) -> bool:
    a, b = (x if isinstance(x, dict) else loaded(x) for x in (a, b))
    metas = [{n: meta for n, (_, meta) in x.items()} for x in (a, b)]
    if metas[0] != metas[1]: return False
    return all(torch.equal(x, b[n][0][k]) for n, (state, _) in a.items() for k, x in state.items())

def of_network(files, index) -> dict: return {n: x for n, x in files.items() if n.startswith(f"net{index:03d}")}

def test_a_pool_killed_in_every_network_goes_on_there(warm, tmp_path):
    "Four runs die in the middle of one network each; the fifth finishes, and no finished network was touched"
    whole, broken = job_in(tmp_path / "whole", dies_in=None), job_in(tmp_path / "broken", dies_in=None)
    assert warm.run(whole) == 0, said(whole)
    assert iterations(whole) == [k for k in range(4) for epoch in range(3)]
    before = {}
    for k, epoch in enumerate((1, 0, 2, 1)):
        assert warm.run(broken | {"dies_in": [k, epoch]}) == -signal.SIGKILL, said(broken)
        # the network in which the run before died, then the one in which this one does
        assert iterations(broken) == ([k - 1] * 3 if k else []) + [k] * (epoch + 1)
        now = content(broken["store"])
        assert {n[:6] for n in now} == {f"net{i:03d}" for i in range(k)}
        assert all(now[n] == x for n, x in before.items())
        before = now
    assert warm.run(broken) == 0, said(broken)
    assert iterations(broken) == [3] * 3
    now = content(broken["store"])
    assert all(now[n] == x for n, x in before.items()) and len(now) == 4 * 4         # epochs 0, 1, 2 and 3
    assert same_tensors(broken["store"], whole["store"])


POOL = dict(models=3, epochs=1, recipe=Recipe("tiny", 1, 64, rate=1e-2))

def states(pool) -> list: return [n.state_dict() for n in pool.nets]

def equal_states(a, b) -> bool: return all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)

@pytest.fixture(scope="module")
def in_this_process():
    with one_process(): yield

@pytest.fixture
def pool(in_this_process, tmp_path):
    "What opens the same pool of a small data set again, from its store"
    real = pictures()
    return lambda: Pool(real, "image", NetSpec(2, 4), root=tmp_path, **POOL).open(progress=False)

@damages
def test_a_damaged_network_alone_is_trained_again(pool, tmp_path, capsys, damage):
    first = pool()
    before, intact = content(tmp_path), loaded(tmp_path)
    file = next(tmp_path.rglob("net001-epoch001*"))
    assert first.trained == 3 and len(before) == 3 * 2
    damage(file)
    capsys.readouterr()
    again = pool()
    assert again.trained == 1 and equal_states(states(again), states(first))
    printed = capsys.readouterr().out
    now = content(tmp_path)
    assert f"{file} " in printed and printed.count("training network") == 1 and "training network 1 again" in printed
    assert all(of_network(now, k) == of_network(before, k) for k in (0, 2)) and same_tensors(tmp_path, intact)
    assert pool().trained == 0 and capsys.readouterr().out == ""

def test_a_missing_network_alone_is_trained_again(pool, tmp_path):
    first = pool()
    next(tmp_path.rglob("net002-epoch001*")).unlink()
    again = pool()
    assert again.trained == 1 and equal_states(states(again), states(first))


# A run that is killed, the same seed, shards

@pytest.fixture(scope="module")
def uninterrupted(warm, tmp_path_factory):
    job = job_in(tmp_path_factory.mktemp("uninterrupted"), hyper=HYPER)
    assert warm.run(job) == 0, said(job)
    return job

def test_the_same_seed_in_two_processes_gives_the_same_bits(uninterrupted, tmp_path):
    job = job_in(tmp_path, hyper=HYPER)
    fresh = python(DSDM_RUN + "do(json.loads(sys.argv[1]))", json.dumps(job))
    assert fresh.wait(PATIENCE) == 0, fresh.stdout.read()
    fresh.stdout.close()
    assert bits(job) == bits(uninterrupted)

def test_killed_at_random_moments(warm, uninterrupted, tmp_path):
    "One kill while the run starts, four along its way; the bank survives in the checkpoint"
    job, draw = job_in(tmp_path, hyper=HYPER), keyed(0, "test/dsdm kill")
    # the last must still find the run going on
    moments = [-draw.random(), *np.sort(draw.random(4) * .8 * HYPER["iterations"])]
    loop = [d for d in (kill_at(warm, job, m, iteration_seconds=.02) for m in moments) if d]
    assert len(loop) >= 4 and all(d[-1] < HYPER["iterations"] - 1 for d in loop)
    tensors, meta = load_tensors(Checkpoints(job["folder"], "").files()[-1], "checkpoint")
    assert tensors["bank/image"].shape[:2] == (1, 10)
    assert tensors["bank/image"].any()
    assert tensors["updates/image"].tolist() == [meta["t"]]
    assert warm.run(job) == 0, said(job)
    last = iterations(job)
    assert 0 < last[0] and last[-1] == HYPER["iterations"] - 1                  # it went on, it did not begin anew
    assert bits(job) == bits(uninterrupted)
    a, b = (DistilledData.load(j["result"]) for j in (job, uninterrupted))
    assert a.curve == b.curve and torch.equal(a.tensors["image"], b.tensors["image"])

@pytest.mark.parametrize("rule", STEP_RULES)
def test_shards_of_classes_merge_into_the_joint_run(warm, tmp_path, rule):
    "Bank, history term and step rule see the classes of a shard as they see all"
    parts = {"joint": None, "even": list(range(0, 10, 2)), "odd": list(range(1, 10, 2))}
    hyper = HYPER | dict(iterations=4, step_rule=rule)
    jobs = {k: job_in(tmp_path / k, classes=c, store=tmp_path / "store", hyper=hyper) for k, c in parts.items()}
    for job in jobs.values(): assert warm.run(job) == 0, said(job)
    joint, even, odd = (DistilledData.load(jobs[k]["result"]) for k in parts)
    merged = merge([odd, even])
    assert merged.labels == joint.labels and torch.equal(merged.tensors["image"], joint.tensors["image"])
    assert merged.curve == pytest.approx(joint.curve, rel=1e-5)


# The real stream

def test_the_fingerprint_is_of_every_value():
    real = pictures()
    assert real.fingerprint == pictures().fingerprint
    x = real.train.inputs["image"].clone()
    x[7, 0, 3, 3] += 1e-6
    changes = [
        dict(train=Part({"image": x}, real.train.labels)),
        dict(train=Part(real.train.inputs, real.train.labels.roll(1))),
        dict(strategy="crop"),
        dict(normalisation={"image": Normalisation((.5,), (.26,))}),
    ]
    others = [replace(real, **c) for c in changes]
    assert len({real.fingerprint, *(r.fingerprint for r in others)}) == 5
    # and none of them is matched under another's pool
    assert len({Pool(r, "image", NetSpec(2, 4), root=".").path(0, 1) for r in (real, *others)}) == 5

def test_real_batches_are_without_replacement():
    "Twelve samples in batches of five: two a permutation, the rest of it is left out, then a new order"
    members = np.arange(100, 112)
    options = dict(share_augmentation=False, seed=3, family="diffaug", stream="permutations")
    sampler = Sampler(5, "", **options)
    batches = [sampler.real_indices(members, t, 1) for t in range(8)]
    for a, b in zip(batches[::2], batches[1::2]): assert len({*a, *b}) == 10 and {*a, *b} <= set(members)
    assert len({tuple(b) for b in batches}) == 8
    moments.permutation.cache_clear()
    # of t alone, whatever was asked before
    for t in (7, 0, 3): assert (sampler.real_indices(members, t, 1) == batches[t]).all()
    assert len(Sampler(50, "", **options).real_indices(members, 0, 1)) == len(members)

def test_a_resumed_run_reads_the_real_samples_of_one_that_was_not(monkeypatch, tmp_path):
    real = pictures()
    method = get_method("dsdm", "pictures", ipc=1, width=4, batch=5, iterations=6, source="random")
    read = []
    original = Sampler.real_indices
    def watched(self, members, t, c):
        read.append((t, c, original(self, members, t, c).tolist()))
        return read[-1][2]
    monkeypatch.setattr(Sampler, "real_indices", watched)
    def run(folder, stop=None):
        def after(t, loss, S):
            if t == stop: raise Stop
        moments.permutation.cache_clear()
        read.clear()
        try:
            distill(method, real, compute=EXACT, folder=folder, checkpoint_every=0., progress=False, on_iteration=after)
        except Stop: pass
        return list(read)
    whole, first, second = run(tmp_path / "a"), run(tmp_path / "b", stop=3), run(tmp_path / "b")
    # the checkpoint of the iteration that was stopped was not written
    assert [t for t, _, _ in second] == [t for t in (3, 4, 5) for c in range(3)]
    assert first[:9] + second == whole and first == whole[:12]


# Clear refusals, and sizes that do not divide

WRONG = [
    (dict(order="row"), "order must be one of .*'columns', 'rows'.*got 'row'; the nearest is 'rows'"),
    (dict(source="pools"), "source must be one of 'pool', 'random'; got 'pools'"),
    (dict(divisor="n+1"), "divisor must be one of 'n-1', 'n'; got 'n\\+1'"),
    (dict(start_from="randm"), "start_from must be one of .*the nearest is 'random'"),
    (dict(bank_start="second"), "bank_start must be one of 'first', 'zero'; got 'second'"),
    (dict(bank_scope="share"), "bank_scope must be one of .*the nearest is 'shared'"),
    (dict(step_rule="per_class"), "step_rule must be one of .*got 'per_class'"),
    (dict(smoothing=1.5), r"smoothing must lie in \[0, 1\], got 1.5"),
    (dict(lambda_sd=-1.), "lambda_sd must be at least 0, got -1.0"),
    (dict(lambda_h=-.2), "lambda_h must be at least 0, got -0.2"),
    (dict(models=0), "models must be at least 1, got 0"),
    (dict(pool_epochs=-1), "pool_epochs must be at least 0, got -1"),
    (dict(batch=-1), "batch must be at least 0, got -1"),
    (dict(lr=0.), "lr must be positive"),
    (dict(momentum=1.), r"momentum in \[0, 1\)"),
    (dict(ipc=4),
     "ipc=4 with factor 2 needs 16 real samples a class.*smallest class of pictures has 12, so ipc can be at most 3"),
]

@pytest.mark.parametrize("wrong, words", WRONG, ids=[next(iter(w)) for w, _ in WRONG])
def test_what_cannot_work_is_refused_before_any_network_is_trained(tmp_path, wrong, words):
    method = get_method("dsdm", "pictures", **dict(ipc=1, width=4, iterations=1) | wrong)
    with pytest.raises(ValueError, match=words):
        distill(method, pictures(), compute=EXACT, store=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())

def test_a_hyper_parameter_it_does_not_know():
    with pytest.raises(ValueError, match="lambda_s.*the nearest is 'lambda_sd'"):
        get_method("dsdm", "digits", lambda_s=1.)

def test_a_factor_that_does_not_divide():
    """28 pixels in three: blocks of 10, 9 and 9, read back in tens of a canvas filled up to 30 with grey;
    as columns it is refused"""
    real = pictures(size=28, each=9)
    method = get_method("dsdm", "pictures", ipc=1, factor=3, width=4, batch=4, iterations=2, source="random",
                        smooth_iter=0)
    with pytest.raises(ValueError, match="factor 3 does not divide the image size 28×28 of pictures"):
        method.replace(order="columns").check(real)
    made = distill(method, real, compute=EXACT, progress=False)
    inputs, labels = made.decoded()
    assert inputs["image"].shape == (27, 1, 28, 28)
    assert labels.tolist() == sorted(labels.tolist())
    assert torch.isfinite(inputs["image"]).all()
    white = decode(torch.ones(1, 1, 28, 28), 3, "rows")
    # two of the last blocks' ten rows and columns are padding
    corners = white[:, 0, 0, 0].tolist(), white[:, 0, -1, -1].tolist()
    assert corners == (pytest.approx([1.] * 9), pytest.approx([1., 1., .5, 1., 1., .5, .5, .5, .5]))

@pytest.mark.parametrize("n", [1, 4])
def test_colour_of_one_channel(n):
    "Saturation has nothing to move; brightness and contrast are left, and nothing is NaN even without contrast"
    x, u = keyed_uniform((4, 1, 8, 8), 0, "test/grey"), keyed_uniform((n, 3), 0, "test/colour", n)
    brighter = x + (u[:, 0] - .5).view(-1, 1, 1, 1)
    mean = brighter.mean((1, 2, 3), keepdim=True)
    expected = (brighter - mean) * (u[:, 2] + .5).view(-1, 1, 1, 1) + mean
    assert torch.allclose(apply_dsa(x, Augmentation("color", u)), expected, atol=1e-6)
    flat = torch.zeros(4, 1, 8, 8, requires_grad=True)
    out = apply_dsa(flat, Augmentation("color", u))
    assert torch.isfinite(out).all() and torch.isfinite(torch.autograd.grad(out.square().sum(), flat)[0]).all()


# The authors' numbers

REFERENCE = reference("reference_dsdm_losses.npz")

@pytest.mark.parametrize("case", cases(REFERENCE, "matchloss"))
def test_matching_loss_and_its_gradient(case):
    """Objective and gradient of a class as the authors' `matchloss`; from one synthetic sample theirs is NaN,
    ours leaves the covariance out (D-DSDM-11)"""
    _, name, sizes = case.split("/")
    n_real, n_syn = map(int, sizes.split("x"))
    real, syn = (keyed_normal((n, 8, 2, 2), 0, "reference/matchloss/" + k, n).double().flatten(1)[None]
                 for k, n in (("real", n_real), ("syn", n_syn)))
    syn.requires_grad_()
    proto = prototype_loss(real.mean(1), syn.mean(1))
    loss = proto + 50 * covariance_loss(real, syn)
    if name in ("held", "wide"):
        bank = keyed_normal((8, 2, 2), 0, "reference/matchloss/bank").double().flatten()[None]
        loss = loss + .2 * historical_loss(syn.mean(1), bank)
    gradient, = torch.autograd.grad(loss, syn)
    if name == "single":
        assert REFERENCE[case + "/loss"].isnan() and REFERENCE[case + "/gradient"].isnan().all()
        assert loss == proto and torch.isfinite(gradient).all()
    else:
        torch.testing.assert_close(loss, REFERENCE[case + "/loss"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient[0], REFERENCE[case + "/gradient"].flatten(1), rtol=1e-11, atol=1e-12)

def test_covariances_worked_by_hand():
    """Cov of the real pair [[2, 2], [2, 2]], of the synthetic pair [[0, 0], [0, 2]]: 12 / 2 · 50,
    and 3 / 2 · 50 with the paper's divisor (D-DSDM-1)"""
    real, syn = torch.tensor([[[0., 0.], [2., 2.]]]), torch.tensor([[[1., 0.], [1., 2.]]])
    assert prototype_loss(real.mean(1), syn.mean(1)) == 0
    assert 50 * covariance_loss(real, syn) == 300 and 50 * covariance_loss(real, syn, divisor="n") == 75

@pytest.mark.parametrize("case", cases(REFERENCE, "decode"))
def test_decode(case):
    """Images in rows, padded with grey where the factor does not divide;
    spectrograms along time, padded with silence"""
    _, order, factor, shape = case.split("/")
    ours, theirs = decode(reference_input("decode", shape), int(factor), order), REFERENCE[case + "/out"]
    assert ours.shape == theirs.shape and len(ours) == int(shape.split("x")[0]) * per_canvas(int(factor), order)
    assert (ours - theirs).abs().max() <= 1e-5

@pytest.mark.parametrize("case", cases(REFERENCE, "mix"))
def test_canvases_to_start_from(case):
    "Every sample shrunk to its block by its nearest pixels"
    _, order, factor, shape = case.split("/")
    assert torch.equal(encode(reference_input("mix", shape), int(factor), order, "nearest"), REFERENCE[case + "/out"])

@pytest.mark.parametrize("case", cases(REFERENCE, "loop"))
def test_their_whole_loop(case, monkeypatch):
    """Five iterations of their program, without augmentation, on the same data, networks and batches:
    losses, bank, canvases"""
    _, factor, alpha = case.split("/")
    how = dict(ipc=2, factor=int(factor), iterations=5, lr=.01, batch=5, width=8, source="random", strategy="",
               smooth_iter=1, smoothing=float(alpha))
    method = get_method("dsdm", "pictures", **how)
    seen, read = [], MemoryBank.read
    def watched(self, state, t, model):
        seen.append(read(self, state, t, model))
        return seen[-1]
    monkeypatch.setattr(MemoryBank, "read", watched)
    ours = distill(method, pictures(), 4, compute=EXACT, progress=False)
    losses, banks, S = (REFERENCE[f"{case}/{k}"] for k in ("losses", "bank", "S"))
    # held from the first iteration above smooth_iter on
    assert seen[:2] == [None, None] and len(seen) == 5
    torch.testing.assert_close(torch.tensor(ours.curve, dtype=torch.float64), losses.sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack(seen[2:]), banks, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.tensors["image"], S.clamp(0, 1), rtol=0, atol=1e-5)
    start = distill(method.replace(iterations=0), pictures(), 4, compute=EXACT, progress=False).tensors["image"]
    # there was something to agree on
    assert (S - start).abs().max() > 1e-2

@pytest.mark.parametrize("alpha", [.99, 0., 1.])
def test_bank_after_a_sequence_of_prototypes(alpha):
    "The first prototype, then the running mean; not read at iteration 2000, read at 2001"
    bank, p = MemoryBank(alpha), [keyed_normal((3, 5), 0, "test/prototypes", k).double() for k in range(3)]
    state, expected = bank.empty(3, 5, 10, p[0]), None
    for k, x in enumerate(p):
        state = bank.update(state, x, model=k)
        expected = x if expected is None else alpha * expected + (1 - alpha) * x
        torch.testing.assert_close(bank.read(state, 2001, 7), expected, rtol=1e-12, atol=1e-12)
        assert bank.read(state, 2000, 7) is None and int(state["updates"][0]) == k + 1

def test_rate_of_the_pixels():
    "The rate of the pixels by data set, IPC and size, as the authors' `tune_lr_img` (D-DSDM-7)"
    for case, theirs in ((k, v) for k, v in REFERENCE.items() if k.startswith("rate/")):
        _, name, ipc, size = case.split("/")
        assert dsdm_rate(int(ipc), int(size), name) == pytest.approx(theirs.item(), rel=1e-12), case

def test_a_spectrogram_is_square():
    "440 Hz and a chirp of one second at 16 kHz"
    t = torch.arange(SPEECH_LOG.samples) / 16_000
    assert SPEECH_LOG((torch.stack([440 * t, 200 * t + 3_000 * t**2]) * 2 * torch.pi).sin()).shape == (2, 1, 64, 64)


# Evaluation

@pytest.fixture(scope="module")
def chosen():
    return distill(get_method("random", "pictures", ipc=2, width=4), pictures(32), compute=EXACT, progress=False)

def test_the_best_on_the_way_has_its_own_column(in_this_process, chosen):
    rows = evaluate(chosen, pictures(32), idc_recipe(8, batch=4, rate=.05), seeds=3, width=4, fusion="linear")
    assert len(rows) == 3 and rows.best.ge(rows.accuracy).all() and set(rows.modality) == {"image"}
    unchecked = replace(idc_recipe(1), checks=0)
    assert evaluate(chosen, pictures(32), unchecked, seeds=1, width=4, fusion="linear").best.isna().all()

def test_another_architecture_trains_for_a_step(in_this_process, chosen):
    rows = evaluate(chosen, pictures(32), idc_recipe(1), seeds=1, fusion="linear", net="densenet121")
    assert rows.steps.tolist() == [1] and rows.accuracy.between(0, 100).all()

def test_networks_trained_together_are_those_trained_alone():
    "Composed augmentation, CutMix, drops of the rate and a last batch that is smaller, in float64"
    real, recipe = pictures(16, each=7), idc_recipe(6, batch=8)
    inputs, labels = {m: x.double() for m, x in real.batch("train", range(21)).items()}, real.train.labels
    specs = {"image": spec_for((1, 16, 16), 4)}
    keys = [(k, "evaluate", 0) for k in range(3)]
    together, alone = ([new_net(specs, real.shapes, 3, "linear", *key).double() for key in keys] for _ in range(2))
    steps = train_together(together, inputs, labels, recipe, FULL, keys)
    assert [train(net, inputs, labels, recipe, FULL, *key) for net, key in zip(alone, keys)] == [steps] * 3
    assert steps == 6 * 3
    for a, b in zip(together, alone):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-7)
    for a, b in combinations(together, 2): assert not torch.equal(next(a.parameters()), next(b.parameters()))
