"""Numbers computed once by the authors' code (fixtures/README.md) must come out of ours."""
from pathlib import Path

import numpy as np
import pytest
import torch

from ddrepro.augment import OPS, Augmentation, apply_dsa
from ddrepro.formation import decode
from ddrepro.losses import dm_loss, jm_loss, mgm_loss
from ddrepro.nets import ConvNet, NetSpec, spec_for
from ddrepro.seeding import keyed_normal

SEED = 0
TOLERANCE, LOSS_TOLERANCE = 1e-5, 1e-9

with np.load(Path(__file__).parent / "fixtures" / "reference.npz", allow_pickle=False) as archive:
    REFERENCE = {key: torch.from_numpy(archive[key]) for key in archive.files}

SPECS = {f"convnet_{norm}": NetSpec(depth=3, width=32, norm=norm) for norm in ("instance", "batch", "group", "none")}
SPECS |= {"audio": spec_for((1, 128, 56)), "visual": NetSpec(depth=5, width=128)}


def cases(kind):
    "Keys of one kind, without their last part"
    return sorted({key.rpartition("/")[0] for key in REFERENCE if key.startswith(kind + "/")})


def batch(stream, shape):
    "The keyed input of a case, whose shape is written as in '3x3x16x16'"
    size = tuple(map(int, shape.split("x")))
    return keyed_normal(size, SEED, "reference/" + stream, *size)


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"max abs difference {difference:.1e}, allowed {tolerance:.0e}"


def test_every_operation_has_cases():
    assert {case.split("/")[1] for case in cases("dsa")} == set(OPS)


@pytest.mark.parametrize("case", cases("dsa"))
def test_augmentation(case):
    _, op, shape, _ = case.split("/")
    assert_close(apply_dsa(batch("dsa", shape), Augmentation(op, REFERENCE[case + "/u"])), REFERENCE[case + "/out"])


@pytest.mark.parametrize("case", cases("decode"))
def test_decode(case):
    assert_close(decode(batch("decode", case.split("/")[1]), 2), REFERENCE[case + "/out"])


@pytest.mark.parametrize("case", cases("features"))
def test_features(case):
    _, kind, shape = case.split("/")
    x = batch("features", shape)
    net = ConvNet(SPECS[kind], tuple(x.shape[1:]))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(keyed_normal(tuple(p.shape), SEED, f"reference/{kind}/weights", i) * (len(p) / p.numel()) ** 0.5)
        assert_close(net(x), REFERENCE[case + "/out"])


@pytest.mark.parametrize("name, joint, gap", [("base", 0, 0), ("base_plus_icm", 1, 0), ("base_plus_cgm", 0, 1), ("total_10_10", 10, 10)])
def test_losses(name, joint, gap):
    features = {"aud_real": 4, "img_real": 4, "aud_syn": 2, "img_syn": 2}
    ra, rv, sa, sv = (keyed_normal((n, 512), SEED, "reference/loss", key).double().mean(0, keepdim=True) for key, n in features.items())
    ours = dm_loss(ra, sa) + dm_loss(rv, sv) + joint * jm_loss(ra, rv, sa, sv) + gap * mgm_loss(ra, rv, sa, sv)
    assert_close(ours, REFERENCE["loss/" + name], LOSS_TOLERANCE)
