"""Pairs distilled: experts and runs that are killed, foreign or damaged buffers, and the loss by other means."""
import json
import math
import signal
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddrepro.core.compute import EXACT
from ddrepro.core.files import load_tensors
from ddrepro.core.seeding import keyed, keyed_normal
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.loop import distill
from ddrepro.distill.method import Diverged
from ddrepro.distill.unroll import trajectory_loss, unroll
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.evaluate.pair_scores import pair_job, rates_of, score_pairs
from ddrepro.evaluate.tasks import origin_from
from ddrepro.methods import get_method
from ddrepro.nets.contrastive import SCALE, STUDENT_SCALE, contrastive_loss
from ddrepro.nets.dual import DualSpec, dual_net, layouts, vectors
from ddrepro.nets.encoders import TextProjection
from ddrepro.nets.experts import PairExperts
from ddrepro.nets.pair_training import PAIR_EXPERT, PAIRS_RECIPE
from helpers import one_thread, run_script, snapshot_digests, squares

SMALL = dict(width=4, dim=6, experts=2, expert_epochs=2, expert_batch=8, expert_captions=0)
QUICK = SMALL | dict(ipc=6, iterations=6, steps=3, batch=4, max_start=2, alpha=0.1, lr_image=5., lr_text=5.,
                     lr_rate=1e-5)

CHILD = '''
import json, os, signal, sys
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.core.compute import EXACT
from helpers import die_at, squares

job = json.loads(sys.argv[1])
die_at(job["nth"], job["moment"])

def reached(t, loss, S):
    if job["moment"] == "iteration" and t == job["nth"]: os.kill(os.getpid(), signal.SIGKILL)

method = get_method("vldd", **job["settings"])
places = dict(store=job["root"] + "/store", folder=job["root"] + "/run")
distill(method, squares(), seed=1, compute=EXACT, checkpoint_every=0., progress=False, on_iteration=reached, **places)
'''


@pytest.fixture(scope="module")
def real(): return squares()

@pytest.fixture(scope="module", autouse=True)
def as_the_children_compute():
    with one_thread(): yield

@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("store")

def run(real, root, **changes):
    more = {k: changes.pop(k) for k in ("seed", "folder", "compute") if k in changes}
    options = dict(seed=1, compute=EXACT, store=root, progress=False) | more
    return distill(get_method("vldd", **QUICK | changes), real, **options)

def same_set(a, b):
    assert a.curve == b.curve and a.card["rates"] == b.card["rates"]
    for m in a.tensors: assert torch.equal(a.tensors[m], b.tensors[m])

@pytest.fixture(scope="module")
def undisturbed(real, store): return run(real, store)


# Kills

@pytest.mark.parametrize("moment, nth", [("half written", 3), ("just moved", 4), ("half written", 6), ("iteration", 3)])
def test_killed_and_run_again_gives_the_same_set(real, tmp_path, store, undisturbed, moment, nth):
    done = run_script(CHILD, json.dumps(dict(root=str(tmp_path), moment=moment, nth=nth, settings=QUICK)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(real, tmp_path / "store", folder=tmp_path / "run")
    same_set(resumed, undisturbed)
    assert snapshot_digests(tmp_path) == snapshot_digests(store)
    assert not list(tmp_path.rglob("*.tmp"))

def test_spilled_parameters_and_kept_graphs_change_nothing(real, store, undisturbed, tmp_path):
    same_set(run(real, store, spill=str(tmp_path)), undisturbed)
    kept = run(real, store, graphs=3)
    assert np.allclose(kept.curve, undisturbed.curve, rtol=1e-4)


# Buffers

def test_a_buffer_of_another_make_is_refused_by_name(real, store, undisturbed):
    recipe = replace(PAIR_EXPERT, batch=8)
    made = dict(real=real, spec=DualSpec(width=4, dim=6), root=store, models=2, epochs=2, recipe=recipe)
    folder = PairExperts(**made).trajectories.folder
    assert PairExperts(**made, folder=folder).open().trained == 0
    for changes, named in (
        (dict(spec=DualSpec(width=8, dim=6)), "image and layout"),
        (dict(spec=DualSpec("smallvit", 8, dim=6)), "image and layout"),
        (dict(spec=DualSpec(width=4, dim=5)), "layout and text"),
        (dict(spec=DualSpec(width=4, dim=6, dropout=.2)), "text"),
        (dict(real=squares(20)), "data"),
        (dict(recipe=replace(recipe, rate=.2)), "recipe"),
        (dict(seed=1), "seed"),
    ):
        with pytest.raises(ValueError, match=f"was made with another {named}"):
            PairExperts(**made | changes, folder=folder).open()

@pytest.mark.parametrize("expert", [0, 1])
def test_a_damaged_snapshot_is_found_and_its_expert_trained_again(real, tmp_path, undisturbed, expert, capsys):
    run(real, tmp_path, iterations=1)
    before = snapshot_digests(tmp_path)
    path = next(tmp_path.rglob(f"expert00{expert}-epoch001*"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    same_set(run(real, tmp_path), undisturbed)
    assert "checksum" in capsys.readouterr().out
    assert snapshot_digests(tmp_path) == before

def test_experts_in_workers_are_those_made_here(real, tmp_path, store, undisturbed, monkeypatch):
    monkeypatch.setenv("DDREPRO_WORKERS", "2")
    experts = PairExperts(real, DualSpec(width=4, dim=6), tmp_path, 2, 2, recipe=replace(PAIR_EXPERT, batch=8))
    made = experts.open(progress=False)
    assert made.trained == 2 and snapshot_digests(tmp_path) == snapshot_digests(store)


# Against independent arithmetic

@pytest.mark.parametrize("d_text, D", [(768, 2304), (512, 2304)])
def test_projection(d_text, D):
    net = TextProjection(d_text, D).eval()
    y = keyed_normal((3, d_text), 0, "y")
    w = {k: v.detach().double().numpy() for k, v in net.named_parameters()}
    u = y.double().numpy() @ w["first.weight"].T + w["first.bias"]
    gelu = u * .5 * (1 + np.vectorize(math.erf)(u / np.sqrt(2)))
    v = gelu @ w["second.weight"].T + w["second.bias"] + u
    normalised = (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)
    expected = normalised * w["norm.weight"] + w["norm.bias"]
    assert np.allclose(net(y).detach().numpy(), expected, atol=2e-5)

@pytest.mark.parametrize("scale", [SCALE, STUDENT_SCALE])
def test_contrastive_loss(scale):
    x, y = keyed(0, "x").standard_normal((5, 7)), keyed(0, "y").standard_normal((5, 7))

    def unit(a): return a / np.linalg.norm(a, axis=1, keepdims=True)
    def cross_entropy(a): return -np.mean([row[i] - np.log(np.exp(row).sum()) for i, row in enumerate(a)])

    logits = scale * unit(x) @ unit(y).T
    loss = contrastive_loss(torch.from_numpy(x), torch.from_numpy(y), scale=scale).item()
    assert np.isclose(loss, (cross_entropy(logits) + cross_entropy(logits.T)) / 2, rtol=1e-12)

def test_unrolled_student_against_the_plain_graph():
    x, y = keyed_normal((4, 3), 0, "x").double().requires_grad_(), torch.tensor([0, 1, 1, 0])
    start, target = keyed_normal((8,), 0, "θ").double(), keyed_normal((8,), 1, "θ").double()
    rate = torch.tensor(.3, dtype=torch.float64, requires_grad=True)
    def loss(v, inputs, step): return F.cross_entropy(inputs["x"] @ v["net"][:6].view(3, 2) + v["net"][6:], y)
    ours = trajectory_loss(unroll(loss, {"net": start}, {"net": rate}, {"x": x}, 2), {"net": start}, {"net": target})
    theta = start.clone().requires_grad_()
    for step in range(2):
        theta = theta - rate * torch.autograd.grad(loss({"net": theta}, {"x": x}, step), theta, create_graph=True)[0]
    # both divided by the number of parameters
    plain = (theta - target).square().mean() / (start - target).square().mean()
    assert torch.isclose(ours, plain, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, rate)), torch.autograd.grad(plain, (x, rate))):
        assert torch.allclose(a, b, rtol=1e-8)

def test_two_ratios():
    v = {n: {m: keyed(0, n, m).standard_normal(size) for m, size in (("image", 9), ("text", 4))}
         for n in ("student", "start", "target")}
    expected = sum(((v["student"][m] - v["target"][m])**2).sum() / ((v["start"][m] - v["target"][m])**2).sum()
                   for m in ("image", "text"))
    parts = [{m: torch.from_numpy(x) for m, x in part.items()} for part in v.values()]
    assert np.isclose(trajectory_loss(*parts).item(), expected, rtol=1e-12)


# The method

def test_both_rates_are_learned_and_travel(real, store, undisturbed, tmp_path):
    rates = undisturbed.card["rates"]
    assert set(rates) == {"image", "text"} and all(abs(r - .1) > 1e-7 for r in rates.values())
    undisturbed.save(tmp_path / "pairs")
    loaded = DistilledData.load(tmp_path / "pairs")
    same_set(loaded, undisturbed)
    assert rates_of(loaded.card, PAIRS_RECIPE) == {"image": rates["image"], "text": rates["image"]}
    assert rates_of(loaded.card, replace(PAIRS_RECIPE, text_rate="text")) == rates
    quick = replace(PAIRS_RECIPE, epochs=2)
    job = pair_job(loaded, real, quick, "test", origin_from(loaded).dual, store) | {"seeds": [(1, 0)]}
    assert {r["steps"] for r in score_pairs(job)} == {2} and len(score_pairs(job)) == 6

def test_a_minibatch_larger_than_the_set_is_the_set(real, store):
    same_set(run(real, store, batch=6), run(real, store, batch=100))

def test_one_modality_alone(real, store):
    start = run(real, store, iterations=0)
    for learn, still in (("image", "text"), ("text", "image")):
        alone = run(real, store, learn=learn)
        assert torch.equal(alone.tensors[still], start.tensors[still])
        assert not torch.equal(alone.tensors[learn], start.tensors[learn])

def test_it_starts_from_the_random_pairs_of_its_seed(real, store):
    random = get_method("random", **{k: v for k, v in QUICK.items() if k in SMALL}, ipc=6)
    chosen = distill(random, real, seed=1, store=store, progress=False)
    start = run(real, store, iterations=0)
    for m in start.tensors: assert torch.equal(start.tensors[m], chosen.tensors[m])

def test_a_rate_that_leaves_its_bounds_stops_the_run_by_name(real, store, tmp_path):
    with pytest.raises(Diverged, match="the learned rate of the (image|text) became"):
        run(real, store, lr_rate=1e4, folder=tmp_path)
    assert list(tmp_path.glob("checkpoint-*"))

@pytest.mark.parametrize("changes, message", [
    (dict(ipc=49), "squares has 48 pairs"),
    (dict(max_start=3), "use max_start up to 2"),
    (dict(span=3), "use max_start up to 0"),
    (dict(learn="texts"), "learn must be one of"),
    (dict(start_image="zeros"), "start_image must be one of"),
    (dict(alpha=0.), "alpha must lie between"),
    (dict(momentum=1.), "momentum must lie in"),
    (dict(student_scale=0.), "student_scale must be positive"),
    (dict(text="word2vec"), "text must be one of"),
    (dict(expert_augment="flip"), "augment must be one of"),
    (dict(dropout=1.), "dropout must lie in"),
    (dict(batch=1), "batch must be at least 2"),
    (dict(expert_epochs=0), "expert_epochs must be at least 1"),
])
def test_wrong_values_are_refused(real, store, changes, message):
    with pytest.raises(ValueError, match=message): run(real, store, **changes)

def test_experiments_on_pairs_read_what_is_there(real, tmp_path):
    methods = [get_method(name, ipc=4, **SMALL) for name in ("random", "herding", "kcenter", "forgetting")]
    quick = replace(PAIRS_RECIPE, epochs=1)
    es = [Experiment(method, seed=s, recipe=quick, eval_seeds=1) for method in methods for s in (0, 1)]
    first = run_all(es, real, runs=tmp_path, store=tmp_path / "store", progress=False)
    assert len(first) == 8 * 6 and not first.stale.any() and first.accuracy.between(0, 100).all()
    second = run_all(es, real, runs=tmp_path, store=tmp_path / "store", progress=False)
    assert second.accuracy.tolist() == first.accuracy.tolist()


def test_texts_of_characters_are_distilled_and_scored(real, tmp_path):
    "From the method's field to the recalls; a set of them belongs to the captions it was fitted on"
    method = get_method("vldd", **QUICK | dict(text="tfidf_char", experts=1))
    rows = run_all([Experiment(method, seed=0, recipe=replace(PAIRS_RECIPE, epochs=1), eval_seeds=1)], real,
                   runs=tmp_path, store=tmp_path / "store", progress=False)
    assert len(rows) == 6 and rows.accuracy.between(0, 100).all()
    made = distill(method, real, seed=0, compute=EXACT, store=tmp_path / "store", progress=False)
    assert made.tensors["text"].shape == (6, 6)
    with pytest.raises(ValueError, match="embedded by a TF-IDF that was fitted on the captions of"):
        pair_job(made, replace(real, max_words=2), PAIRS_RECIPE, "test", method.dual)


# LoRA

@pytest.mark.skipif(not find_spec("peft"), reason="LoRA needs peft")
def test_lora_trains_stores_and_matches_adapters_and_projection_alone(real, tmp_path):
    spec = DualSpec("smallvit", 8, lora=2, dim=6)
    net = dual_net(spec, 16, 6, 0)
    names = layouts(net)
    assert all("lora_" in n for n in names["image"].names)
    parts = ("first", "second", "norm")
    assert set(names["text"].names) == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    s = run(real, tmp_path, image="smallvit", width=8, lora=2)
    kept = load_tensors(next(tmp_path.rglob("expert*")), "trajectory")[0]
    assert {m: len(v) for m, v in kept.items()} == {m: len(v) for m, v in vectors(net).items()}
    assert np.isfinite(s.curve).all()
    buffer = PairExperts(real, spec, tmp_path, 2, 2, recipe=replace(PAIR_EXPERT, batch=8))
    first, last = buffer.network(0, 0), buffer.network(0, 2)
    for (name, a), b in zip(first.image.named_parameters(), last.image.parameters()):
        assert ("lora_" in name and "lora_B" in name) <= (not torch.equal(a, b)), name
    for (name, a), b in zip(first.image.named_parameters(), last.image.parameters()):
        assert "lora_" in name or torch.equal(a, b), name
