"""Numbers computed once by the authors' code (fixtures/README.md) must come out of ours."""
import pytest
import torch

from ddrepro.core.seeding import keyed_normal
from ddrepro.data.augment import OPS, Augmentation, apply_dsa
from ddrepro.data.formation import decode
from ddrepro.distill.losses import dm_loss, jm_loss, mgm_loss
from ddrepro.nets.networks import ConvNet, NetSpec, spec_for
from helpers import assert_close, cases, reference, reference_input

SEED = 0
LOSS_TOLERANCE = 1e-9
REFERENCE = reference("reference.npz")

SPECS = {f"convnet_{norm}": NetSpec(depth=3, width=32, norm=norm) for norm in ("instance", "batch", "group", "none")}
SPECS |= {"audio": spec_for((1, 128, 56)), "visual": NetSpec(depth=5, width=128)}


def test_every_operation_has_cases():
    assert {case.split("/")[1] for case in cases(REFERENCE, "dsa")} == set(OPS)


@pytest.mark.parametrize("case", cases(REFERENCE, "dsa"))
def test_augmentation(case):
    _, op, shape, _ = case.split("/")
    ours = apply_dsa(reference_input("dsa", shape), Augmentation(op, REFERENCE[case + "/u"]))
    assert_close(ours, REFERENCE[case + "/out"])


@pytest.mark.parametrize("case", cases(REFERENCE, "decode"))
def test_decode(case):
    assert_close(decode(reference_input("decode", case.split("/")[1]), 2), REFERENCE[case + "/out"])


@pytest.mark.parametrize("case", cases(REFERENCE, "features"))
def test_features(case):
    _, kind, shape = case.split("/")
    x = reference_input("features", shape)
    net = ConvNet(SPECS[kind], tuple(x.shape[1:]))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(keyed_normal(tuple(p.shape), SEED, f"reference/{kind}/weights", i) * (len(p) / p.numel()) ** 0.5)
        assert_close(net(x), REFERENCE[case + "/out"])


@pytest.mark.parametrize("name, joint, gap", [
    ("base", 0, 0),
    ("base_plus_icm", 1, 0),
    ("base_plus_cgm", 0, 1),
    ("total_10_10", 10, 10),
])
def test_losses(name, joint, gap):
    features = {"aud_real": 4, "img_real": 4, "aud_syn": 2, "img_syn": 2}
    ra, rv, sa, sv = (keyed_normal((n, 512), SEED, "reference/loss", key).double().mean(0, keepdim=True)
                      for key, n in features.items())
    ours = dm_loss(ra, sa) + dm_loss(rv, sv) + joint * jm_loss(ra, rv, sa, sv) + gap * mgm_loss(ra, rv, sa, sv)
    assert_close(ours, REFERENCE["loss/" + name], LOSS_TOLERANCE)
