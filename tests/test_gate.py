"""Whatever arrays come in: converted with a remark, or refused before compute; no crash later, never 1200 %."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from ddrepro.core.seeding import keyed
from ddrepro.data.normalisation import Normalisation
from ddrepro.data.real import RealData
from ddrepro.distill.distilled import DistilledData, export
from ddrepro.distill.loop import distill
from ddrepro.evaluate.experiment import Experiment
from ddrepro.evaluate.tasks import evaluate
from ddrepro.methods import get_method
from ddrepro.nets.recipes import Recipe
from helpers import one_process

QUICK = Recipe("quick", 1, 16, "sgd", rate=.01, augment=False)
CLASSES = 3
EACH = 4   # samples of a class


def bytes_of(offset: int = 0, side: int = 12, channels: int = 3) -> np.ndarray:
    "A bright bar whose place is the class: (12, channels, side, side) bytes"
    x = keyed(offset, "gate").integers(0, 60, (CLASSES * EACH, channels, side, side))
    for i in range(len(x)): x[i, :, :, i // EACH * 4:i // EACH * 4 + 3] += 150
    return x.astype(np.uint8)


LABELS = np.repeat(np.arange(CLASSES), EACH)


def load(train, test=None, labels=LABELS, test_labels=None, **more) -> tuple:
    "(the data, what was said)"
    test, test_labels = train if test is None else test, labels if test_labels is None else test_labels
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        real = RealData.from_tensors("mine", {"image": train}, labels, {"image": test}, test_labels, **more)
    return real, " ".join(str(w.message) for w in said)


def score(real, method="random", **settings) -> float:
    "Accuracy of a set distilled and evaluated in a moment"
    with one_process():
        made = distill(get_method(method, ipc=1, width=4, **settings), real, progress=False)
        return evaluate(made, real, recipe=QUICK, seeds=1, fusion="linear", device="cpu").accuracy.iloc[0]


# Arrays that hold the same pictures: container or layout → what the remark says

SAME_PICTURES = {
    "float64 from / 255.": (lambda x: x / 255., "float64"),
    "channels last": (lambda x: np.moveaxis(x, 1, -1), "channels)"),
    "channels last, float64": (lambda x: np.moveaxis(x, 1, -1) / 255., "float64"),
    "int64": (lambda x: x.astype(np.int64), "became bytes"),
    "uint16": (lambda x: x.astype(np.uint16), "became bytes"),
    "big-endian floats": (lambda x: (x / 255).astype(">f4"), ""),
    "big-endian integers": (lambda x: x.astype(">i2"), "became bytes"),
    "floats to 255": (lambda x: x.astype(np.float32), "brought to [0, 1]"),
    "floats in [-1, 1]": (lambda x: x / 127.5 - 1, "brought to [0, 1]"),
    "Fortran order": (np.asfortranarray, ""),
    "a view of channels last": (lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2), ""),
    "negative strides": (lambda x: x[::-1][::-1], ""),
    "read-only": (lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape), ""),
    "torch, channels_last": (lambda x: torch.from_numpy(x).contiguous(memory_format=torch.channels_last), ""),
    "torch with a graph": (lambda x: (torch.from_numpy(x) / 255).requires_grad_(), ""),
    "torch uint16": (lambda x: torch.from_numpy(x.astype(np.uint16)), "became bytes"),
    "a list of tensors": (lambda x: list(torch.from_numpy(x)), ""),
    "a list of pictures": (lambda x: [Image.fromarray(np.moveaxis(one, 0, -1)) for one in x], "channels)"),
    "an array of objects": (lambda x: np.array(list(x) + [None], object)[:-1], ""),
    "nested lists": (lambda x: x.tolist(), "became bytes"),
    "16 bits a value": (lambda x: x.astype(np.uint16) * 257, "16 bits a value"),
}


@pytest.mark.parametrize("change, remark", SAME_PICTURES.values(), ids=SAME_PICTURES.keys())
def test_same_pictures_are_the_same_to_a_network(change, remark):
    plain, _ = load(bytes_of())
    real, said = load(change(bytes_of()))
    assert real.shapes == plain.shapes and remark in said and (remark or not said)
    assert real.about.get("remark", "") in said
    one, other = (r.batch("test", range(len(r.test)))["image"] for r in (plain, real))
    assert torch.allclose(one, other, atol=2e-3) and other.is_contiguous()
    export_mean = np.mean([np.asarray(Image.open(file)).mean() for file in pictures_of(real)])
    assert 20 < export_mean < 120          # neither black nor white


def pictures_of(real) -> list:
    import tempfile
    with one_process(): made = distill(get_method("random", ipc=1, width=4), real, progress=False)
    return export(made, tempfile.mkdtemp())


def test_one_layout_of_many_gives_the_same_bits(tmp_path):
    "Channels-last strides once made a resumed run differ from a whole one"
    view, _ = load(np.ascontiguousarray(np.moveaxis(bytes_of(), 1, -1)).transpose(0, 3, 1, 2))
    plain, _ = load(bytes_of())
    assert view.fingerprint == plain.fingerprint
    method = get_method("dm", ipc=1, width=4, iterations=6)
    whole = distill(method, plain, progress=False, compile=False)

    def stop(t, *_):
        if t == 3: raise KeyboardInterrupt
    halting = dict(checkpoint_every=0., on_iteration=stop)
    with pytest.raises(KeyboardInterrupt): distill(method, view, folder=tmp_path, progress=False, compile=False, **halting)
    resumed = distill(method, view, folder=tmp_path, progress=False, compile=False)
    assert torch.equal(whole.tensors["image"], resumed.tensors["image"])


GREY = {
    "(N, height, width)": lambda x: x[:, 0],
    "(N, height, width, 1)": lambda x: np.moveaxis(x[:, :1], 1, -1),
    "bool": lambda x: x[:, :1] > 100,
}


@pytest.mark.parametrize("change", GREY.values(), ids=GREY.keys())
def test_grey_pictures(change):
    real, said = load(change(bytes_of()))
    assert real.shapes == {"image": (1, 12, 12)} and said


# Unlike ranges of train and test: both named, or both right

BYTES, TO_255, TO_1 = lambda x: x, lambda x: x.astype(np.float32), lambda x: x / np.float32(255)


@pytest.mark.parametrize("train", [BYTES, TO_255, TO_1], ids=["bytes", "floats to 255", "floats to 1"])
@pytest.mark.parametrize("test", [BYTES, TO_255, TO_1], ids=["bytes", "floats to 255", "floats to 1"])
def test_unlike_ranges(train, test):
    same, _ = load(bytes_of(), bytes_of(1))
    real, said = load(train(bytes_of()), test(bytes_of(1)))
    assert ("were brought to [0, 1]" in said) == (TO_255 in (train, test))
    assert torch.allclose(real.batch("test", range(12))["image"], same.batch("test", range(12))["image"], atol=2e-3)


def test_a_scale_nobody_can_know():
    both = r"train image has values in \[-.*\] and test image has values in \[0, .*bring both to one range"
    with pytest.raises(ValueError, match=both): load((bytes_of() - 50.) / 20, bytes_of(1) / 255)
    given = {"image": Normalisation((120.,), (60.,))}
    real, said = load(bytes_of().astype(np.float32), normalisation=given)
    assert real.normalisation == given and real.train.inputs["image"].max() > 100   # they are of these values
    _, said = load(bytes_of().astype(np.float32), bytes_of(1), normalisation=given)
    assert "kept, because constants of normalisation were given" in said


# Labels: form → (labels, names)

FORMS = {
    "a column": (LABELS[:, None], ("0", "1", "2")),
    "a row": (LABELS[None], ("0", "1", "2")),
    "one-hot": (np.eye(3)[LABELS], ("0", "1", "2")),
    "one-hot of torch": (torch.nn.functional.one_hot(torch.from_numpy(LABELS)), ("0", "1", "2")),
    "from 1": (LABELS + 1, ("1", "2", "3")),
    "10, 20, 30": (10 * LABELS + 10, ("10", "20", "30")),
    "with negative ones": (LABELS - 1, ("-1", "0", "1")),
    "words": (np.array(["ant", "bee", "cow"])[LABELS], ("ant", "bee", "cow")),
    "a list of words": ([("ant", "bee", "cow")[i] for i in LABELS], ("ant", "bee", "cow")),
    "bytes": (np.array([b"ant", b"bee", b"cow"])[LABELS], ("ant", "bee", "cow")),
    "categories of pandas": (pd.Series(["cow", "bee", "ant"], dtype="category")[LABELS], ("ant", "bee", "cow")),
    "a series with a shuffled index": (pd.Series(LABELS, index=np.arange(12)[::-1] + 100), ("0", "1", "2")),
    "a data frame of one column": (pd.DataFrame({"label": LABELS}), ("0", "1", "2")),
    "floats": (LABELS.astype(float), ("0", "1", "2")),
    "uint8": (LABELS.astype(np.uint8), ("0", "1", "2")),
    "uint64": (LABELS.astype(np.uint64), ("0", "1", "2")),
    "big-endian": (LABELS.astype(">i4"), ("0", "1", "2")),
    "on a graph": (torch.from_numpy(LABELS.astype(np.float32)).requires_grad_(), ("0", "1", "2")),
    "a range": (range(12), tuple(map(str, range(12)))),
}


@pytest.mark.parametrize("labels, names", FORMS.values(), ids=FORMS.keys())
def test_labels_of_any_form(labels, names):
    real, _ = load(bytes_of(), labels=labels)
    assert real.classes == names and real.test.labels.dtype == torch.int64
    meant = np.arange(12) if len(names) == 12 else LABELS
    if getattr(labels, "dtype", None) == "category": meant = 2 - LABELS      # the alphabet's order, not the categories'
    assert real.test.labels.tolist() == meant.tolist()
    assert 0 <= score(real) <= 100


WORDS = np.array(list("abc"))[LABELS]
THREE = {"image": Normalisation((0.,) * 3, (1.,) * 3)}

REFUSED = {
    "several labels a sample": (dict(labels=np.stack([LABELS, LABELS % 2], 1)), "several labels a sample"),
    "probabilities": (dict(labels=np.full((12, 3), 1 / 3)), "labels.argmax"),
    "halves": (dict(labels=LABELS + .5), "labels must be whole numbers, got 0.5 in row 0"),
    "NaN": (dict(labels=np.where(LABELS == 2, np.nan, LABELS)), "got nan in row 8"),
    "None among them": (dict(labels=np.array([*LABELS[:-1], None], object)), "labels must be numbers"),
    "complex": (dict(labels=LABELS + 1j), "labels must be numbers"),
    "dates": (dict(labels=LABELS.astype("M8[D]")), "labels must be numbers"),
    "one number": (dict(labels=3), "one label a sample, got 3"),
    "none at all": (dict(labels=[]), "labels is empty"),
    "too many": (dict(labels=np.tile(LABELS, 2)), "12 samples and 24 labels"),
    "fewer names": (dict(classes=("a", "b")), "labels lie in [0, 2], there are 2 classes"),
    "more names": (dict(classes=tuple("abcd")), "no training sample of class 'd'"),
    "a name twice": (dict(classes=("a", "a", "b")), "'a' stands twice"),
    "names in one text": (dict(classes="abc"), "list of names in the order"),
    "test labels that training lacks": (dict(test_labels=LABELS + 3),
                                        "test labels hold 3 and 4 and 5, which training lacks"),
    "test words that training lacks": (dict(labels=WORDS, test_labels=np.where(WORDS == "c", "x", WORDS)),
                                       "test labels hold 'x', which training lacks"),
    "words and numbers": (dict(labels=WORDS, test_labels=LABELS),
                          "labels are texts and test labels integers"),
    "flat rows": (dict(train=bytes_of().reshape(12, -1)),
                  "got (12, 432). Flat rows of 3×12×12: x.reshape(-1, 3, 12, 12)"),
    "frames": (dict(train=bytes_of()[:, None]), "choose one frame"),
    "one axis": (dict(train=np.arange(12)), "must have shape (N, channels, height, width), got (12,)"),
    "no test sample": (dict(test=bytes_of()[:0]), "test image is empty"),
    "no pixels": (dict(train=bytes_of()[..., :0]), "is empty"),
    "another test size": (dict(test=bytes_of(side=14)), "test image has shape (3, 14, 14), train has (3, 12, 12)"),
    "test in grey": (dict(test=bytes_of(channels=1)), "test image has shape (1, 12, 12), train has (3, 12, 12)"),
    "unequal sizes": (dict(train=[np.zeros((3, 12, 12)), np.zeros((3, 14, 14))]), "one array"),
    "a NaN pixel": (dict(train=np.where(np.arange(12)[:, None, None, None] == 3, np.nan, bytes_of() / 255)),
                    "train image holds NaN or infinity, first in sample 3"),
    "infinity": (dict(train=np.where(np.arange(12)[:, None, None, None] == 5, np.inf, bytes_of() / 255)),
                 "first in sample 5"),
    "beyond float32": (dict(train=bytes_of() * 1e300), "in float32, holds NaN or infinity"),
    "integers below 0": (dict(train=bytes_of().astype(int) - 200), "holds integers from -"),
    "32 bits a value": (dict(train=bytes_of().astype(int) * 10**6), "give bytes from 0 to 255"),
    "complex pixels": (dict(train=bytes_of() * 1j), "must be numbers, got complex128"),
    "text for pixels": (dict(train=np.full((12, 3, 12, 12), "a")), "must be numbers, got str"),
    "masked": (dict(train=np.ma.masked_equal(bytes_of(), bytes_of()[0, 0, 0, 0])), "has masked values"),
    "sparse": (dict(train=torch.from_numpy(bytes_of()).to_sparse()), "is sparse"),
    "on no device": (dict(train=torch.zeros(12, 3, 12, 12, device="meta")), "'meta' and holds no values"),
    "a misspelt strategy": (dict(strategy="color_crops"), "the nearest is 'crop'"),
    "a share of text": (dict(validation="0.1"), "validation must be a number between 0 and 1, got '0.1'"),
    "all for validation": (dict(validation=1), "validation must be a number between 0 and 1"),
    "a seed of text": (dict(seed="a"), "seed must be a whole number"),
    "three constants for one channel": (dict(train=bytes_of(channels=1), normalisation=THREE),
                                        "has 3 constants, a sample has 1 channels"),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(options, words):
    with pytest.raises(ValueError) as refusal: load(**dict(train=bytes_of()) | options)
    assert words in str(refusal.value)


def test_an_image_that_comes_back_is_not_lost():
    "The caller's array stays as it was, and what is stored is not a view of it"
    x = bytes_of()
    real, _ = load(x)
    before = real.train.inputs["image"].clone()
    x[:] = 0
    assert torch.equal(real.train.inputs["image"], before)


# Numbers of NumPy and torch

@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor, np.array], ids=["int64", "int32", "torch", "array"])
def test_numbers_of_any_kind(tmp_path, kind):
    real, _ = load(bytes_of(), classes=np.array(["a", "b", "c"]), seed=kind(0))
    with one_process():
        method = get_method("dm", ipc=kind(1), iterations=kind(2), width=kind(4))
        made = distill(method, real, seed=kind(1), classes=np.arange(3), folder=tmp_path / "run", progress=False)
    plain = distill(get_method("dm", ipc=1, iterations=2, width=4), real, seed=1, progress=False)
    assert DistilledData.load(made.save(tmp_path / "set")).card == made.card
    assert torch.equal(made.tensors["image"], plain.tensors["image"]) and made.card["method"] == plain.card["method"]
    assert Experiment(method, kind(1), eval_seeds=kind(2)) == Experiment(method, 1, eval_seeds=2)
    with one_process(): assert len(evaluate(made, real, QUICK, seeds=kind(2), epochs=kind(1), width=kind(4))) == 2


# The fuzz

FLOATS = [np.float16, np.float32, np.float64, ">f8"]
RANGES = {   # values in [0, 1] → values of a range, and the types they may have
    "bytes": (lambda x: 255 * x, [np.uint8]),
    "unit": (lambda x: x, FLOATS),
    "to 255": (lambda x: 255 * x, FLOATS),
    "signed": (lambda x: 2 * x - 1, FLOATS),
    "standard": (lambda x: 3 * (x - .4), FLOATS),
    "bool": (lambda x: x > .5, [bool]),
    "integers": (lambda x: 255 * x, [np.int16, ">i2", np.int64, np.uint32, np.uint64]),
    "below 0": (lambda x: 300 * x - 100, [np.int32]),
    "16 bits": (lambda x: 65535 * x, [np.uint16, ">u2"]),
    "wide": (lambda x: 1e4 * x, FLOATS),
    "tiny": (lambda x: 1e-3 * x, FLOATS),
}
LAYOUTS = {
    "as it is": lambda x: x,
    "channels last": lambda x: np.moveaxis(x, 1, -1),
    "view": lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2),
    "no channel": lambda x: x[:, 0],
    "flat": lambda x: x.reshape(len(x), -1),
    "five axes": lambda x: x[:, None],
    "empty": lambda x: x[:0],
}
BOXES = {
    "numpy": lambda x: x,
    "torch": lambda x: torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="))),
    "list": list,
    "nested lists": lambda x: x.tolist(),
    "masked": lambda x: np.ma.masked_invalid(x) if x.dtype.kind == "f" else x,
    "objects": lambda x: x.astype(object),
}
NUMBERED = {   # labels → what they may come as
    "plain": lambda y: y,
    "column": lambda y: y[:, None],
    "row": lambda y: y[None],
    "one-hot": lambda y: np.eye(4)[y % 4],
    "float": lambda y: y.astype(np.float32),
    "text": lambda y: y.astype(str),
    "bytes": lambda y: y.astype("S"),
    "series": pd.Series,
    "category": lambda y: pd.Series(y.astype(str), dtype="category"),
    "torch": torch.from_numpy,
    "bool": lambda y: y > y.min(),
    "list": lambda y: y.tolist(),
}
UNLABELLED = {
    "soft": lambda y: np.full((len(y), 3), 1 / 3),
    "half": lambda y: y + .5,
    "nan": lambda y: np.where(np.arange(len(y)), y.astype(float), np.nan),
    "short": lambda y: y[:-1],
    "two": lambda y: np.stack([y, y], 1),
    "none": lambda y: None,
}


@st.composite
def pictures(draw, channels: int, side: int, count: int):
    "An array that may be pictures of this size, in some form"
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ranged, dtypes = RANGES[draw(st.sampled_from(list(RANGES)))]
    x = ranged(rng.random((count, channels, side, side + draw(st.sampled_from([0, 0, 2])))))
    x = x.astype(draw(st.sampled_from(dtypes)))
    if x.dtype.kind == "f" and draw(st.integers(0, 15)) == 0: x[count // 2, 0, 0, 0] = draw(st.sampled_from([np.nan, np.inf]))
    x = LAYOUTS[draw(st.sampled_from([*["as it is"] * 6, *LAYOUTS]))](x)
    return BOXES[draw(st.sampled_from(list(BOXES)))](x)


@st.composite
def label_vectors(draw, count: int, classes: int):
    "A vector that may be labels, in some form"
    labels = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    labels = (labels + draw(st.sampled_from([0, 0, 0, 1, -1, 100]))) * draw(st.sampled_from([1, 1, 1, 2, 10]))
    forms = NUMBERED | UNLABELLED
    return forms[draw(st.sampled_from([*NUMBERED, *forms]))](labels)


@settings(max_examples=2000, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])
@given(data=st.data())
def test_fuzz(data):
    "No array passes the gate and then crashes, none gives an accuracy that is none"
    classes, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    side = data.draw(st.integers(8, 10))
    count, tested = data.draw(st.integers(2, 10)), data.draw(st.integers(1, 5))
    train, test = data.draw(pictures(channels, side, count)), data.draw(pictures(channels, side, tested))
    labels, test_labels = data.draw(label_vectors(count, classes)), data.draw(label_vectors(tested, classes))
    alike = data.draw(st.integers(0, 3)) > 0   # mostly test is of the same form as train, so that much gets through
    if alike and len(train) and labels is not None: test, test_labels = train, labels
    names = data.draw(st.sampled_from([*[None] * 9, list("abcd")[:classes], np.arange(classes), "abcd", ["a", "a"]]))
    constants = data.draw(st.sampled_from([*[None] * 6, {"image": Normalisation()}, THREE]))
    try: real, _ = load(train, test, labels, test_labels, classes=names, normalisation=constants)
    except ValueError as refusal:
        assert "mine" in str(refusal) or "validation" in str(refusal), refusal
        event("refused")
        return
    event("through")
    method, more = data.draw(st.sampled_from([("random", {}), ("random", {}), ("dm", dict(iterations=1, batch=4))]))
    accuracy = score(real, method, **more)
    assert 0 <= accuracy <= 100
    assert real.train.inputs["image"].dtype in (torch.uint8, torch.float16, torch.float32)
    assert np.isfinite(real.batch("train", [0])["image"].numpy()).all()
