"""Matching training trajectories: kills, damage, foreign buffers, a plain loop, evaluation at learned rates."""
import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddrepro.core.compute import EXACT, Compute
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.loop import distill
from ddrepro.distill.method import Context, Diverged
from ddrepro.evaluate.classification import evaluation_job, score_one
from ddrepro.evaluate.experiment import Experiment, settled
from ddrepro.evaluate.runs import distillation_run, snapshot_path
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.methods.mtt import step_rows
from ddrepro.nets.networks import FusionNet
from ddrepro.nets.recipes import Recipe, dc_recipe, get_recipe, make_optimiser
from ddrepro.nets.training import new_net, train
from ddrepro.nets.vectors import flatten
from helpers import one_thread, run_script

SMALL = dict(ipc=1, width=4, steps=3, span=1, max_start=2, experts=2, expert_epochs=2, expert_rate=.05,
             expert_batch=64, iterations=5, lr=20., lr_rate=1e-5, alpha=.05)
SHORT = Recipe("short", 3, 16, "sgd", rate=None, augment=False)

RUN = '''
import json, sys
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.core.compute import EXACT
from ddrepro.data.registry import load_data
from helpers import die_at

job = json.loads(sys.argv[1])
die_at(job["kill_at"], "written")
real = load_data("digits_av").restrict(job["modalities"])
method = get_method("mtt", **job["settings"])
places = dict(store=job["root"] + "/store", folder=job["root"] + "/run")
s = distill(method, real, seed=1, compute=EXACT, checkpoint_every=0., progress=False, **places)
s.save(job["root"] + "/set")
'''


@pytest.fixture(autouse=True)
def as_the_children_compute():
    with one_thread(): yield

@pytest.fixture(scope="module")
def real(): return load_data("digits")

@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("store")

def method(**more): return get_method("mtt", **SMALL | more)

def run(real, store, m=None, seed=1, **more):
    return distill(m or method(), real, seed, **dict(compute=EXACT, store=store, progress=False) | more)

def child(root, kill_at=0, modalities=("image",)):
    job = json.dumps(dict(root=str(root), kill_at=kill_at, settings=SMALL, modalities=modalities))
    return run_script(RUN, job)

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
    resumed = DistilledData.load(tmp_path / "set")
    assert resumed.curve == undisturbed.curve
    assert resumed.card["rates"] == undisturbed.card["rates"]
    assert len(resumed.curve) == SMALL["iterations"]
    for m in ("audio", "image"): assert torch.equal(resumed.tensors[m], undisturbed.tensors[m])

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
    files = expert_files(tmp_path)
    other = method(width=8).buffer(real, "image", tmp_path)
    other.trajectories.folder.mkdir(parents=True)
    for file in files: (other.trajectories.folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="another layout and specs .*choose another folder"):
        run(real, tmp_path, method(width=8))

def test_damaged_snapshot_is_trained_again(real, tmp_path, capsys):
    whole = run(real, tmp_path)
    for file in expert_files(tmp_path): file.write_bytes(file.read_bytes()[:-7] + b"damaged")
    again = run(real, tmp_path)
    assert "training expert" in capsys.readouterr().out
    assert torch.equal(again.tensors["image"], whole.tensors["image"]) and again.card["rates"] == whole.card["rates"]


def test_two_steps_in_float64(real, store):
    """Normalised loss, its derivatives by every sample and by α, against a loop in plain torch
    without our unrolling, losses or augmentation"""
    m = method(steps=2, strategy="", alpha=.3)
    context = Context(real, 1, tuple(range(10)), Compute(precision="float64", threads=0), store)
    m.prepare(context)
    experts = context.experts["image"]
    S = {k: x.double().requires_grad_() for k, x in m.start(context)[0].items()}
    loss = m.loss(context, S, {}, 0)
    ours = torch.autograd.grad(loss, [S["image"], S["rate/image"]])

    start, target = (x.double() for x in m.segments(1).at(experts, 0))
    names, sizes = [n for n, _ in experts.net.named_parameters()], [p.shape for p in experts.net.parameters()]
    x = S["image"].detach().flatten(0, 1).requires_grad_()
    alpha = S["rate/image"].detach().requires_grad_()
    theta = start.clone().requires_grad_()
    first = theta
    for _ in range(2):
        parts = [p.view(s) for p, s in zip(theta.split([s.numel() for s in sizes]), sizes)]
        logits = torch.func.functional_call(experts.net, dict(zip(names, parts)), {"image": x})["image"]
        picked = logits.log_softmax(1)[torch.arange(10), torch.arange(10)]
        theta = theta - alpha * torch.autograd.grad(-picked.mean(), theta, create_graph=True)[0]
    expected = F.mse_loss(theta, target, reduction="sum") / F.mse_loss(first.detach(), target, reduction="sum")
    per_parameter = F.mse_loss(theta, target) / F.mse_loss(first.detach(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) == pytest.approx(per_parameter.item(), rel=1e-12)
    for a, b in zip(ours, torch.autograd.grad(expected, [x, alpha])):
        assert (a.flatten() - b.flatten()).norm() <= 1e-8 * b.norm()

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

    def score(s, recipe):
        return evaluate(s, real, recipe, seeds=2, part="validation", fusion="linear").accuracy.tolist()

    assert evaluation_job(s, real, SHORT, "validation", 4, "linear")["recipe"].rate == learned
    assert score(s, SHORT) == score(s, replace(SHORT, rate=learned))
    still = replace(s, card=s.card | {"rates": {"image": 0.}})
    job = evaluation_job(still, real, SHORT, "validation", 4, "linear")
    net = new_net(job["specs"], real.shapes, 10, "linear", 0)
    before = flatten(net)
    train(net, job["inputs"], job["labels"], job["recipe"], "", 0)
    assert torch.equal(flatten(net), before)             # at a learned rate of zero nothing moves

def test_each_branch_trains_at_its_own_learned_rate(undisturbed):
    both = load_data("digits_av")
    job = evaluation_job(undisturbed, both, SHORT, "validation", 4, "ensemble")
    net = new_net(job["specs"], both.shapes, 10, "ensemble", 0)
    optimiser = make_optimiser(dict(net.named_parameters()), job["recipe"])
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    for name, p in net.named_parameters():
        assert rates[id(p)] == undisturbed.card["rates"]["audio" if "audio" in name else "image"], name
    rows = {r["modality"]: r["accuracy"] for r in score_one(job | dict(seeds=[(0, 0)]))}
    for m, letter in (("audio", "A"), ("image", "V")):           # the other branch's rate does not matter
        other = undisturbed.card["rates"] | {k: .5 for k in both.modalities if k != m}
        moved = replace(undisturbed, card=undisturbed.card | dict(rates=other))
        changed = evaluation_job(moved, both, SHORT, "validation", 4, "ensemble")
        assert {r["modality"]: r["accuracy"] for r in score_one(changed | dict(seeds=[(0, 0)]))}[letter] == rows[letter]

def test_recipes_that_cannot_be(real, store):
    s, random = run(real, store), distill(get_method("random", ipc=1, width=4), real, 1, progress=False)
    with pytest.raises(ValueError, match="no rate was learned with this one"):
        evaluate(random, real, "mtt", fusion="linear")
    with pytest.raises(ValueError, match="no rate was learned with this one"):
        evaluate(None, real, "mtt", fusion="linear", width=4)
    with pytest.raises(ValueError, match="got 'sum'"): evaluate(s, real, "mtt", fusion="sum")
    with pytest.raises(ValueError, match="no rate of its own"):
        parameters = dict(FusionNet({}, {}, 10).named_parameters()) | {"fusion.head.weight": None}
        make_optimiser(parameters, get_recipe("mtt"))

def test_experiments_tell_learned_from_fixed(real):
    recipes = None, get_recipe("mtt"), dc_recipe()
    experiments = [Experiment(method(), recipe=recipe, fusion="linear") for recipe in recipes]
    default, learned, fixed = (settled(e, real) for e in experiments)
    assert default.evaluation() == learned.evaluation() != fixed.evaluation()
    assert default.evaluation()["recipe"]["rate"] is None and fixed.evaluation()["recipe"]["rate"] == .01
    both = load_data("digits_av")
    assert settled(Experiment(get_method("dm")), both).evaluation()["recipe"]["name"] == "avdd"

def test_snapshots_carry_their_rates(real, tmp_path):
    "A set on its way is what a shorter run gives, learned rate and all"
    e = Experiment(method(), seed=1, fusion="linear")
    compute = dict(compute=EXACT)
    kept = distillation_run(e, real, tmp_path / "runs", tmp_path / "store", compute, progress=False, snapshots=(2,))
    on_the_way = DistilledData.load(snapshot_path(kept.folder, 2))
    short = run(real, tmp_path / "store", method(iterations=2))
    assert on_the_way.card["rates"] == short.card["rates"] != kept.distilled.card["rates"]
    assert torch.equal(on_the_way.tensors["image"], short.tensors["image"])


def test_unusable_rates_are_named(real, store, tmp_path):
    context = Context(real, 1, tuple(range(10)), EXACT, store)
    method().prepare(context)
    S, state = method().start(context)
    with pytest.raises(Diverged, match="learned rate of the image became -0.001; it must lie between 0 and 10"):
        method().after(context, S | {"rate/image": torch.tensor(-1e-3)}, state, 0)
    with pytest.raises(Diverged, match="must lie between 0 and 0.05.* at iteration 0; the state before it is kept"):
        run(real, store, method(largest_alpha=.05, lr_rate=1e4), folder=tmp_path / "run")
    assert list((tmp_path / "run").glob("checkpoint-*"))

@pytest.mark.parametrize("change, message", [
    (dict(steps=0), "steps must be at least 1"),
    (dict(batch=-1), "batch must be at least 0"),
    (dict(lr=0.), "lr must be positive"),
    (dict(lr_rate=-1.), "lr_rate must be at least 0, got -1.0"),
    (dict(alpha=-.1), "alpha must lie between 0 and largest_alpha 10.0, got -0.1"),
    (dict(largest_alpha=.01), "alpha must lie between 0 and largest_alpha 0.01, got 0.05"),
    (dict(alpha_audio=0.), "alpha_audio must be positive"),
    (dict(momentum=1.), r"momentum must lie in \[0, 1\)"),
    (dict(expert_rate=0.), "expert_rate must be positive"),
    (dict(expert_batch=0), "expert_batch must be at least 1"),
    (dict(max_start=3), "use max_start up to 2"),
    (dict(experts=0), "experts must be at least 1"),
    (dict(start_from="herdding"), "nearest is 'herding'"),
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
    # inverting gives the pictures it began with
    for x in start: assert (pixels - x).abs().amax((1, 2, 3)).min() < 1e-3
