"""What is kept is what was asked for: rows belong to their set, names to the data, options to what they say."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from ddrepro.core.seeding import keyed_normal
from ddrepro.data.real import RealData
from ddrepro.data.registry import load_data
from ddrepro.distill.loop import distill
from ddrepro.evaluate.experiment import Experiment, run_all
from ddrepro.methods import get_method
from ddrepro.nets.recipes import Recipe
from helpers import one_process

QUICK = Recipe("quick", 4, 16, "sgd", rate=.05, augment=False)
METHOD = get_method("dm", ipc=1, iterations=3, width=4, batch=4)
CASE = Experiment(METHOD, recipe=QUICK, eval_seeds=2)


@pytest.fixture
def real():
    "Two classes, bright above or below"
    x = keyed_normal((40, 1, 16, 16), 0, "trust").sigmoid() / 2
    for i in range(40): x[i, :, 8 * (i % 2):8 * (i % 2) + 8] += .5
    labels = [i % 2 for i in range(40)]
    names = ["up", "down"]
    return RealData.from_tensors("mine", {"image": x}, labels, {"image": x}, labels, classes=names)


@pytest.fixture
def run(tmp_path):
    def run(real, cases=CASE, **options):
        where = dict(runs=tmp_path, store=tmp_path / "store", progress=False)
        with one_process(): return run_all([cases], real, **where, **options)
    return run


def test_rows_of_a_set_that_was_made_in_another_way_are_not_taken(real, run, tmp_path):
    exact = run(real, compute=dict(precision="float64"))
    kept = next(tmp_path.glob("*/rows-*.csv")).read_text()
    single = run(real, compute=dict(precision="float32"))
    assert set(exact["set"]) != set(single["set"]) and not single.stale.any()
    there = next(tmp_path.glob("*/rows-*.csv")).read_text()
    assert all(line in there for line in kept.splitlines()[1:-1])      # nothing is lost
    back = run(real, compute=dict(precision="float64"))
    pd.testing.assert_frame_equal(back, exact)


def test_names_that_were_corrected_move_no_label(real, run):
    before = run(real)
    renamed = replace(real, classes=("down", "up"))
    after = run(renamed, replace(CASE, eval_seeds=4))
    assert after.accuracy[:2].tolist() == before.accuracy.tolist()
    assert after.accuracy.min() > 60                 # never the labels swapped


def test_a_signal_that_is_described_otherwise(run):
    sounds = load_data("spoken_digits", train_per_class=4)
    case = replace(CASE, method=METHOD.replace(width=2), recipe=replace(QUICK, epochs=1))
    before = run(sounds, case)
    other = replace(sounds.signals["audio"], sample_rate=16_000)
    after = run(replace(sounds, signals={"audio": other}), replace(case, eval_seeds=3))
    assert after.accuracy[:2].tolist() == before.accuracy.tolist()


@pytest.mark.parametrize("wrong, words", [
    (dict(at=100), "at must lie between 1 and the 3 iterations of dm, got 100"),
    (dict(at=0), "got 0"),
    (dict(method=None, at=1), "of no method"),
    (dict(method="dm"), "method must be a Method"),
    (dict(eval_seeds="3"), "eval_seeds must be an integer"),
    (dict(seed=.5), "seed must be an integer"),
])
def test_experiments_that_cannot_be(wrong, words):
    with pytest.raises((TypeError, ValueError), match=words): replace(CASE, **wrong)


def test_options_of_a_run(real, run):
    run(real)
    with pytest.raises(ValueError, match="the nearest is 'precision'"): run(real, compute=dict(precison="float64"))
    with pytest.raises(ValueError, match="experiments is empty"): run_all([], real)
    for wrong in ("30", None, -1, np.nan):
        with pytest.raises(ValueError, match="checkpoint_every must be"): distill(METHOD, real, checkpoint_every=wrong)
    labels = {"a label of classes must be a whole number": ([.7], [True, False]), "a list of labels": ("01", 0)}
    for words, several in labels.items():
        for wrong in several:
            with pytest.raises(ValueError, match=words): distill(METHOD, real, classes=wrong)
    assert distill(METHOD, real, classes=["down"], progress=False).labels == (1,)
