"""DD: gradients against the plain graph in float64, bounded memory, resuming bit for bit, its own evaluation, refusals."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddrepro.core.compute import EXACT
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.formation import decode, encode
from ddrepro.distill.distilled import SOFT, DistilledData
from ddrepro.distill.loop import distill
from ddrepro.distill.method import AdamRule, Context, Diverged
from ddrepro.distill.unroll import unroll
from ddrepro.evaluate.classification import with_targets
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.evaluate.runs import snapshot_path
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.methods.dd import raw_rate, real_rows
from ddrepro.nets.learned_steps import first_net, rows_of_step, train_by_steps, with_learned_steps
from ddrepro.nets.networks import spec_for
from ddrepro.nets.recipes import get_recipe
from ddrepro.nets.vectors import flatten
from helpers import few_digits, one_process, one_thread, squares

DOUBLE = replace(EXACT, precision="float64")


@pytest.fixture(scope="module")
def real(): return few_digits(20)


def prepared(method, real, compute=DOUBLE, seed=3):
    context = Context(real, seed, tuple(range(10)), compute)
    method.prepare(context)
    S = {name: x.to(compute.dtype).requires_grad_() for name, x in method.start(context)[0].items()}
    return context, S


def plain_loss(method, context, S, t):
    "The equation of the paper with everything kept, for one network on images"
    real, source = context.real, context.source["image"]
    theta = dict(method.first(context, "image", source.shape, t, 0).to(S["image"].dtype).named_parameters())
    run = lambda theta, x: torch.func.functional_call(source.net, theta, ({"image": x},))["image"]
    order = method.order_on(real)
    for step in range(method.steps):
        k = step % method.batches
        mine = slice(k * method.per_step, (k + 1) * method.per_step)
        x = [decode(canvases, method.factor, order) for canvases in S["image"][:, mine]]
        if SOFT in S: labels = [S[SOFT][c, mine].softmax(-1).repeat(method.factor**2, 1) for c in range(10)]
        else: labels = [F.one_hot(torch.tensor([c] * len(x[c])), 10).to(x[c].dtype) for c in range(10)]
        ce = -(torch.cat(labels) * run(theta, torch.cat(x)).log_softmax(1)).sum(1).mean()
        g = torch.autograd.grad(ce, list(theta.values()), create_graph=True)
        rate = F.softplus(S["steps/image"][step])
        theta = {name: p - rate * x for (name, p), x in zip(theta.items(), g)}
    rows = real_rows(len(real.train), method.batch, context.seed, t)
    return F.cross_entropy(run(theta, real.batch("train", rows)["image"].to(S["image"].dtype)), real.train.labels[rows])


@pytest.mark.parametrize("more", [
    dict(), dict(labels="learned"), dict(factor=2), dict(per_step=2, epochs=3), dict(graphs=0), dict(graphs=4), dict(initialisation="fixed"),
    dict(start_from="random", gain=.7)], ids=str)
def test_gradient_is_that_of_the_plain_graph(real, more):
    method = get_method("dd", **dict(ipc=2, epochs=2, width=4, batch=30, iterations=5, alpha=.3) | more)
    context, S = prepared(method, real)
    for t in (0, 4):
        ours, plain = method.loss(context, S, {}, t), plain_loss(method, context, S, t)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
        for name, a, b in zip(S, torch.autograd.grad(ours, list(S.values())), torch.autograd.grad(plain, list(S.values()))):
            assert b.norm() > 1e-6, name
            assert (a - b).norm() <= 1e-10 * b.norm(), (name, t)


def test_several_networks_are_averaged(real):
    one = get_method("dd", ipc=1, epochs=2, width=4, batch=20, iterations=1, alpha=.3)
    context, S = prepared(one.replace(nets=3), real)
    alone = [one.outcome(context, S, "image", 0, i) for i in range(3)]
    assert one.replace(nets=3).loss(context, S, {}, 0).item() == pytest.approx(sum(x.item() for x in alone) / 3, rel=1e-12)
    assert len({x.item() for x in alone}) == 3


def test_two_steps_on_a_line_by_hand():
    "θ ← θ − η (θ − s), loss ½(θ₂ − r)²: derivatives written out, rates as softplus of raw values"
    theta, s = torch.tensor([1.5], dtype=torch.float64), torch.tensor([.2, -.7], dtype=torch.float64, requires_grad=True)
    raw = torch.tensor([raw_rate(.3), raw_rate(.6)], dtype=torch.float64, requires_grad=True)
    step_loss = lambda vectors, inputs, t: F.softplus(inputs["rates"][t]) * .5 * (vectors["w"] - inputs["s"][t]).square().sum()
    arrived = unroll(step_loss, {"w": theta}, {"w": torch.ones((), dtype=torch.float64)}, {"s": s, "rates": raw}, 2)["w"]
    r = .4
    first = 1.5 - .3 * (1.5 - .2)
    second = first - .6 * (first + .7)
    assert arrived.item() == pytest.approx(second, abs=1e-14)
    of_s, of_raw = torch.autograd.grad(.5 * (arrived - r).square().sum(), (s, raw))
    away = second - r
    assert of_s.tolist() == pytest.approx([away * .4 * .3, away * .6], abs=1e-13)
    by_rate = [-away * .4 * (1.5 - .2), -away * (first + .7)]
    slope = torch.sigmoid(raw).tolist()                              # of softplus
    assert of_raw.tolist() == pytest.approx([a * b for a, b in zip(by_rate, slope)], abs=1e-13)


class Kept:
    "A tensor that autograd saves, counted while it lives"
    alive = peak = 0

    def __init__(self, x):
        self.x, self.size = x, x.nbytes
        Kept.alive += self.size
        Kept.peak = max(Kept.peak, Kept.alive)

    def __del__(self): Kept.alive -= self.size


def saved_at_most(method, real) -> int:
    "Bytes that autograd holds at once in one iteration"
    context, S = prepared(method, real)
    Kept.alive = Kept.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        torch.autograd.grad(method.loss(context, S, {}, 0), list(S.values()))
    return Kept.peak


def test_memory_does_not_grow_with_the_steps(real):
    few, many = (get_method("dd", ipc=1, epochs=n, width=4, batch=8, iterations=1, alpha=.1) for n in (2, 12))
    assert saved_at_most(many, real) < 1.1 * saved_at_most(few, real)
    assert saved_at_most(many.replace(graphs=12), real) > 3 * saved_at_most(few, real)      # what it would be with all graphs kept


def test_parameters_may_lie_on_disk(real, tmp_path):
    method = get_method("dd", ipc=2, epochs=2, width=4, batch=20, iterations=2, alpha=.2)
    curves = [distill(m, real, compute=DOUBLE, progress=False).curve for m in (method, method.replace(spill=str(tmp_path / "spill")))]
    assert curves[0] == curves[1]
    assert method.replace(spill="elsewhere").spec() == method.spec()


class Stopped(RuntimeError): "Raised on the way"


def stop_at(when):
    def look(t, loss, S):
        if t == when: raise Stopped
    return look


@pytest.mark.parametrize("labels", ["fixed", "learned"])
def test_resumes_bit_for_bit(real, tmp_path, labels):
    method = get_method("dd", ipc=2, epochs=2, width=4, batch=24, iterations=7, alpha=.2, halvings=3, labels=labels)
    settings = dict(compute=EXACT, progress=False, checkpoint_every=0.)
    with one_thread():
        whole = distill(method, real, 1, **settings)
        for when in (0, 3, 5):
            folder = tmp_path / f"{labels}{when}"
            with pytest.raises(Stopped): distill(method, real, 1, folder=folder, on_iteration=stop_at(when), **settings)
            resumed = distill(method, real, 1, folder=folder, **settings)
            assert resumed.curve == whole.curve
            assert torch.equal(resumed.tensors["image"], whole.tensors["image"])
            assert resumed.card["learned_steps"] == whole.card["learned_steps"]
            if labels == "learned": assert torch.equal(resumed.soft.probabilities, whole.soft.probabilities)


def test_adam_is_torchs_with_what_it_remembers_in_the_state():
    S = keyed_normal((3, 4), 0, "S").double()
    theirs = S.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=.1, betas=(.5, .999))
    rule = AdamRule(.1)
    v = rule.rest(S)
    for t in range(30):
        theirs.grad = torch.sin(theirs.detach() * (t + 1)) * 10.**(t % 5 - 3)
        g = torch.sin(S * (t + 1)) * 10.**(t % 5 - 3)
        adam.step()
        S, v = rule.at(t).step(S, v, g)
    assert (S - theirs.detach()).abs().max() < 1e-12
    assert v.shape == (2, 3, 4)


def learned(real, **more) -> DistilledData:
    method = get_method("dd", **dict(ipc=2, epochs=2, width=4, batch=24, iterations=2, alpha=.2) | more)
    return distill(method, real, 5, compute=DOUBLE, progress=False)


@pytest.mark.parametrize("more", [dict(), dict(initialisation="fixed"), dict(factor=2, labels="learned"), dict(per_step=2, epochs=3)], ids=str)
def test_evaluation_takes_the_steps_that_were_unrolled(real, more):
    "From one initialisation: the unrolled steps of the method and the training of the recipe arrive at the same parameters"
    s = learned(real, **more)
    method = get_method("dd", **dict(ipc=2, epochs=2, width=4, batch=24, iterations=2, alpha=.2) | more)
    recipe = with_learned_steps(get_recipe("dd"), s.card["learned_steps"], "linear")
    net = first_net(recipe, {"image": spec_of(method, real)}, real.shapes, 10, "linear", 5, 0).double()
    start = flatten(net)
    inputs, _ = s.decoded()
    assert train_by_steps(net, inputs, s.targets(), recipe, 10) == method.steps
    context, S = prepared(method, real, seed=5)
    raw = torch.tensor([raw_rate(rate) for rate in recipe.steps["image"]], dtype=torch.float64)
    S = {"image": s.tensors["image"], "steps/image": raw} | ({SOFT: s.soft.probabilities.log()} if s.soft else {})
    arrived = unroll(method.step_loss(context, "image"), {"image": start}, {"image": start.new_ones(())}, S, method.steps)["image"]
    assert (flatten(net) - arrived).abs().max() < 1e-12
    if method.initialisation == "fixed":            # and it is the very network that was distilled for
        assert torch.equal(start, flatten(method.first(context, "image", real.shapes["image"], 1, 0)).double())


def spec_of(method, real):
    return spec_for(real.shapes["image"], method.width, method.net)


def test_canvases_and_samples_of_a_step():
    "With factor 2 a step sees the four samples of its canvases, of each class, and no others"
    marked = torch.stack([torch.stack([encode(torch.full((4, 1, 8, 8), 10. * c + i), 2)[0] for i in range(3)]) for c in range(2)])
    samples = torch.cat([decode(x, 2) for x in marked]).mean((1, 2, 3))
    for step in range(4): assert samples[rows_of_step(step, 2, 12, 3, 1)].tolist() == pytest.approx([step % 3] * 4 + [10 + step % 3] * 4)


def test_rows_of_a_table(real, tmp_path):
    method = get_method("dd", ipc=2, epochs=2, width=4, batch=24, iterations=3, alpha=.2)
    own, early, common = [Experiment(method, eval_seeds=2), Experiment(method, eval_seeds=1, at=2),
                          Experiment(method, eval_seeds=1, recipe=replace(get_recipe("dc"), epochs=2))]
    with one_process(): rows = run_all([own, early, common], real, runs=tmp_path, progress=False)
    assert rows.run.nunique() == 1
    assert rows.groupby(["recipe", "at"]).steps.unique().map(list).to_dict() == {("dd", 3): [4], ("dd", 2): [4], ("dc", 3): [2]}
    at_two = DistilledData.load(snapshot_path(tmp_path / rows.run[0], 2)).card["learned_steps"]["rates"]["image"]
    last = DistilledData.load(tmp_path / rows.run[0] / "distilled").card["learned_steps"]["rates"]["image"]
    assert len(at_two) == len(last) == 4 and at_two != last


def test_learned_labels_learn(real):
    soft = learned(real, labels="learned", iterations=6).soft
    start = (4 * torch.eye(10, dtype=torch.float64)).softmax(-1)
    assert soft.source == "learned" and soft.probabilities.shape == (10, 2, 10)
    assert (soft.probabilities[:, 0] - start).abs().max() > 1e-3
    assert learned(real).soft is None


def test_hard_labels_of_a_set_with_learned_ones(real):
    s = learned(real, labels="learned")
    with one_process(): rows = [evaluate(s, real, seeds=1, device="cpu", targets=targets).accuracy[0] for targets in (None, "soft")]
    assert rows[0] == rows[1]
    assert torch.equal(with_targets(s, real, "hard").targets(), s.decoded()[1])


@pytest.mark.parametrize("wrong, words", [
    (dict(ipc=3, per_step=2), "ipc must be a multiple of per_step, the samples of a class in a step; got ipc=3 and per_step=2"),
    (dict(epochs=0), "epochs must be at least 1"), (dict(batch=0), "batch must be at least 1"),
    (dict(alpha=11.), "alpha must lie between 0 and largest_alpha 10.0, got 11.0"), (dict(alpha=-.1), "alpha must lie"),
    (dict(net="densenet121"), "densenet121 normalises by batches; choose another net"),
    (dict(net="lenet5"), "net must be one of"), (dict(initialisation="known"), "initialisation must be one of 'random', 'fixed'"),
    (dict(labels="hard"), "labels must be one of 'fixed', 'learned'"), (dict(gain=0.), "gain must be positive"),
    (dict(nets=2, initialisation="fixed"), "nets must be 1 with initialisation 'fixed'"), (dict(start_from="nois"), "the nearest is 'noise'"),
    (dict(ipc=21), "so ipc can be at most 20"),
])
def test_refused_before_anything_is_computed(real, wrong, words):
    with pytest.raises(ValueError, match=words): distill(get_method("dd", **dict(ipc=2, width=4) | wrong), real, progress=False)


def test_shards_and_pairs_are_refused(real):
    with pytest.raises(ValueError, match="dd is not class-separable"): distill(get_method("dd", width=4), real, classes=[0], progress=False)
    with pytest.raises(ValueError, match="dd is for classification"): distill(get_method("dd", width=4), squares())


def test_divergence_keeps_the_last_good_state(real, tmp_path):
    method = get_method("dd", ipc=1, epochs=2, width=4, batch=20, iterations=9, alpha=.2, lr=5., largest_alpha=.3, halvings=0)
    settings = dict(folder=tmp_path, progress=False, compute=EXACT)
    with pytest.raises(Diverged, match="learned rate of the image, step . became"): distill(method, real, **settings)
    assert list(tmp_path.glob("checkpoint-*"))


def test_nan_stops_the_run(real, tmp_path):
    method = get_method("dd", ipc=1, epochs=4, width=4, batch=20, iterations=3, alpha=9., lr=1e30, largest_alpha=1e35)
    with pytest.raises(Diverged, match="became"): distill(method, real, folder=tmp_path, progress=False, compute=EXACT)


def test_rates_start_at_alpha():
    for alpha in (.001, .02, 3.): assert np.log1p(np.exp(raw_rate(alpha))) == pytest.approx(alpha, rel=1e-9)
