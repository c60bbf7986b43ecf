"""What does not fit in one graph goes in pieces: students, trainings, networks trained together, at the same numbers."""

import pytest
import torch

from ddrepro.core.compute import Compute
from ddrepro.core.seeding import keyed_normal
from ddrepro.core.timing import forget_peak, peak_memory
from ddrepro.data import real as real_chapter
from ddrepro.data.registry import load_data
from ddrepro.distill.method import Context
from ddrepro.distill.unroll import MeanLoss, trajectory_loss, unroll
from ddrepro.methods import get_method
from ddrepro.methods.mtt import student_bytes
from ddrepro.nets import pieces
from ddrepro.nets.experts import Experts, expert_jobs, experts_side_by_side
from ddrepro.nets.networks import NetSpec, spec_for
from ddrepro.nets.recipes import Recipe, idc_recipe
from ddrepro.nets.training import network_groups, new_net, samples_at_once, train, train_together, training_loss
from ddrepro.nets.vectors import flatten, layout_of, run_flat
from helpers import one_thread

FLOAT64 = Compute(precision="float64", threads=0)
SMALL = dict(ipc=2, width=4, steps=3, span=1, max_start=2, experts=1, expert_epochs=2, expert_batch=64, iterations=1,
             alpha=.05)


@pytest.fixture(autouse=True)
def alone():
    with one_thread(): yield

@pytest.fixture
def nothing_fits(monkeypatch):
    "No graph fits, and a piece holds as little as can be"
    monkeypatch.setattr(pieces, "GRAPH_LIMIT", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 0)

def gradients(context, m):
    S = {k: x.double().requires_grad_() for k, x in m.start(context)[0].items()}
    loss = m.loss(context, S, {}, 0)
    return [loss.detach(), *torch.autograd.grad(loss, list(S.values()))]


@pytest.mark.parametrize("changes", [{}, dict(batch=7), dict(factor=2, strategy="")], ids=["all", "mini-batch", "factor"])
def test_a_student_in_pieces(tmp_path_factory, monkeypatch, changes):
    "MTT of both senses: loss, derivatives by samples and by rates, in pieces of one and of a few as at once"
    real, m = load_data("digits_av"), get_method("mtt", **SMALL | changes)
    context = Context(real, 1, tuple(range(10)), FLOAT64, tmp_path_factory.getbasetemp() / "experts")
    m.prepare(context)
    sizes = lambda: [m.student_loss(context, k, 0).most for k in real.modalities]
    whole = gradients(context, m)
    assert sizes() == [0, 0]
    monkeypatch.setattr(pieces, "GRAPH_LIMIT", 0)
    largest = max(2 * student_bytes(spec, real.shapes[k], 10) for k, spec in m.specs_on(real).items())
    for few in (1, 3):
        monkeypatch.setattr(pieces, "PIECE_BYTES", few * largest)
        assert min(sizes()) == few and max(sizes()) < 20
        for a, b in zip(whole, gradients(context, m)): assert (a - b).norm() <= 1e-12 * a.norm()

def test_only_what_is_learned_is_differentiated():
    "Samples that are not learned, and a loss whose gradient does not depend on the parameters"
    x, theta = keyed_normal((6, 3), 0, "x").double(), keyed_normal((3,), 0, "theta").double()
    rate = torch.tensor(.1, dtype=torch.float64, requires_grad=True)
    samples = lambda inputs, step: dict(x=inputs["x"])
    for mean in (lambda v, s: (s["x"] @ v["t"]).square().mean(), lambda v, s: (s["x"] @ v["t"]).mean()):
        found = []
        for most in (0, 4):
            last = unroll(MeanLoss(samples, mean, most), {"t": theta}, {"t": rate}, {"x": x}, 2)
            found.append(torch.autograd.grad(trajectory_loss(last["t"], theta, theta + 1), rate)[0])
        assert torch.allclose(*found, rtol=1e-12)

def test_a_student_keeps_no_more_for_more_steps():
    "Peak memory of a step in pieces does not grow with the steps, and stays far below that of one graph"
    shape, n = (3, 96, 96), 16
    net = new_net({"image": spec_for(shape, 16)}, {"image": shape}, 4, "linear", 0)
    layout, labels = layout_of(net), torch.arange(n) % 4
    x, rate = keyed_normal((n, *shape), 0, "x").requires_grad_(), torch.tensor(.01, requires_grad=True)
    def peak(steps, most):
        loss = MeanLoss(lambda inputs, step: dict(x=inputs["x"], labels=labels),
                        lambda v, s: training_loss(run_flat(net, layout, v["n"], {"image": s["x"]}), s["labels"]), most)
        kept = pieces.kept_bytes(lambda: loss.mean({"n": flatten(net).requires_grad_()}, dict(x=x[:most or n], labels=labels[:most or n])))
        forget_peak()
        before = peak_memory()
        last = unroll(loss, {"n": flatten(net)}, {"n": rate}, {"x": x}, steps, graphs=0)["n"]
        torch.autograd.grad(trajectory_loss(last, flatten(net), flatten(net) + .01), [x, rate])
        return peak_memory() - before, kept / 2**20
    peak(1, 2)
    (few, kept), (many, _), (whole, kept_whole) = peak(1, 2), peak(5, 2), peak(1, 0)
    assert kept_whole > 4 * kept
    assert many < few + 10 and many < .6 * whole, (few, many, whole)


def trained(recipe, together):
    net = lambda k: new_net({"image": NetSpec(2, 4)}, {"image": (1, 16, 16)}, 3, "linear", k).double()
    nets, inputs, labels = [net(k) for k in range(3)], {"image": keyed_normal((11, 1, 16, 16), 0, "t").double()}, torch.arange(11) % 3
    losses = []
    if together: train_together(nets, inputs, labels, recipe, "color_crop", [(k, "test") for k in range(3)])
    else:
        for k, one in enumerate(nets):
            train(one, inputs, labels, recipe, "color_crop", k, "test", after_epoch=lambda e, loss: losses.append(loss))
    return [flatten(one) for one in nets], losses

@pytest.mark.parametrize("recipe", [Recipe("plain", 2, 8, "sgd", rate=.1), idc_recipe(2, batch=8, cutmix=1.)], ids=["plain", "cutmix"])
def test_a_training_in_pieces(nothing_fits, monkeypatch, recipe):
    "Alone and together, in as many pieces and groups as there can be: the weights of the training at once"
    assert samples_at_once(new_net({"image": NetSpec(2, 4)}, {"image": (1, 16, 16)}, 3, "linear", 0),
                           {"image": torch.zeros(8, 1, 16, 16)}, 8) == 1
    cut, cut_losses = trained(recipe, together=False)
    monkeypatch.setattr("ddrepro.nets.training.TOGETHER_BYTES", 0)
    assert len(network_groups(3, 1)) == 3
    grouped, _ = trained(recipe, together=True)
    monkeypatch.undo()
    whole, losses = trained(recipe, together=False)
    assert cut_losses == pytest.approx(losses, rel=1e-12)
    for a, b, c in zip(whole, cut, grouped):
        assert (a - b).norm() <= 1e-12 * a.norm() and (a - c).norm() <= 1e-12 * a.norm()

def test_networks_over_a_batch_are_not_cut(nothing_fits):
    net = new_net({"image": NetSpec(2, 4, "batch")}, {"image": (1, 16, 16)}, 3, "linear", 0)
    before = {k: x.clone() for k, x in net.state_dict().items()}
    assert samples_at_once(net, {"image": torch.zeros(8, 1, 16, 16)}, 8) == 8
    assert all(torch.equal(x, before[k]) for k, x in net.state_dict().items())


def test_frames_are_normalised_as_they_are_read(monkeypatch):
    real = load_data("digits_av")
    whole = real.normalised("train")
    monkeypatch.setattr(real_chapter, "AT_ONCE_BYTES", 0)
    read = real.normalised("train")
    rows = torch.tensor([5, 2, 900])
    for m in real.modalities:
        assert isinstance(whole[m], torch.Tensor) and not isinstance(read[m], torch.Tensor)
        assert torch.equal(read[m][rows], whole[m][rows]) and torch.equal(read[m][3:9], whole[m][3:9])
        assert (read[m].shape, read[m].nbytes, len(read[m])) == (whole[m].shape, whole[m].nbytes, len(whole[m]))

def test_experts_of_frames_read_piece_by_piece(tmp_path, monkeypatch):
    "The bits of experts whose samples were normalised beforehand; and no more of them at once than fit"
    real = load_data("digits_av").restrict(["image"])
    options = dict(specs={"image": NetSpec(2, 4)}, models=2, epochs=1, recipe=Recipe("quick", 1, 256, "sgd", rate=.01, momentum=0.))
    before = Experts(real, root=tmp_path / "a", **options).open(progress=False)
    monkeypatch.setattr(real_chapter, "AT_ONCE_BYTES", 0)
    after = Experts(real, root=tmp_path / "b", **options).open(progress=False)
    for i in (0, 1): assert torch.equal(before.load(i, 1), after.load(i, 1))
    jobs = expert_jobs(after, list(range(8)))
    monkeypatch.setenv("DDREPRO_WORKERS", "8")
    assert len(experts_side_by_side(jobs)) == 8
    monkeypatch.setattr("ddrepro.nets.experts.TOGETHER_BYTES", 0)
    assert len(experts_side_by_side(jobs)) == 1
