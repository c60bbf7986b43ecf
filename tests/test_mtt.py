"""Matching training trajectories: kills, damage, foreign buffers, the reference case D15, learned rates in evaluation."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddrepro.data import load_data
from ddrepro.distill import Diverged, distill
from ddrepro.distilled import DistilledData
from ddrepro.evaluate import evaluate, evaluate_whole, evaluation_job, score_one
from ddrepro.experiment import Experiment, distillation_run, snapshot_path
from ddrepro.method import Context
from ddrepro.methods import get_method
from ddrepro.methods.mtt import step_rows
from ddrepro.moments import EXACT, Compute
from ddrepro.nets import FusionNet
from ddrepro.training import Recipe, dc_recipe, get_recipe, make_optimiser, new_net, train
from ddrepro.trajectories import flatten

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DDREPRO_WORKERS": "0", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE = 300
SMALL = dict(ipc=1, width=4, steps=3, span=1, max_start=2, experts=2, expert_epochs=2, expert_rate=.05, expert_batch=64, iterations=5, lr=20.,
             lr_rate=1e-5, alpha=.05)
SHORT = Recipe("short", 3, 16, "sgd", rate=None, augment=False)

RUN = '''
import json, os, signal, sys
from ddrepro.data import load_data
from ddrepro.distill import distill
from ddrepro.methods import get_method
from ddrepro.moments import EXACT

job = json.loads(sys.argv[1])
fsync, written = os.fsync, []
def flush(handle):
    fsync(handle)
    written.append(handle)
    if len(written) == job["kill_at"]: os.kill(os.getpid(), signal.SIGKILL)
os.fsync = flush
real = load_data("digits_av").restrict(job["modalities"])
s = distill(get_method("mtt", **job["settings"]), real, seed=1, compute=EXACT, store=job["root"] + "/store", folder=job["root"] + "/run", checkpoint_every=0., progress=False)
os.fsync = fsync
s.save(job["root"] + "/set")
'''


@pytest.fixture(autouse=True)
def in_this_process_on_one_thread(monkeypatch):
    "As the children compute: results are bit-equal at equal thread counts"
    monkeypatch.setenv("DDREPRO_WORKERS", "0")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def real(): return load_data("digits")

@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("store")

def method(**more): return get_method("mtt", **SMALL | more)

def run(real, store, m=None, seed=1, **more): return distill(m or method(), real, seed, **dict(compute=EXACT, store=store, progress=False) | more)

def child(root, kill_at=0, modalities=("image",)):
    job = json.dumps(dict(root=str(root), kill_at=kill_at, settings=SMALL, modalities=modalities))
    return subprocess.run([sys.executable, "-c", RUN, job], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    done = child(root, modalities=("audio", "image"))
    assert done.returncode == 0, done.stderr
    return DistilledData.load(root / "set")


@pytest.mark.parametrize("kill_at", [3, 8, 15])      # twelve files are written by experts, then the checkpoints
def test_killed_anywhere(undisturbed, tmp_path, kill_at):
    "While experts train and while samples are learned: the same bits in samples, rates and losses of both modalities"
    assert child(tmp_path, kill_at, ("audio", "image")).returncode == -signal.SIGKILL
    done = child(tmp_path, modalities=("audio", "image"))
    assert done.returncode == 0, done.stderr
    found = DistilledData.load(tmp_path / "set")
    assert found.curve == undisturbed.curve and found.card["rates"] == undisturbed.card["rates"] and len(found.curve) == SMALL["iterations"]
    for m in ("audio", "image"): assert torch.equal(found.tensors[m], undisturbed.tensors[m])

def test_two_modalities_are_two_runs(undisturbed, store):
    "MTT-AV: each modality is what it is alone, with its own rate"
    both = load_data("digits_av")
    for m in both.modalities:
        alone = run(both.restrict([m]), store)
        assert torch.allclose(alone.tensors[m], undisturbed.tensors[m], atol=1e-5)
        assert alone.card["rates"] == {m: pytest.approx(undisturbed.card["rates"][m], rel=1e-6)}
    assert undisturbed.card["rates"]["audio"] != undisturbed.card["rates"]["image"] != SMALL["alpha"]


def expert_files(folder): return sorted(folder.rglob("expert*.safetensors"))

def test_foreign_buffer_is_refused_by_name(real, tmp_path):
    run(real, tmp_path)
    own = expert_files(tmp_path)
    other = method(width=8).buffer(real, "image", tmp_path)
    other.trajectories.folder.mkdir(parents=True)
    for file in own: (other.trajectories.folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="another layout and specs .*choose another folder"): run(real, tmp_path, method(width=8))

def test_damaged_snapshot_is_trained_again(real, tmp_path, capsys):
    whole = run(real, tmp_path)
    for file in expert_files(tmp_path): file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    again = run(real, tmp_path)
    assert "training expert" in capsys.readouterr().out
    assert torch.equal(again.tensors["image"], whole.tensors["image"]) and again.card["rates"] == whole.card["rates"]


def test_two_steps_in_float64(real, store):
    "D15: normalised loss, its derivatives by every sample and by α, against a loop in plain torch without our unrolling, losses or augmentation"
    m, compute = method(steps=2, strategy="", alpha=.3), Compute(precision="float64", threads=0)
    context = Context(real, 1, tuple(range(10)), compute, store)
    m.prepare(context)
    experts = context.helpers["experts"]["image"]
    S = {k: x.double().requires_grad_() for k, x in m.start(context)[0].items()}
    loss = m.loss(context, S, {}, 0)
    found = torch.autograd.grad(loss, [S["image"], S["rate/image"]])

    start, target = (x.double() for x in m.segments(1).at(experts, 0))
    names, sizes = [n for n, _ in experts.net.named_parameters()], [p.shape for p in experts.net.parameters()]
    x, alpha, theta = S["image"].detach().flatten(0, 1).requires_grad_(), S["rate/image"].detach().requires_grad_(), start.clone().requires_grad_()
    first = theta
    for _ in range(2):
        parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in sizes]), sizes)]
        logits = torch.func.functional_call(experts.net, dict(zip(names, parts)), {"image": x})["image"]
        picked = logits.log_softmax(1)[torch.arange(10), torch.arange(10)]
        theta = theta - alpha * torch.autograd.grad(-picked.mean(), theta, create_graph=True)[0]
    expected = F.mse_loss(theta, target, reduction="sum") / F.mse_loss(first.detach(), target, reduction="sum")
    per_parameter = F.mse_loss(theta, target) / F.mse_loss(first.detach(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) == pytest.approx(per_parameter.item(), rel=1e-12)
    for a, b in zip(found, torch.autograd.grad(expected, [x, alpha])): assert (a.flatten() - b.flatten()).norm() <= 1e-8 * b.norm()

def test_mini_batches_are_chunks_of_one_order():
    "Used up from the end, the odd one first"
    rows = [step_rows(5, 2, step, 0) for step in range(3)]
    assert [len(r) for r in rows] == [1, 2, 2] and sorted(torch.cat(rows).tolist()) == list(range(5))


def test_learned_rate_reaches_evaluation(real, store, tmp_path):
    s = run(real, store)
    s.save(tmp_path / "set")
    s = DistilledData.load(tmp_path / "set")
    learned = s.card["rates"]["image"]
    assert learned != SMALL["alpha"]
    score = lambda s, recipe: evaluate(s, real, recipe, seeds=2, part="validation", fusion="linear").accuracy.tolist()
    assert evaluation_job(s, real, SHORT, "validation", None, "linear", None)["recipe"].rate == learned
    assert score(s, SHORT) == score(s, replace(SHORT, rate=learned))
    job = evaluation_job(replace(s, card=s.card | {"rates": {"image": 0.}}), real, SHORT, "validation", 4, "linear", None)
    net = new_net(job["specs"], real.shapes, 10, "linear", 0)
    before = flatten(net)
    train(net, job["inputs"], job["labels"], job["recipe"], "", 0)
    assert torch.equal(flatten(net), before)             # at a learned rate of zero nothing moves

def test_each_branch_trains_at_its_own_learned_rate(undisturbed):
    both = load_data("digits_av")
    job = evaluation_job(undisturbed, both, SHORT, "validation", 4, "ensemble", None)
    net = new_net(job["specs"], both.shapes, 10, "ensemble", 0)
    rates = {id(p): g["lr"] for g in make_optimiser(dict(net.named_parameters()), job["recipe"]).param_groups for p in g["params"]}
    for name, p in net.named_parameters():
        assert rates[id(p)] == undisturbed.card["rates"]["audio" if "audio" in name else "image"], name
    rows = {r["modality"]: r["accuracy"] for r in score_one(job | dict(seeds=[(0, 0)]))}
    for m, letter in (("audio", "A"), ("image", "V")):           # the other branch's rate does not matter
        other = undisturbed.card["rates"] | {k: .5 for k in both.modalities if k != m}
        changed = evaluation_job(replace(undisturbed, card=undisturbed.card | dict(rates=other)), both, SHORT, "validation", 4, "ensemble", None)
        assert {r["modality"]: r["accuracy"] for r in score_one(changed | dict(seeds=[(0, 0)]))}[letter] == rows[letter]

def test_recipes_that_cannot_be(real, store):
    s, random = run(real, store), distill(get_method("random", ipc=1, width=4), real, 1, progress=False)
    with pytest.raises(ValueError, match="no rate was learned with this one"): evaluate(random, real, "mtt", fusion="linear")
    with pytest.raises(ValueError, match="no rate was learned with this one"): evaluate_whole(real, "mtt", fusion="linear", width=4)
    with pytest.raises(ValueError, match="got 'sum'"): evaluate(s, real, "mtt", fusion="sum")
    with pytest.raises(ValueError, match="no rate of its own"): make_optimiser(dict(FusionNet({}, {}, 10).named_parameters()) | {"fusion.head.weight": None}, get_recipe("mtt"))

def test_experiments_tell_learned_from_fixed(real):
    own, learned, fixed = (Experiment(method(), recipe=r, fusion="linear") for r in (None, get_recipe("mtt"), dc_recipe()))
    assert own.evaluation() == learned.evaluation() != fixed.evaluation()
    assert own.evaluation()["recipe"]["rate"] is None and fixed.evaluation()["recipe"]["rate"] == .01
    assert Experiment(get_method("dm")).evaluation()["recipe"]["name"] == "avdd"

def test_snapshots_carry_their_rates(real, tmp_path):
    "A set on its way is what a shorter run gives, learned rate and all"
    e = Experiment(method(), seed=1, fusion="linear")
    compute = dict(compute=EXACT)
    kept = distillation_run(e, real, tmp_path / "runs", tmp_path / "store", compute, progress=False, snapshots=(2,))
    on_the_way, short = DistilledData.load(snapshot_path(kept.folder, 2)), run(real, tmp_path / "store", method(iterations=2))
    assert on_the_way.card["rates"] == short.card["rates"] != kept.distilled.card["rates"]
    assert torch.equal(on_the_way.tensors["image"], short.tensors["image"])


def test_unusable_rates_are_named(real, store, tmp_path):
    context = Context(real, 1, tuple(range(10)), EXACT, store)
    method().prepare(context)
    S, state = method().start(context)
    with pytest.raises(Diverged, match="learned rate of the image became -0.001; it must lie between 0 and 10"):
        method().loss(context, S | {"rate/image": torch.tensor(-1e-3)}, state, 0)
    with pytest.raises(Diverged, match="must lie between 0 and 0.01.* at iteration 0; the state before it is kept"):
        run(real, store, method(largest_alpha=.01), folder=tmp_path / "run")
    assert list((tmp_path / "run").glob("checkpoint-*"))

@pytest.mark.parametrize("change, message", [
    (dict(steps=0), "steps must be at least 1"), (dict(batch=-1), "batch must be at least 0"), (dict(lr=0.), "lr must be positive"),
    (dict(lr_rate=-1.), "lr_rate must not be negative"), (dict(alpha=-.1), "alpha must be positive"), (dict(alpha_audio=0.), "alpha_audio must be positive"),
    (dict(momentum=1.), r"momentum must lie in \[0, 1\)"), (dict(expert_rate=0.), "expert_rate must be positive"), (dict(expert_batch=0), "expert_batch at least 1"),
    (dict(max_start=3), "use max_start up to 2"), (dict(experts=0), "models must be at least 1"), (dict(start_from="herdding"), "nearest is 'herding'"),
    (dict(ipc=1000), "ipc can be at most"),
])
def test_bad_settings_before_any_compute(real, tmp_path, change, message):
    with pytest.raises(ValueError, match=message): run(real, tmp_path / "store", method(**change))
    assert not (tmp_path / "store").exists()

def test_whitened_and_plain_are_not_confused(real, store, tmp_path):
    white = real.whitened()
    s = run(white, store)
    s.save(tmp_path / "white")
    s = DistilledData.load(tmp_path / "white")
    assert evaluate(s, white, SHORT, seeds=1, part="validation", fusion="linear").accuracy.between(0, 100).all()
    with pytest.raises(ValueError, match="normalised by Whitening"): evaluate(s, real, SHORT, fusion="linear")
    start = run(white, store, method(iterations=0)).natural("image").flatten(0, 1)
    pixels = real.train.inputs["image"] / 255
    for x in start: assert (pixels - x).abs().amax((1, 2, 3)).min() < 1e-3       # inverting gives the pictures it began with
