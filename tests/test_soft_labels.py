"""Soft labels as labels of a set: carried, checked, trained on, with equal teachers, and files without them as ever."""
import hashlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddrepro.core.files import DamagedFile, load_tensors, save_tensors, write_json
from ddrepro.core.files import digest as digest_of
from ddrepro.core.provenance import short_hash
from ddrepro.core.seeding import keyed_normal
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.registry import load_data
from ddrepro.distill.distilled import DistilledData, export, merge
from ddrepro.distill.soft_labels import SoftLabels, smoothed
from ddrepro.distill.teachers import Teacher, taught, teacher_of
from ddrepro.evaluate.classification import evaluation_job, numbered_as, score
from ddrepro.evaluate.experiment import Experiment, run_all, settled
from ddrepro.evaluate.runs import Run
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.nets.networks import NetSpec
from ddrepro.nets.recipes import Recipe, idc_recipe
from ddrepro.nets.training import new_net, train, training_loss
from helpers import few_digits, one_process

NAMES = ("a", "b", "c")
QUICK = Recipe("quick", 3, 8, "sgd", rate=.05, augment=False)


def made_up(**more) -> DistilledData:
    tensors = {"image": keyed_normal((3, 2, 1, 8, 8), 0, "soft/fixture")}
    facts = dict(card={"method": "demo", "seed": 0}, curve=(2., 1.))
    return DistilledData(tensors, NAMES, (0, 1, 2), {"image": Normalisation((.5,), (.25,))}, **facts | more)


def rows(*shape) -> torch.Tensor: return keyed_normal(shape, 1, "soft/rows").softmax(-1)


def test_a_file_without_soft_labels_is_what_it_was(tmp_path):
    card = made_up().save(tmp_path / "hard")
    assert hashlib.sha256(card.read_bytes()).hexdigest().startswith("f81b5a17f2f3fa89")    # as written before there were any
    assert DistilledData.load(tmp_path / "hard").soft is None
    assert Run(tmp_path, made_up(), {}).set == digest_of(made_up().tensors, {})[:16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples, factor", [(2, 1), (2, 2), (8, 2)])
def test_file_and_back(tmp_path, dtype, samples, factor):
    soft = SoftLabels(rows(3, samples, 3).to(dtype), "teacher", 4., {"recipe": "embedding"})
    s = made_up(soft=soft, factor=factor)
    s.save(tmp_path / "soft")
    back = DistilledData.load(tmp_path / "soft")
    assert torch.equal(back.soft.probabilities, soft.probabilities) and back.soft.probabilities.dtype == dtype
    assert back.soft.facts() == soft.facts()
    assert torch.equal(back.targets(), s.targets()) and len(s.targets()) == 3 * 2 * factor**2


def altered(folder, **changes):
    "Write other things into a saved set, with the right checksums"
    card = json.loads((folder / "soft.json").read_text())
    tensors = load_tensors(folder / "soft.safetensors", "distilled")[0]
    del card["sha256"]
    tensors |= changes.pop("tensors", {})
    for name in changes.pop("without", ()): del tensors[name]
    card |= changes
    save_tensors(folder / "soft.safetensors", tensors, "distilled", card)
    write_json(folder / "soft.json", card | {"sha256": digest_of(tensors, card)})


@pytest.mark.parametrize("changes, words", [
    (dict(tensors={"soft/labels": torch.ones(3, 2, 3)}), "rows of soft labels must sum to 1"),
    (dict(tensors={"soft/labels": torch.ones(3, 4, 1)}), "must have shape"),
    (dict(without=["soft/labels"]), "soft/labels"),
    (dict(soft={"source": "fixed", "temperature": -1.}), "temperature of soft labels must be a number"),
    (dict(soft={"colour": "red"}), "colour"),
    (dict(format="ddrepro distilled 3"), "not the card of a distilled set"),
])
def test_a_file_that_cannot_be_right(tmp_path, changes, words):
    made_up(soft=SoftLabels(rows(3, 2, 3))).save(tmp_path / "soft")
    altered(tmp_path, **changes)
    with pytest.raises(DamagedFile, match=words): DistilledData.load(tmp_path / "soft")


@pytest.mark.parametrize("soft, words", [
    (lambda: SoftLabels(rows(3, 2, 4)), r"must have shape \(3, 2, 3\); got \(3, 2, 4\)"),
    (lambda: SoftLabels(rows(2, 2, 3)), r"must have shape \(3, 2, 3\); got \(2, 2, 3\)"),
    (lambda: SoftLabels(rows(3, 8, 3)), r"got \(3, 8, 3\)"),
    (lambda: SoftLabels(rows(3, 2, 3) - 1), "must not be negative"),
    (lambda: SoftLabels(rows(3, 2, 3) * 1.01), "must sum to 1, sample . of row . sums to 1.01"),
    (lambda: SoftLabels(rows(3, 2, 3) / 0), "NaN or infinity"),
    (lambda: SoftLabels(rows(6, 3)), "one row of probabilities a sample"),
    (lambda: SoftLabels(rows(3, 2, 3), temperature=float("nan")), "temperature of soft labels"),
    (lambda: rows(3, 2, 3), "must be SoftLabels or None"),
])
def test_refusals(soft, words):
    with pytest.raises(ValueError, match=words): made_up(soft=soft())


def test_pairs_have_none():
    with pytest.raises(ValueError, match="soft labels are of classes; this set teaches retrieval"):
        DistilledData({"image": torch.zeros(3, 3, 8, 8)}, (), (), {"image": Normalisation((.5,), (.25,))}, task="retrieval",
                      soft=SoftLabels(rows(3, 1, 3)))


def test_merge_restrict_and_renumber():
    whole = made_up(soft=SoftLabels(rows(3, 2, 3), "learned"))
    shard = lambda c: replace(whole, tensors={m: x[[c]] for m, x in whole.tensors.items()}, labels=(c,),
                              soft=replace(whole.soft, probabilities=whole.soft.probabilities[[c]]))
    together = merge([shard(2), shard(0), shard(1)])
    assert torch.equal(together.soft.probabilities, whole.soft.probabilities)
    assert torch.equal(whole.restrict(["image"]).soft.probabilities, whole.soft.probabilities)
    with pytest.raises(ValueError, match="some shards have soft labels"): merge([shard(0), replace(shard(1), soft=None)])

    other = replace(load_data("digits"), classes=tuple("cabdefghij"))
    ten = replace(whole, tensors={"image": torch.zeros(10, 1, 1, 32, 32)}, classes=tuple("abcdefghij"), labels=tuple(range(10)),
                  soft=SoftLabels(rows(10, 1, 10)))
    moved = numbered_as(ten, other)
    for c, name in enumerate(ten.classes):     # what a sample says of a class by name is what it said
        assert torch.equal(moved.soft.probabilities[..., other.classes.index(name)], ten.soft.probabilities[..., c])


def test_export_says_what_the_labels_are(tmp_path):
    s = made_up(soft=SoftLabels(rows(3, 8, 3), "learned", 2.), factor=2)
    export(s, tmp_path)
    about = json.loads((tmp_path / "export.json").read_text())["soft_labels"]
    assert (about["source"], about["temperature"], sorted(about["rows"])) == ("learned", 2., ["0000", "0001", "0002"])
    assert torch.tensor(about["rows"]["0001"]) == pytest.approx(s.soft.probabilities[1].numpy(), abs=1e-6)
    export(replace(s, soft=None), tmp_path)
    assert "soft_labels" not in json.loads((tmp_path / "export.json").read_text())


def test_the_loss_is_the_divergence_up_to_a_constant():
    logits = keyed_normal((5, 4), 0, "student").double().requires_grad_()
    said = (keyed_normal((5, 4), 0, "teacher").double() / 3).softmax(1)
    ours, = torch.autograd.grad(training_loss({"image": logits}, said, 3.), logits)
    divergence = 9 * F.kl_div((logits / 3).log_softmax(1), said, reduction="batchmean")
    theirs, = torch.autograd.grad(divergence, logits)
    assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-14)


@pytest.mark.parametrize("recipe", [QUICK, idc_recipe(3, batch=8, cutmix=1.)])
def test_certain_rows_train_as_hard_labels(recipe):
    inputs, labels = {"image": keyed_normal((12, 1, 8, 8), 0, "x")}, torch.arange(12) % 3
    nets = [new_net({"image": NetSpec(1, 4)}, {"image": (1, 8, 8)}, 3, "linear", 0) for _ in range(2)]
    for net, targets in zip(nets, (labels, F.one_hot(labels, 3).float())): train(net, inputs, targets, recipe, "color_crop", 0)
    for p, q in zip(nets[0].parameters(), nets[1].parameters()): assert (p - q).abs().max() < 1e-6


def test_equal_teachers_for_set_and_control(tmp_path):
    real = few_digits()
    first = {"image": torch.stack([real.batch("train", i[:1])["image"] for i in real.train.by_class.values()])}
    second = {"image": torch.stack([real.batch("train", i[1:2])["image"] for i in real.train.by_class.values()])}
    sets = [DistilledData(x, real.classes, tuple(range(10)), dict(real.normalisation)) for x in (first, second)]
    teacher = Teacher(QUICK, width=4, temperature=3)
    labelled = taught(sets[0], real, teacher, tmp_path)
    labelled.save(tmp_path / "labelled")
    again = teacher_of(DistilledData.load(tmp_path / "labelled").soft)     # the teacher is known from the file
    control = taught(sets[1], real, again, tmp_path)
    assert control.soft.facts() == labelled.soft.facts()
    assert len(list((tmp_path / "teachers").iterdir())) == 1               # one network labelled both
    assert control.soft.teacher["data"] == real.fingerprint
    assert not torch.equal(control.soft.probabilities, labelled.soft.probabilities)


def test_rows_of_other_labels_are_other_rows(tmp_path):
    real = few_digits()
    one = Experiment(get_method("random", ipc=1, width=4), recipe=QUICK, eval_seeds=1)
    teacher = Teacher(QUICK, width=4)
    experiments = [one, replace(one, targets="hard", label="hard"), replace(one, targets=teacher, label="teacher")]
    with one_process(): table = run_all(experiments, real, runs=tmp_path, store=tmp_path / "store", progress=False)
    assert table.run.nunique() == 1
    by_row = table.set_index("row")
    assert by_row.accuracy["random"] == by_row.accuracy["hard"]
    assert by_row.recipe.to_dict() == {"random": "quick", "hard": "quick, hard labels", "teacher": "quick, labels of a teacher at 1"}
    assert len(list((tmp_path / by_row.run["hard"]).glob("rows-*.csv"))) == 3
    same, other = (Run(tmp_path, made_up(soft=SoftLabels(rows(3, 2, 3), source)), {}).set for source in ("fixed", "learned"))
    assert same == other != Run(tmp_path, made_up(soft=smoothed((0, 1, 2), 2, 3)), {}).set     # by what is learned from


def test_nothing_hashed_changes_without_targets():
    "The key of rows as it was before rows could have other labels"
    e = settled(Experiment(get_method("dm", "digits", 10)), load_data("digits"))
    assert short_hash(e.evaluation()) == "19090bde3fe3bfcb"


def test_two_modalities(tmp_path):
    both = load_data("digits_av")
    kept = torch.cat([torch.from_numpy(i[:4]) for i in both.train.by_class.values()])
    real = replace(both, train=both.train.select(kept), validation=both.validation.select(range(20)))
    pair = {m: torch.stack([real.batch("train", i[:1])[m] for i in real.train.by_class.values()]) for m in real.modalities}
    s = taught(DistilledData(pair, real.classes, tuple(range(10)), dict(real.normalisation), signals=dict(real.signals)), real,
               Teacher(replace(QUICK, rate=1e-3), width=4, temperature=2), tmp_path)
    assert s.soft.teacher["fusion"] == "ensemble"
    job = evaluation_job(s, real, QUICK, "validation", 4, "ensemble")
    assert job["labels"].shape == (10, 10) and job["temperature"] == 2
    assert {row["modality"] for row in score(**job, seeds=[(0, 0)])[0]} == {"A", "V", "AV"}


@pytest.mark.parametrize("asked, words", [(dict(targets="soft"), "this set has none"), (dict(targets="sofd"), "targets must be 'hard' or 'soft'"),
                                          (dict(targets=3), "a Teacher, or None")])
def test_targets_that_are_none(asked, words):
    real = few_digits()
    s = DistilledData({"image": torch.zeros(10, 1, 1, 32, 32)}, real.classes, tuple(range(10)), dict(real.normalisation))
    with pytest.raises(ValueError, match=words): evaluate(s, real, QUICK, seeds=1, **asked)
