"""The AVDD authors' tensor files: small ones of the same format, in every layout, and damaged in every way."""
import pickle
import warnings
from functools import partial

import pytest
import torch

from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed_uniform
from ddrepro.data.registry import list_data, load_data
from ddrepro.data.sets.avdd_sets import AVE, VGGS10K, open_file

STEMS = {"vggs10k": ("vgg_subset", VGGS10K), "ave": ("ave", AVE)}


def made(part, n, classes, kind=torch.float32, **other):
    images = (255 * keyed_uniform((n, 3, 224, 224), 0, "made", part)).round().to(kind)
    audio = -100 * keyed_uniform((n, 1, 128, 56), 1, "made", part)
    tensors = {"images": images, "audio": audio, "labels": torch.arange(n, dtype=torch.int32) % classes}
    return {f"{k}_{part}": x for k, x in (tensors | other).items()}


def write(root, name, layout="flat", **options):
    stem, classes = STEMS[name]
    parts = {p: made(p, n, len(classes), **options) | {"classes": list(classes)}
             for p, n in (("train", 60), ("test", 30))}
    folders = {"flat": "", "avdd": "avdd", "authors": "{p}_data", "clone": "avdd/data/{p}_data"}
    if layout == "combined": contents = {f"{stem}.pt": parts["train"] | parts["test"]}
    else:
        contents = {f"{folders[layout].format(p=p)}/{stem}_{p}.pt".lstrip("/"): content for p, content in parts.items()}
    for place, content in contents.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)


@pytest.mark.parametrize("name", STEMS)
def test_every_layout_and_both_types_give_the_same_data(tmp_path, name):
    fingerprints = set()
    for layout in ("flat", "avdd", "authors", "clone", "combined"):
        for kind in (torch.float32, torch.uint8) if layout == "flat" else (torch.uint8,):
            root = tmp_path / f"{layout}-{kind}"
            write(root, name, layout, kind=kind)
            real = load_data(name, root=root)
            assert real.train.inputs["image"].dtype == torch.uint8
            fingerprints.add(real.fingerprint)
    assert len(fingerprints) == 1
    classes = len(STEMS[name][1])
    assert real.train.labels.unique().numel() == real.validation.labels.unique().numel() == classes
    assert len(real.train) + len(real.validation) == 60 and len(real.test) == 30
    sums = [{float(x.sum()) for x in part.inputs["audio"]} for part in (real.train, real.validation)]
    assert not sums[0] & sums[1] and len(sums[0] | sums[1]) == 60


def test_the_old_format_of_torch_save(tmp_path):
    write(tmp_path, "vggs10k", kind=torch.uint8)
    before = load_data("vggs10k", root=tmp_path).fingerprint
    path = tmp_path / "vgg_subset_train.pt"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert load_data("vggs10k", root=tmp_path).fingerprint == before
    whole = path.read_bytes()
    for n in (0, 1, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(DamagedFile, match="vgg_subset_train.pt is"): load_data("vggs10k", root=tmp_path)


def test_fractions_are_rounded_and_reported(tmp_path):
    images = made("test", 30, 10)["images_test"].index_fill(3, torch.tensor([0]), 100.25)
    write(tmp_path, "vggs10k", kind=torch.uint8)
    torch.save(made("test", 30, 10, images=images), tmp_path / "vgg_subset_test.pt")
    with pytest.warns(UserWarning, match="20,160 values"): real = load_data("vggs10k", root=tmp_path)
    assert "20,160 values" in real.about["remark"]
    assert (real.test.inputs["image"][..., 0] == 100).all()


def test_whole_numbers_need_no_warning(tmp_path):
    write(tmp_path, "ave")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "exactly" in load_data("ave", root=tmp_path).about["remark"]


@pytest.mark.parametrize("other, words", [
    (dict(images=torch.full((30, 3, 224, 224), torch.nan)), "images_test holds NaN"),
    (dict(images=torch.full((30, 3, 224, 224), 256.)), "expected 0 to 255"),
    (dict(images=torch.full((30, 3, 224, 224), .5)), "scaled already"),
    (dict(images=torch.zeros(30, 224, 224, 3, dtype=torch.uint8)),
     r"shape \(30, 224, 224, 3\), expected \(N, 3, 224, 224\)"),
    (dict(audio=torch.full((30, 1, 128, 56), torch.inf)), "audio_test holds NaN or infinity"),
    (dict(audio=torch.zeros(30, 1, 128, 57)), r"shape \(30, 1, 128, 57\), expected \(N, 1, 128, 56\)"),
    (dict(labels=torch.arange(30)), r"labels_test lies in \[0, 29\], expected 0 to 9"),
    (dict(labels=torch.arange(30) % 10 - 1), r"labels_test lies in \[-1, 8\]"),
    (dict(labels=torch.zeros(30)), "expected integers"),
    (dict(labels=torch.tensor(3)), r"has shape \(\)"),
    (dict(labels=torch.zeros(29, dtype=torch.int32)), "labels_test has 29 samples"),
    (dict(labels=list(range(10)) * 3), "lacks the tensor labels_test"),
    (dict(images=torch.zeros(0, 3, 224, 224), audio=torch.zeros(0, 1, 128, 56),
          labels=torch.zeros(0, dtype=torch.int32)), "at least one"),
])
def test_wrong_content_is_named(tmp_path, other, words):
    write(tmp_path, "vggs10k", kind=torch.uint8)
    torch.save(made("test", 30, 10, kind=torch.uint8, **other), tmp_path / "vgg_subset_test.pt")
    with pytest.raises(ValueError, match=f"vgg_subset_test.pt.*{words}"): load_data("vggs10k", root=tmp_path)


class Harmful:
    def __reduce__(self): return open, (Harmful.mark, "w")


def test_pickles_are_refused_and_not_run(tmp_path):
    Harmful.mark = str(tmp_path / "ran")
    path = tmp_path / "ave_train.pt"
    old = partial(torch.save, _use_new_zipfile_serialization=False)

    def plain(x, path): path.write_bytes(pickle.dumps(x, protocol=2))

    for write_it in (torch.save, old, plain):
        write_it({"images_train": Harmful()}, path)
        with pytest.raises(DamagedFile, match="never unpickles"): open_file(path)
    assert not (tmp_path / "ran").exists()


def test_truncation_is_noticed_wherever_it_falls(tmp_path):
    write(tmp_path, "vggs10k", kind=torch.uint8)
    path = tmp_path / "vgg_subset_train.pt"
    whole = path.read_bytes()
    for n in [*range(0, len(whole), len(whole) // 12), len(whole) - 1]:
        path.write_bytes(whole[:n])
        with pytest.raises(DamagedFile, match="vgg_subset_train.pt is"): load_data("vggs10k", root=tmp_path)


def test_a_missing_file_names_the_places_and_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("DDREPRO_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error: load_data("ave")
    places = str(tmp_path / "avdd/train_data"), str(tmp_path / "test_data")
    for words in ("ave_train.pt", "ave.pt", "sakshamsingh1/AVDD", *places): assert words in str(error.value)
    places = list_data().set_index("name").found
    assert places["ave"] == places["vggs10k"] == "not here"
    write(tmp_path, "ave", "authors", kind=torch.uint8)
    assert list_data().set_index("name").found["ave"] == str(tmp_path / "train_data")
