"""LRS and ARS: the hand cases, what is measured for them and once, and what is refused."""
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData
from ddrepro.distill.soft_labels import smoothed
from ddrepro.distill.teachers import Teacher, taught
from ddrepro.evaluate import robustness as chapter
from ddrepro.evaluate.experiment import Experiment
from ddrepro.evaluate.robustness import (
    MEASURED,
    augmentation_robust_score,
    label_robust_score,
    measurements,
    random_control,
    robust_scores,
    robustness_experiments,
    robustness_rows,
    run_robustness,
)
from ddrepro.methods import get_method
from ddrepro.nets.recipes import Recipe, get_recipe
from helpers import few_digits, one_process

QUICK = Recipe("quick", 2, 8, "sgd", rate=.05)
PLAIN = replace(QUICK, name="plain", augment=False)


def test_hand_cases():
    assert label_robust_score(.8, .5, .6, .4) == pytest.approx(.248192, abs=5e-7)
    assert augmentation_robust_score(.6, .4, .55, .3) == pytest.approx(.376294, abs=5e-7)


def test_ends_and_middle():
    "The scale by its definition: α = 1 is 1, α = −1 is 0, α = 0 is (1 − 1/e)/(e − 1/e)"
    assert label_robust_score(0, 1, 1, 0) == pytest.approx(1)
    assert label_robust_score(1, 0, 0, 1) == pytest.approx(0)
    assert augmentation_robust_score(1, 0, 1, 0) == pytest.approx(1)
    middle = (1 - 1 / math.e) / (math.e - 1 / math.e)
    assert label_robust_score(.7, .7, .4, .4) == pytest.approx(middle)
    assert augmentation_robust_score(.4, .4, .3, .3) == pytest.approx(middle)


@pytest.mark.parametrize("better", range(4))
def test_each_accuracy_pulls_its_way(better):
    at, signs = [.6] * 4, ((-1, 1, 1, -1), (1, -1, 1, -1))
    for score, sign in zip((label_robust_score, augmentation_robust_score), signs):
        more = [a + .1 * (i == better) for i, a in enumerate(at)]
        assert np.sign(score(*more) - score(*at)) == sign[better]


@pytest.mark.parametrize("call, words", [
    (lambda: label_robust_score(80, .5, .6, .4), "real_hard .* accuracies as fractions, percent divided by 100"),
    (lambda: label_robust_score(.8, -.1, .6, .4), "set_hard must be a number between 0 and 1, got -0.1"),
    (lambda: label_robust_score(.8, .5, "0.6", .4), "set_own must be a number"),
    (lambda: augmentation_robust_score(.8, .5, .6, math.nan), "random_plain must be a number between 0 and 1, got nan"),
    (lambda: augmentation_robust_score(.8, .5, .6, .4, weight=-1), "weight must be a number between 0 and 1"),
])
def test_no_accuracy(call, words):
    with pytest.raises(ValueError, match=words): call()


def table(**by_measurement) -> pd.DataFrame:
    accuracies = dict(zip(sum(MEASURED.values(), ()), (80, 50, 60, 40, 60, 40, 55, 30))) | by_measurement
    return pd.DataFrame([dict(measured=name, modality="image", seed=0, eval_seed=0, accuracy=float(a)) for name, a in accuracies.items()])


def test_scores_of_rows_by_seed_and_method():
    worse = table(**{"set own": 50, "set hard": 40}).assign(seed=1)
    rows = pd.concat([table(), worse]).assign(row="mine")
    scores = robust_scores(pd.concat([rows, table().assign(row="theirs")]))
    assert scores[["row", "seed"]].values.tolist() == [["mine", 0], ["mine", 1], ["theirs", 0]]
    assert scores.LRS.tolist() == pytest.approx([.248192, label_robust_score(.8, .4, .5, .4), .248192], abs=5e-7)
    assert scores.HLR.tolist() == pytest.approx([.3, .4, .3])
    by_label = robust_scores(table(), weight=1.)
    assert by_label.LRS[0] == pytest.approx(label_robust_score(.8, .5, .6, .4, weight=1))


def test_all_real_data_serve_every_seed():
    "Networks on all real data belong to no distillation seed: their mean stands in every line"
    whole = [dict(measured="real hard", modality="image", seed=0, eval_seed=k, accuracy=a) for k, a in enumerate((70., 90.))]
    rows = pd.concat([table()[table().measured != "real hard"].assign(seed=s) for s in (0, 5)] + [pd.DataFrame(whole)])
    assert robust_scores(rows)["real hard"].tolist() == [80., 80.]


@pytest.mark.parametrize("recipe, hard, kinds", [
    (QUICK, None, 5),       # real; set and random, augmented and plain
    (QUICK, "hard", 6),     # the set with hard labels besides
    (PLAIN, None, 5), (get_recipe("dsdm"), "hard", 6)])
def test_each_kind_of_network_once(recipe, hard, kinds):
    needed = measurements(recipe, "color_crop", hard=hard)
    assert len({str(one) for one in needed.values()}) == kinds
    assert needed["set plain"].recipe.strategy_for("color_crop") == "" and needed["set plain"].recipe.cutmix == 0
    assert needed["random augmented"].recipe.strategy_for("color_crop")


@pytest.fixture(scope="module")
def real(): return few_digits()


@pytest.fixture(scope="module")
def two_each(real):
    tensors = {"image": torch.stack([real.batch("train", i[:2])["image"] for i in real.train.by_class.values()])}
    return DistilledData(tensors, real.classes, tuple(range(10)), dict(real.normalisation), card=dict(method=dict(width=4), seed=3))


def counted(monkeypatch):
    "The evaluations that are made"
    made, evaluate = [], chapter.evaluate
    def counting(distilled, *args, **more):
        made.append((distilled, args, more))
        return evaluate(distilled, *args, **more)
    monkeypatch.setattr(chapter, "evaluate", counting)
    return made


def test_rows_of_a_set(real, two_each, monkeypatch):
    made = counted(monkeypatch)
    with one_process(): rows = robustness_rows(two_each, real, recipe=QUICK, seeds=2)
    assert len(made) == 5
    assert rows.groupby("measured").size().to_dict() == {name: 2 for name in sum(MEASURED.values(), ())}
    assert set(rows.seed) == {3}
    scores = robust_scores(rows)
    by_hand = rows.groupby("measured").accuracy.mean() / 100
    assert scores.LRS[0] == pytest.approx(label_robust_score(*by_hand[list(MEASURED["LRS"])]))
    assert scores.ARS[0] == pytest.approx(augmentation_robust_score(*by_hand[list(MEASURED["ARS"])]))


def test_control_with_labels_of_the_same_teacher(real, two_each, tmp_path, monkeypatch):
    softened = taught(two_each, real, Teacher(PLAIN, width=4, temperature=2), tmp_path)
    made = counted(monkeypatch)
    with one_process(): robustness_rows(softened, real, recipe=QUICK, seeds=1, scores=("LRS",), store=tmp_path)
    targets = {("set" if s is softened else "random" if s is not None else "real", str(more["targets"])[:7]) for s, _, more in made}
    assert targets == {("real", "None"), ("set", "hard"), ("set", "None"), ("random", "Teacher")}
    made.clear()
    learned = replace(two_each, soft=smoothed(range(10), 2, 10))          # no teacher: random samples keep hard labels
    with one_process(): robustness_rows(learned, real, recipe=QUICK, seeds=1, scores=("LRS",))
    assert [more["targets"] for s, _, more in made if s is not None and s is not learned] == [None]


def test_whole_rows_made_before(real, two_each, monkeypatch):
    whole = pd.DataFrame([dict(modality="image", seed=0, eval_seed=0, accuracy=90., best=np.nan, steps=1, samples=1)])
    made = counted(monkeypatch)
    with one_process(): rows = robustness_rows(two_each, real, recipe=PLAIN, seeds=1, scores=("LRS",), whole=whole)
    assert all(s is not None for s, _, _ in made)
    assert robust_scores(rows)["real hard"][0] == 90


def test_a_control_of_another_size_is_refused(real, two_each):
    one_each = replace(two_each, tensors={m: x[:, :1] for m, x in two_each.tensors.items()})
    with pytest.raises(ValueError, match="control must hold as many samples as the set, ipc 2 with factor 1; it has ipc 1"):
        robustness_rows(two_each, real, recipe=PLAIN, seeds=1, control=one_each)


def test_all_real_data_train_as_long_as_they_need(real, two_each, monkeypatch):
    made = counted(monkeypatch)
    monkeypatch.setattr(chapter, "evaluate", lambda *args, **more: made.append((args[0], args, more)) or pd.DataFrame(
        [dict(modality="image", seed=0, eval_seed=0, accuracy=50., best=np.nan, steps=1, samples=1)]))
    robustness_rows(two_each, real, recipe=PLAIN, seeds=1, scores="LRS", epochs=1)
    assert {s is None: more.get("epochs") for s, _, more in made} == {True: None, False: 1}


def test_random_control_is_as_large_as_the_set(real, two_each):
    for factor, order in ((1, "columns"), (2, "columns"), (2, "rows")):
        s = replace(two_each, factor=factor, order=order)
        control = random_control(s, real, seed=1)
        assert {m: x.shape for m, x in control.tensors.items()} == {m: x.shape for m, x in s.tensors.items()}
        assert len(control.targets()) == len(s.targets()) and (control.factor, control.order) == (factor, order)
    assert not torch.equal(random_control(two_each, real, 1).tensors["image"], random_control(two_each, real, 2).tensors["image"])


def test_data_without_augmentation():
    sounds = load_data("digits_av").restrict(["audio"])
    silent = replace(sounds, strategy="")
    s = DistilledData({"audio": torch.zeros(10, 1, *sounds.shapes["audio"])}, sounds.classes, tuple(range(10)),
                      dict(sounds.normalisation), signals=dict(sounds.signals))
    with pytest.raises(ValueError, match="ARS needs an augmentation, and these data have none"): robustness_rows(s, silent, recipe=QUICK)


def test_methods_in_the_runs_folder(real, tmp_path):
    dm = get_method("dm", ipc=1, width=4, batch=8, iterations=2, lr=1.)
    own = [Experiment(dm, seed=s, recipe=QUICK, eval_seeds=1) for s in (0, 1)]
    control = get_method("random", ipc=1, width=4)
    settings = dict(runs=tmp_path, store=tmp_path / "store", progress=False)
    with one_process(): rows = run_robustness(own, control, real, **settings)
    files = sorted(tmp_path.glob("*/rows-*.csv"))
    stamps = [file.stat().st_mtime_ns for file in files]
    with one_process(): again = run_robustness(own, control, real, **settings)
    assert again.accuracy.tolist() == rows.accuracy.tolist()
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("*/rows-*.csv"))] == stamps
    assert len(robust_scores(rows)) == 2
    assert rows[rows.measured == "real hard"].run.nunique() == 1


def test_controls_of_another_size_are_refused(real):
    own = Experiment(get_method("dm", ipc=2, width=4), recipe=QUICK)
    with pytest.raises(ValueError, match="the control random has ipc 1 and factor 1, dm has 2 and 1"):
        robustness_experiments(own, get_method("random", ipc=1), real)


def test_the_row_of_a_method_keeps_its_labels(real):
    own = Experiment(get_method("dd", ipc=1, width=4, labels="learned"), recipe="dc")
    kinds = robustness_experiments(own, get_method("random", ipc=1), real)
    assert [kinds[name].targets for name in MEASURED["LRS"]] == [None, "hard", None, None]
    with pytest.raises(ValueError, match="plain steps at learned rates"):           # its own recipe knows no augmentation
        robustness_experiments(replace(own, recipe=None), get_method("random", ipc=1), real)
