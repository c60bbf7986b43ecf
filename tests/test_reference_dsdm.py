"""Numbers computed once by the code of DSDM and IDC (fixtures/README.md) must come out of ours."""
import numpy as np
import pytest
import torch

from ddrepro.core.seeding import keyed_normal
from ddrepro.data.augment import (
    Augmentation,
    Composition,
    CutMix,
    apply_cutmix,
    apply_diffaug,
    augment,
    cutmix_span,
    draw_diffaug,
)
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import Part, RealData
from ddrepro.distill.coresets import coreset, herding_order, kcenter_order
from ddrepro.nets.networks import FusionNet, NetSpec, spec_for
from helpers import assert_close, reference, reference_input

SEED = 0
TOLERANCE, ROTATION_TOLERANCE = 1e-5, 2e-5  # their angles are float64, ours float32
REFERENCE = reference("reference_dsdm.npz")


def cases(kind, last):
    "Keys of one kind that end in `last`, without it"
    keys = [key for key in REFERENCE if key.startswith(kind + "/") and key.endswith("/" + last)]
    return sorted(key.removesuffix("/" + last) for key in keys)


def drawn_by_them(case):
    "Their operations, in the order they ran, with the parameters they drew"
    keys = [key for key in REFERENCE if key.startswith(case + "/") and not key.endswith("/out")]
    names = sorted(key.rpartition("/")[2] for key in keys)
    return Composition(tuple(Augmentation(name.partition("_")[2], REFERENCE[f"{case}/{name}"]) for name in names))


@pytest.mark.parametrize("case", cases("diffaug", "out"))
def test_composition(case):
    "What they computed, and the same operations in the same order as ours"
    _, strategy, shape, _ = case.split("/")
    x, theirs = reference_input("diffaug", shape), drawn_by_them(case)
    tolerance = ROTATION_TOLERANCE if "rotate" in [omega.op for omega in theirs.steps] else TOLERANCE
    for apply in (apply_diffaug, augment): assert_close(apply(x, theirs), REFERENCE[case + "/out"], tolerance)
    strategy, order = strategy.replace("none", ""), [omega.op for omega in theirs.steps]
    ours = [draw_diffaug(strategy, 1, SEED, "test", t).steps for t in range(30)]
    assert order in [[omega.op for omega in steps] for steps in ours]
    same_order = next(steps for steps in ours if [omega.op for omega in steps] == order)
    assert [omega.u.shape[1] for omega in theirs.steps] == [omega.u.shape[1] for omega in same_order]


def test_composition_ran_one_of_each():
    "Their runs cover all three of crop, scale and rotate, for the batch and for each sample, and never two of them"
    ran = {(case.split("/")[3][:-1], *({omega.op for omega in drawn_by_them(case).steps} & {"crop", "scale", "rotate"}))
           for case in cases("diffaug", "out") if "flip" in case}
    assert ran == {(mode, op) for mode in ("batch", "sample") for op in ("crop", "scale", "rotate")}


@pytest.mark.parametrize("case", cases("cutmix", "box"))
def test_cutmix(case):
    "Box and area ratio for seeds 0 to 20 and three λ"
    height, width = map(int, case.split("/")[1].split("x"))
    rows, shares = REFERENCE[case + "/box"].tolist(), REFERENCE[case + "/share"].tolist()
    assert len(rows) == 63 and {share for share, _ in shares} == {0., .3, 1.}
    x = torch.stack([torch.zeros(1, height, width), torch.ones(1, height, width)])
    labels, swap = torch.tensor([3, 4]), torch.tensor([1, 0])
    for (_, row, column, top, left, bottom, right), (share, ratio) in zip(rows, shares):
        centre = (row + .5) / height, (column + .5) / width
        assert cutmix_span(height, share, centre[0]) == (top, bottom)
        assert cutmix_span(width, share, centre[1]) == (left, right)
        mixed, partners, q = apply_cutmix(x, labels, CutMix(share, centre, swap))
        expected = torch.zeros(height, width)
        expected[top:bottom, left:right] = 1
        assert torch.equal(mixed[0, 0], expected)
        assert torch.equal(mixed[1, 0], 1 - expected)
        assert partners.tolist() == [4, 3]
        assert q == pytest.approx(ratio, abs=1e-12)


def network(kind, shape, spec, classes):
    "Our network with a linear head and the keyed weights of a case"
    x = reference_input("net", shape)
    net = FusionNet({"image": spec}, {"image": tuple(x.shape[1:])}, classes, "linear")
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(keyed_normal(tuple(p.shape), SEED, f"reference/{kind}/weights", i) * (len(p) / p.numel()) ** 0.5)
    return net, {"image": x}


def parameters(spec, shape, classes):
    net = FusionNet({"image": spec}, {"image": tuple(map(int, shape.split("x")))[1:]}, classes, "linear")
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("case", cases("net/convnet3", "logits") + cases("net/convnet4", "logits"))
def test_convnet(case):
    "Their last pooled map, and the logits"
    _, kind, shape = case.split("/")
    theirs, classes = REFERENCE[case + "/features"], REFERENCE[case + "/logits"].shape[1]
    net, inputs = network(kind, shape, NetSpec(depth=int(kind[-1]), width=32), classes)
    with torch.no_grad():
        assert_close(net.features(inputs)["image"].view(theirs.shape), theirs)
        assert_close(net(inputs)["image"], REFERENCE[case + "/logits"])
    assert parameters(spec_for(tuple(inputs["image"].shape[1:])), shape, classes) == REFERENCE[case + "/parameters"]


@pytest.mark.parametrize("case", cases("net", "eval"))
def test_resnet_and_densenet(case):
    "Logits in training mode, then in evaluation mode with the statistics that left behind"
    _, name, shape = case.split("/")
    kind, norm = name.split("_")
    net, inputs = network(name, shape, NetSpec(norm=norm, kind=kind), 10)
    with torch.no_grad():
        assert_close(net.train()(inputs)["image"], REFERENCE[case + "/train"])
        assert_close(net.eval()(inputs)["image"], REFERENCE[case + "/eval"])
        if case + "/features" in REFERENCE: assert_close(net.features(inputs)["image"], REFERENCE[case + "/features"])
    assert parameters(NetSpec(norm=norm, kind=kind), shape, 10) == REFERENCE[case + "/parameters"]


POINTS, LABELS = keyed_normal((50, 8), SEED, "reference/selection"), torch.arange(50) % 3


def test_herding():
    "The order IDC's code takes, of all points and class by class"
    assert herding_order(POINTS, 10).tolist() == REFERENCE["selection/herding/whole"].tolist()
    for c, theirs in enumerate(REFERENCE["selection/herding/classes"]):
        members = (LABELS == c).nonzero().flatten()
        assert members[herding_order(POINTS[members], 8)].tolist() == theirs.tolist()


def test_kcenter():
    "Nearest to the mean, then always the farthest from its nearest centre, by a table of all distances"
    points = POINTS.double().numpy()
    distance = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))
    expected = [int(((points - points.mean(0)) ** 2).sum(1).argmin())]
    for _ in range(9): expected.append(int(distance[:, expected].min(1).argmax()))
    assert kcenter_order(POINTS, 10).tolist() == expected


def test_first():
    "The first samples of every class, as IDC's code takes them"
    parts = [Part({"image": POINTS.view(50, 1, 2, 4)}, LABELS)] * 3
    real = RealData("points", ("a", "b", "c"), *parts, {"image": Normalisation()}, "crop")
    assert [i.tolist() for i in coreset("first", real, 8).values()] == REFERENCE["selection/first/classes"].tolist()
