"""Networks of other kinds to distil with: values against a plain loop, refusals, shards."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddrepro.core.compute import EXACT
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.augment import augment
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import Part, RealData
from ddrepro.distill.loop import distill, start_state
from ddrepro.distill.method import Context
from ddrepro.methods import get_method

NETS = ("convnet:norm=batch", "convnet:act=leakyrelu,pooling=max,depth=2", "convnet:norm=group", "mlp", "lenet", "resnet18:norm=instance",
        "resnet10", "alexnet", "vgg11")

@pytest.fixture(scope="module")
def real():
    labels = torch.arange(3).repeat_interleave(12)
    whole = Part({"image": keyed_normal((36, 3, 32, 32), 0, "matching_nets")}, labels)
    plain = {"image": Normalisation((0.,) * 3, (1.,) * 3)}
    return RealData("noise", ("a", "b", "c"), whole, whole, whole, plain, "color_crop")

def method(name="dm", net="convnet", **settings):
    return get_method(name, ipc=2, width=4, batch=8, iterations=1, net=net, **settings)

@pytest.mark.parametrize("net", NETS)
def test_mean_matching_gives_what_a_plain_loop_gives(real, net):
    dm = method(net=net)
    context = Context(real, 0, (0, 1, 2), EXACT)
    dm.prepare(context)
    S = start_state(dm, context)["S/image"].requires_grad_()
    loss = dm.loss(context, {"image": S}, {}, 0)

    seen, sampler = context.source.at(0, "image"), context.sampler
    rows = [sampler.real_indices(real.train.by_class[c], 0, c) for c in range(3)]
    pairs = [(real.train.inputs["image"][own], S[c], sampler.omega(0, c)) for c, own in enumerate(rows)]
    sides = [torch.cat([augment(pair[k], pair[2]) for pair in pairs]) for k in (0, 1)]       # all classes in one forward
    x, s = (seen(side).unflatten(0, (3, -1)).mean(1) for side in sides)
    expected = (x.detach() - s).square().sum()
    assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, S)[0] for value in (loss, expected))
    assert_close(ours, theirs, rtol=1e-3, atol=1e-6)

def test_batch_norm_sees_all_classes(real):
    "Not what class by class would give"
    dm = method(net="convnet:norm=batch")
    context = Context(real, 0, (0, 1, 2), EXACT)
    dm.prepare(context)
    together = context.means.at(0, (0, 1, 2), "image")
    assert (together[:1] - context.means.at(0, (0,), "image")).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not class-separable"): distill(dm, real, classes=[0], compute=EXACT, progress=False)
    alone = distill(method(net="convnet:norm=instance"), real, classes=[0], compute=EXACT, progress=False)
    assert alone.labels == (0,)

def test_trajectories(real, tmp_path):
    small = dict(ipc=1, width=4, iterations=1, steps=2, span=1, max_start=1, experts=1, expert_epochs=2, lr=1., lr_rate=1e-8)
    with pytest.raises(ValueError, match="cannot follow the running statistics"):
        get_method("mtt", net="resnet18:norm=batch", **small).check(real)
    made = distill(get_method("mtt", net="mlp", **small), real, store=tmp_path, compute=EXACT, progress=False)
    assert torch.isfinite(made.tensors["image"]).all() and made.card["method"]["net"] == "mlp"

@pytest.mark.parametrize("name, settings", [("dm", {}), ("dsdm", dict(factor=2, models=2, pool_epochs=1)), ("dsdm", dict(source="random"))])
@pytest.mark.parametrize("net", ["convnet:norm=batch", "mlp", "lenet"])
def test_whole_runs(real, name, settings, net):
    made = distill(method(name, net, **settings), real, compute=EXACT, progress=False)
    assert torch.isfinite(made.tensors["image"]).all() and np.isfinite(made.curve).all()
    assert made.card["method"]["net"] == net

@pytest.mark.parametrize("name, settings", [("cafe", dict(probe=4, inner_cap=1)), ("idm", dict(factor=2)), ("m3d", {}), ("dc", dict(inner=1, outer=1)),
                                            ("dsa", dict(inner=1, outer=1)), ("dd", dict(width=4))])
def test_the_baselines_take_other_networks_too(real, name, settings):
    net = "convnet:act=leakyrelu,depth=2" if name == "cafe" else "mlp"
    made = distill(get_method(name, ipc=2, iterations=1, net=net, **dict(width=4) | settings), real, compute=EXACT, progress=False)
    assert torch.isfinite(made.tensors["image"]).all() and made.card["method"]["net"] == net

@pytest.mark.parametrize("name, settings", [("dm", {}), ("dsdm", dict(source="random")), ("m3d", {}), ("m3d", dict(net_updates=3))])
def test_they_are_matched_under_it(real, name, settings):
    context = Context(real, 0, tuple(range(len(real.classes))), EXACT, None)
    method(name, "mlp", **settings).prepare(context)
    assert {type(context.source.at(0, m)).__name__ for m in real.modalities} == {"MLP"}

def test_cafe_looks_at_blocks(real):
    with pytest.raises(ValueError, match="cafe looks at blocks of a convnet, mlp has none"): method("cafe", "mlp").check(real)

def test_the_field_stays_out_of_old_specifications():
    assert "net" not in method().spec() and method(net="mlp").spec()["net"] == "mlp"

@pytest.mark.parametrize("net, words", [("convnett", "nearest is 'convnet'"), ("convnet:norm=bach", "'batch'"),
                                        ("convnet:depth=6", "depth 6 leaves nothing"), ("mlp:depth=x", "whole number")])
def test_refusals_come_before_any_compute(real, net, words):
    with pytest.raises(ValueError, match=words): method(net=net).check(real)
