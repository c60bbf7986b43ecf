"""Gradient matching: the code's loop in plain autograd, kills and resuming, batch normalisation, refusals, other networks."""
import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddrepro.core.compute import Compute
from ddrepro.core.seeding import keyed_choice, keyed_normal
from ddrepro.data.augment import apply_dsa, augment
from ddrepro.data.formation import decode
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import DIGITS, Part, RealData
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.gradients import gradient_distance
from ddrepro.distill.loop import distill
from ddrepro.distill.method import Context, Diverged
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.nets.networks import NETS
from ddrepro.nets.recipes import Recipe, get_recipe
from ddrepro.nets.training import train
from helpers import one_thread, run_script

DOUBLE = Compute(precision="float64")
SMALL = dict(ipc=2, width=4, batch=12, iterations=6, outer=3, inner=2, net_lr=.2, net_batch=8)

RUN = '''
import json, sys
from ddrepro.distill.loop import distill
from ddrepro.core.compute import EXACT
from ddrepro.methods import get_method
from ddrepro.data.registry import load_data
from helpers import die_at

job = json.loads(sys.argv[1])
die_at(job["kill_at"], "written")
method = get_method(job["name"], **job["settings"])
s = distill(method, load_data("digits"), seed=1, compute=EXACT, checkpoint_every=0., folder=job["root"] + "/run",
            progress=False)
s.save(job["root"] + "/set")
'''


@pytest.fixture(autouse=True)
def on_one_thread():
    with one_thread(): yield


def pictures(channels=1, side=16, classes=3, per_class=20, seed=0):
    "Random pictures of a few classes"
    labels = torch.arange(classes).repeat_interleave(per_class)
    x = keyed_normal((len(labels), channels, side, side), seed, "pictures") + labels.view(-1, 1, 1, 1) / 2
    part, plain = Part({"image": x}, labels), Normalisation((0.,) * channels, (1.,) * channels)
    few = part.select(range(0, len(labels), 7))
    return RealData("made up", tuple("abc"[:classes]), part, few, few, {"image": plain}, DIGITS)


# The code's loop

def plain_loss(net, x, c): return F.cross_entropy(net({"image": x})["image"], torch.full((len(x),), c))


def plain_distance(real, synthetic, metric):
    "Rows of weights by their cosine; or all gradients as one vector"
    if metric != "layerwise":
        a, b = (torch.cat([g.reshape(-1) for g in gradients]) for gradients in (real, synthetic))
        if metric == "mse": return ((a - b) ** 2).sum()
        return 1 - a @ b / (a.norm() * b.norm() + 1e-6)
    total = 0.
    for a, b in zip(real, synthetic):
        if a.dim() == 1: continue
        for p, q in zip(a.reshape(len(a), -1), b.reshape(len(b), -1)): total = total + 1 - p @ q / (p.norm() * q.norm() + 1e-6)
    return total


def hold(net, method, context, t):
    "What batch normalisation is given before an outer step"
    if not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()): return
    net.train()
    with torch.no_grad(): net(method.for_statistics(context, t))
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()


def plain_run(method, real, seed):
    "The code's loop: networks, outer steps, classes; S moves by torch's SGD"
    context = Context(real, seed, tuple(range(len(real.classes))), DOUBLE)
    method.prepare(context)
    outer, inner = method.loops
    S = method.start(context)[0]["image"].double().requires_grad_()
    optimiser, curve = torch.optim.SGD([S], lr=method.lr, momentum=method.momentum), []
    labels = torch.arange(len(real.classes)).repeat_interleave(method.ipc)
    recipe = Recipe("plain", inner, method.net_batch, "sgd", rate=method.net_lr, momentum=0., augment=bool(method.strategy_on(real)))
    t = 0
    while t < method.iterations:
        net = context.source.fresh(t // outer).train()
        for step in range(outer):
            hold(net, method, context, t)
            loss, parameters = 0., list(net.parameters())
            for c in range(len(real.classes)):
                omega = context.sampler.omega(t, c)
                rows = context.sampler.real_indices(real.train.by_class[c], t, c)
                x = real.batch("train", rows)["image"].double()
                of_real = torch.autograd.grad(plain_loss(net, apply_dsa(x, omega), c), parameters)
                s = plain_loss(net, apply_dsa(S[c], omega), c)
                of_synthetic = torch.autograd.grad(s, parameters, create_graph=True)
                loss = loss + plain_distance(of_real, of_synthetic, method.metric)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
            if step < outer - 1:
                train(net, {"image": S.detach().flatten(0, 1)}, labels, recipe, method.strategy_on(real), seed, "gradients/inner", t)
            t += 1
    return S.detach(), curve


@pytest.mark.parametrize("name, changes", [
    ("dc", {}), ("dsa", {}), ("dc", dict(metric="mse", lr=1e-4)), ("dc", dict(metric="cos")), ("dsa", dict(net="convnet:norm=batch")),
    ("dc", dict(net="mlp")), ("dc", dict(net="convnet:act=sigmoid,pooling=max,depth=2")), ("dc", dict(net="resnet10:width=2")),
])
def test_the_loop_of_the_code_in_float64(name, changes):
    real = pictures()
    method = get_method(name, **SMALL | dict(batch=5) | changes)
    S, curve = plain_run(method, real, 4)
    ours = distill(method, real, seed=4, compute=DOUBLE, progress=False)
    assert curve[0] > 0
    torch.testing.assert_close(torch.tensor(ours.curve), torch.tensor(curve), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours.tensors["image"].double(), S, rtol=1e-7, atol=1e-8)


def test_a_batch_normed_network_holds_the_statistics_of_real_samples():
    real = pictures()
    method = get_method("dc", **SMALL | dict(net="convnet:norm=batch", ipc=1))
    context = Context(real, 0, (0, 1, 2), DOUBLE)
    method.prepare(context)
    S, state = method.start(context)
    net = context.source.fresh(0)
    x = method.for_statistics(context, 0)["image"]
    assert len(x) == 3 * 16
    expected = net.branches["image"].blocks[0][0](x).mean((0, 2, 3)) / 10
    torch.testing.assert_close(state["net/branches.image.blocks.0.1.running_mean"], expected)
    before = {k: x.clone() for k, x in state.items()}
    method.loss(context, {m: x.double().requires_grad_() for m, x in S.items()}, state, 0)
    assert all(torch.equal(state[k], x) for k, x in before.items())               # matching moves no statistics
    assert not torch.equal(method.for_statistics(context, 1)["image"], x)


def test_the_synthetic_gradient_in_pieces_is_that_in_one():
    real = pictures()
    method = get_method("dsa", **SMALL | dict(ipc=5, factor=2, iterations=2, outer=2, inner=1))
    one, pieces = (distill(method, real, compute=replace(DOUBLE, chunk=n), progress=False) for n in (64, 5))
    torch.testing.assert_close(one.tensors["image"], pieces.tensors["image"], rtol=1e-9, atol=1e-10)


def test_distance_of_tensors_of_any_shape():
    shapes = [(4, 3, 3, 3), (4,), (2, 5), (3, 2, 2)]
    real, synthetic = ([keyed_normal(s, i, "shapes", k) for k, s in enumerate(shapes)] for i in (0, 1))
    real[0][1] = 0.                                                                # a row without a gradient
    for metric in ("layerwise", "mse", "cos"):
        ours, theirs = gradient_distance(real, synthetic, metric), plain_distance(real, synthetic, metric)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


# Killed and resumed

def child(root, name, kill_at=None, **settings):
    root.mkdir(exist_ok=True)
    job = dict(root=str(root), name=name, kill_at=kill_at, settings=SMALL | settings)
    return run_script(RUN, json.dumps(job))


@pytest.mark.parametrize("name, kill_at, settings", [("dc", 2, {}), ("dsa", 4, dict(net="convnet:norm=batch"))])
def test_killed_within_a_network_it_goes_on_bit_for_bit(tmp_path, name, kill_at, settings):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = child(whole, name, **settings)
    assert done.returncode == 0, done.stderr
    assert child(killed, name, kill_at, **settings).returncode == -signal.SIGKILL
    again = child(killed, name, **settings)
    assert again.returncode == 0, again.stderr
    expected, resumed = (DistilledData.load(root / "set") for root in (whole, killed))
    assert torch.equal(resumed.tensors["image"], expected.tensors["image"])
    assert resumed.curve == expected.curve


class Stopped(Exception): pass


IDC = dict(ipc=2, width=4, batch=6, iterations=6, outer=3, net_data=20, net_batch=8, most_synthetic=5, lr=.1)


@pytest.mark.parametrize("name, stop_at", [*(("dsa", t) for t in range(1, 6)), ("idc", 1), ("idc", 4)])
def test_stopped_at_any_iteration_it_goes_on_bit_for_bit(tmp_path, name, stop_at):
    real, method = pictures(), get_method(name, **IDC if name == "idc" else SMALL)
    whole = distill(method, real, compute=Compute(), progress=False)
    def stop(t, loss, S):
        if t == stop_at: raise Stopped
    settings = dict(compute=Compute(), folder=tmp_path, checkpoint_every=0., progress=False)
    with pytest.raises(Stopped): distill(method, real, on_iteration=stop, **settings)
    again = distill(method, real, **settings)
    assert torch.equal(again.tensors["image"], whole.tensors["image"])
    assert again.curve == whole.curve


def test_idc_learns_from_real_samples_by_sgd_with_momentum():
    real = pictures()
    method = get_method("idc", **IDC | dict(strategy="", net_cutmix=0.))
    context = Context(real, 0, (0, 1, 2), DOUBLE)
    method.prepare(context)
    S, state = method.start(context)
    net = context.source.fresh(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=method.net_lr, momentum=.9, weight_decay=5e-4)
    for t in range(2):
        rows = torch.from_numpy(keyed_choice(len(real.train), 20, 0, "idc/real", t, 0))
        for chosen in rows.split(8):
            loss = F.cross_entropy(net({"image": real.batch("train", chosen)["image"].double()})["image"], real.train.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        state = method.after(context, S, state, t)
    for k, p in net.named_parameters():
        torch.testing.assert_close(state[f"net/{k}"], p.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state[f"momentum/{k}"], optimiser.state[p]["momentum_buffer"], rtol=1e-9, atol=1e-12)


def test_idc_matches_convolutions_of_decoded_pixels():
    real = pictures()
    method = get_method("idc", **IDC | dict(most_synthetic=100, strategy="color"))
    context = Context(real, 0, (0, 1, 2), DOUBLE)
    method.prepare(context)
    S, state = method.start(context)
    S = {m: x.double().requires_grad_() for m, x in S.items()}
    value = method.loss(context, S, state, 0)
    net, expected = context.source.fresh(0), 0.
    kernels = [p for p in net.parameters() if p.dim() == 4]
    for c in range(3):
        omega = context.sampler.omega(0, c)
        rows = context.sampler.real_indices(real.train.by_class[c], 0, c)
        x = augment(real.batch("train", rows)["image"].double(), omega)
        s = augment(real.normalisation["image"](decode(S["image"][c], 2, "rows")), omega)
        assert len(s) == 8
        of_real = torch.autograd.grad(plain_loss(net, x, c), kernels)
        of_synthetic = torch.autograd.grad(plain_loss(net, s, c), kernels, create_graph=True)
        expected = expected + sum(((a - b) ** 2).sum() for a, b in zip(of_real, of_synthetic))
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    ours, theirs = torch.autograd.grad(value, S["image"])[0], torch.autograd.grad(expected, S["image"])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_a_network_that_breaks_stops_the_run_with_the_state_before_it(tmp_path):
    method = get_method("dc", **SMALL | dict(net_lr=1e30))
    with pytest.raises(Diverged, match="inner training at iteration 0; the state before it is kept"):
        distill(method, pictures(), compute=Compute(), folder=tmp_path, progress=False)
    assert [f.name for f in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000000.safetensors"]


def test_nan_in_a_second_derivative_stops_the_run(tmp_path):
    real = pictures()
    method = get_method("dc", **SMALL | dict(lr=1e38))
    with pytest.raises(Diverged, match="became"):
        distill(method, real, compute=Compute(), folder=tmp_path, progress=False)
    assert list(tmp_path.glob("checkpoint-*"))


# Before compute

@pytest.mark.parametrize("changes, words", [
    (dict(outer=0), "outer must be at least 1"), (dict(inner=-1), "inner must be at least 1"),
    (dict(metric="l2"), "metric"), (dict(net="vgg11"), "at least 28 pixels"), (dict(net="lenet:norm=batch"), "lenet has norm none"),
    (dict(net="densenet"), "densenet121"), (dict(net_lr=float("nan")), "net_lr"), (dict(batch=-1), "batch"),
    (dict(strategy="colour"), "color"), (dict(ipc=21), "ipc can be at most 20"), (dict(net_batch=0), "net_batch"),
])
def test_what_cannot_work_is_refused(changes, words):
    method = get_method("dc", **SMALL | changes)
    with pytest.raises(ValueError, match=words): distill(method, pictures(side=16), compute=Compute(), progress=False)


def test_precision_and_compiling_that_it_does_not_have():
    method = get_method("dc", **SMALL)
    with pytest.raises(ValueError, match="bfloat16"): distill(method, pictures(), precision="bfloat16", device="cpu")
    with pytest.raises(ValueError, match="compile"): distill(method, pictures(), compile=True, device="cpu")


# Other networks, sets of any size

@pytest.mark.parametrize("net", NETS)
def test_every_network_can_be_distilled_with_and_scored_by(net):
    real = pictures(channels=3, side=32, per_class=6)
    narrow = f"{net}:width=2"
    method = get_method("dc", ipc=1, iterations=2, outer=2, inner=1, batch=4, net=narrow)
    s = distill(method, real, compute=Compute(), progress=False)
    assert torch.isfinite(s.tensors["image"]).all() and s.curve[0] > 0
    start = distill(method.replace(iterations=0), real, compute=Compute())
    assert not torch.equal(s.tensors["image"], start.tensors["image"])
    rows = evaluate(s, real, replace(get_recipe("dc_plain"), epochs=1), seeds=1, net=narrow)
    assert len(rows) == 1


@pytest.mark.parametrize("ipc, factor", [(1, 1), (3, 1), (1, 2), (10, 1), (12, 1)])
def test_shapes(ipc, factor):
    method = get_method("dsa", ipc=ipc, factor=factor, width=2, batch=3, iterations=1)
    s = distill(method, pictures(per_class=40), compute=Compute(), progress=False)
    assert s.tensors["image"].shape == (3, ipc, 1, 16, 16)


def test_sounds_with_pictures():
    real = load_data("digits_av")
    method = get_method("dc", ipc=1, width=2, batch=4, iterations=2, outer=2, inner=1)
    s = distill(method, real, compute=Compute(), progress=False)
    assert {m: x.shape[:2] for m, x in s.tensors.items()} == {m: (10, 1) for m in real.modalities}


def test_classes_of_unlike_sizes():
    whole = pictures()
    rows = [i for i, c in enumerate(whole.train.labels.tolist()) if c != 1 or i % 4 == 0]
    real = replace(whole, train=whole.train.select(rows))
    method = get_method("dsa", **SMALL | dict(batch=8))
    apart, together = [], []
    context = Context(real, 0, (0, 1, 2), DOUBLE)
    method.prepare(context)
    S, state = method.start(context)
    S = {m: x.double() for m, x in S.items()}
    apart = method.matched_classes(context, S, state, 0, together=False)
    together = method.matched_classes(context, S, state, 0, together=True)
    assert (len(apart), len(together)) == (3, 3)                                   # 8, 5 and 8 real samples: neighbours differ
    falls = [torch.cat([x.gradients[0] for x in found]) for found in (apart, together)]
    torch.testing.assert_close(*falls, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("recipe", ["dc_plain", "dc_digits"])
def test_their_sets_are_scored_by_their_own_recipe(recipe):
    real = load_data("digits") if recipe == "dc_digits" else pictures(channels=3)
    method = get_method("dc", ipc=1, width=2, batch=4, iterations=0)
    s = distill(method, real, compute=Compute())
    assert s.card["recipe"]["name"] == recipe
    rows = evaluate(s, real, replace(get_recipe(recipe), epochs=2), seeds=1)
    assert 0 <= rows.accuracy[0] <= 100
