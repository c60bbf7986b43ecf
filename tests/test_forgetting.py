"""Forgetting coresets of classes: counts by an independent reading, both ends, the store, and pairs as they were."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddrepro.core.seeding import keyed
from ddrepro.distill.coresets import class_forgetting, coreset, forgetting_counts, forgotten_lists, most_forgotten
from ddrepro.distill.loop import distill
from ddrepro.methods import get_method
from ddrepro.nets.networks import NetSpec
from ddrepro.nets.recipes import Recipe
from ddrepro.nets.training import new_net, train
from helpers import few_digits, squares

WATCHED = Recipe("watched", 6, 16, "sgd", rate=.1, augment=False)
SPECS = {"image": NetSpec(2, 4)}


def counted_by_hand(course) -> list:
    "Transitions from right to wrong, sample by sample"
    counts = []
    for sample in zip(*course):
        lost = sum(1 for before, after in zip(sample, sample[1:]) if before and not after)
        counts.append(lost if any(sample) else float("inf"))
    return counts


def test_counts_of_a_table():
    "Epochs down, samples across: never lost, lost once, lost twice, never learned, learned at last, lost at last"
    course = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 1], [1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    assert forgetting_counts(course).tolist() == [0, 1, 2, float("inf"), 0, 1]
    for seed in range(5):
        drawn = torch.from_numpy(keyed(seed, "course").random((7, 30)) < .5)
        assert forgetting_counts(drawn).tolist() == counted_by_hand(drawn.tolist())


@pytest.mark.parametrize("keep, taken", [("most", [[3, 0], [4, 2]]), ("least", [[5, 0], [1, 2]])])
def test_both_ends_of_every_class(keep, taken):
    counts = torch.tensor([1., 0., 2., float("inf"), 3., 0.])
    by_class = {0: np.array([0, 3, 5]), 1: np.array([1, 2, 4])}
    lists = forgotten_lists(counts, by_class, 2, 0, keep)
    assert [lists[c].tolist() for c in (0, 1)] == taken


def test_ties_go_by_lot_and_a_class_has_its_own():
    by_class = {c: np.arange(10 * c, 10 * c + 10) for c in range(3)}
    lists = [forgotten_lists(torch.zeros(30), by_class, 3, seed) for seed in range(8)]
    assert len({tuple(x[0]) for x in lists}) > 1
    assert len({tuple(x - 10 * c) for c, x in lists[0].items()}) > 1
    again = forgotten_lists(torch.zeros(30), by_class, 5, 0)
    assert all(again[c][:3].tolist() == lists[0][c].tolist() for c in by_class)      # where an order ends does not change it


def test_lots_of_pairs_are_what_they_were():
    "Written down before classes came to use the same function"
    assert most_forgotten(torch.tensor([0., 1., 1., 0., 2., 1.]), 4, 7).tolist() == [4, 5, 1, 2]
    assert most_forgotten(torch.zeros(8), 4, 7, "least").tolist() == [0, 3, 5, 7]


@pytest.fixture(scope="module")
def real(): return few_digits(24)


@pytest.fixture(scope="module")
def counts(real): return class_forgetting(real, SPECS, WATCHED)


def test_counts_of_a_real_training(real, counts):
    "The same training, watched from outside"
    net = new_net(SPECS, real.shapes, 10, "linear", 0, stream="forgetting/net")
    inputs, course = real.batch("train", range(len(real.train))), []
    def look(epoch, loss):
        net.eval()
        with torch.no_grad(): course.append((net(inputs)["image"].argmax(1) == real.train.labels).tolist())
    train(net, inputs, real.train.labels, WATCHED, real.strategy, 0, "forgetting", after_epoch=look)
    assert len(course) == 6 and counts.tolist() == counted_by_hand(course)
    assert counts.isfinite().any() and (counts > 0).any()


def test_counts_are_kept_under_all_they_depend_on(real, counts, tmp_path):
    assert torch.equal(class_forgetting(real, SPECS, WATCHED, store=tmp_path), counts)
    class_forgetting(real, SPECS, WATCHED, store=tmp_path)
    assert len(list((tmp_path / "forgetting").iterdir())) == 1
    others = [dict(seed=1), dict(recipe=replace(WATCHED, epochs=5)), dict(specs={"image": NetSpec(2, 5)})]
    for i, other in enumerate(others, 2):
        class_forgetting(**dict(real=real, specs=SPECS, recipe=WATCHED, store=tmp_path) | other)
        assert len(list((tmp_path / "forgetting").iterdir())) == i


@pytest.mark.parametrize("keep", ["most", "least"])
def test_the_coreset_by_name(real, counts, keep):
    lists = coreset("forgetting", real, 3, specs=SPECS, recipe=WATCHED, fusion="linear", keep=keep)
    sign = -1 if keep == "most" else 1
    for c, rows in real.train.by_class.items():
        rest = np.setdiff1d(rows, lists[c])
        assert real.train.labels[lists[c]].eq(c).all() and len(set(lists[c])) == 3
        assert max(sign * counts[lists[c]]) <= min(sign * counts[rest])


def test_as_a_method(real, tmp_path):
    small = dict(ipc=2, width=4)
    made = lambda seed=0, classes=None, **more: distill(get_method("forgetting", **small | more), real, seed, classes=classes,
                                                      store=tmp_path, progress=False).tensors["image"]
    whole = made()
    assert torch.equal(made(classes=[3, 7]), whole[[3, 7]])                                # classes apart
    assert torch.equal(made(seed=4, selection_seed=0), made(seed=5, selection_seed=0))
    assert not torch.equal(made(keep="least"), whole)
    train_rows = {tuple(x.flatten().tolist()) for x in real.batch("train", real.train.by_class[3])["image"]}
    assert {tuple(x.flatten().tolist()) for x in whole[3]} <= train_rows
    files = list((tmp_path / "forgetting").iterdir())
    assert len(files) == 1                                                                 # seed 0 served all of them


def test_specification_is_what_it_was():
    "No field of classes enters the key of pairs' coresets, or of classes', where it is left alone"
    assert set(get_method("forgetting", "digit_scenes").spec()) == {"method", "version", "ipc", "iterations", "factor", "width", "dim",
                                                                    "experts", "expert_epochs", "expert_captions", "keep"}
    assert set(get_method("forgetting").spec()) == {"method", "version", "ipc", "iterations", "factor", "width", "keep"}
    assert get_method("forgetting", selection_seed=3).spec()["selection_seed"] == 3


@pytest.mark.parametrize("wrong, words", [(dict(keep="last"), "keep must be one of 'most', 'least'"), (dict(ipc=25), "so ipc can be at most 24")])
def test_refusals(real, wrong, words):
    with pytest.raises(ValueError, match=words): distill(get_method("forgetting", **dict(ipc=1, width=4) | wrong), real, progress=False)


def test_one_pass_forgets_nothing(real):
    with pytest.raises(ValueError, match="forgetting needs two passes at least, recipe watched has 1"):
        class_forgetting(real, SPECS, replace(WATCHED, epochs=1))


def test_pairs_still_choose(tmp_path):
    method = get_method("forgetting", ipc=4, width=4, dim=6, experts=1, expert_epochs=2, expert_batch=8)
    s = distill(method, squares(), store=tmp_path, progress=False)
    assert s.task == "retrieval" and s.ipc == 4
