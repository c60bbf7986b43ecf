"""Folders of pictures and of sounds as people fill them: layouts, suffixes, order, and what is left out."""
import os
import re
import shutil
import warnings

import numpy as np
import pytest
import soundfile
from PIL import Image

from ddrepro.core.seeding import keyed
from ddrepro.data.folder_walk import SOUND_FORMATS, SOUND_SUFFIXES
from ddrepro.data.real import PARTS
from ddrepro.data.registry import load_data


def write_picture(path):
    noise = keyed(0, "picture", str(path.relative_to(path.parents[3]))).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format={".jfif": "JPEG", ".jpg": "JPEG"}.get(path.suffix.lower()))


def write_sound(path):
    wave = keyed(0, "sound", str(path.relative_to(path.parents[3]))).standard_normal(800) / 9
    soundfile.write(path, wave, 8_000, format=SOUND_FORMATS[path.suffix.lower()],
                    subtype="OPUS" if path.suffix == ".opus" else None)


KINDS = {"image": (".png", write_picture, dict(size=8)), "sound": (".wav", write_sound, dict(seconds=.1, sample_rate=8_000))}


class Tree:
    "A folder that is filled with files of one kind"
    def __init__(self, kind, root):
        self.kind, self.root = kind, root
        self.suffix, self.write, self.options = KINDS[kind]

    def fill(self, *folders, n=4, suffix=None):
        "n files in each folder"
        for folder in folders:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(n): self.write(self.root / folder / f"{i}{suffix or self.suffix}")
        return self

    def put(self, *names):
        "Files that hold nothing to read"
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text("other")
        return self

    def load(self, **options): return load_data(f"{self.kind}_folder", **dict(folder=self.root) | self.options | options)

    def silent(self, **options):
        "What is loaded, without a warning"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return self.load(**options)


@pytest.fixture(params=KINDS)
def tree(request, tmp_path): return Tree(request.param, tmp_path / "pets")


def sizes(real): return [len(getattr(real, p)) for p in PARTS]


def parts(**folders): return [f"{part}/{c}" for part in folders.values() for c in ("cat", "dog")]


# Layouts

@pytest.mark.parametrize("train, val, test", [
    ("train", "val", "test"),
    ("Training", "Validation", "Testing"),
    ("TRAIN", "valid", "Test"),
    ("training", "Dev", "testing"),
])
def test_parts_are_known_by_many_names(tree, train, val, test):
    tree.fill(*parts(train=train), n=5).fill(*parts(val=val), n=3).fill(*parts(test=test), n=2)
    real = tree.silent()
    assert sizes(real) == [10, 6, 4] and real.classes == ("cat", "dog")
    assert f"train is the folder {train}; validation is the folder {val}; test is the folder {test}" in real.about["remark"]


def test_train_and_test(tree):
    tree.fill(*parts(train="Training"), n=10).fill(*parts(test="Testing"), n=5)
    assert sizes(tree.silent()) == [18, 2, 10]


def test_train_and_val_alone_are_told_apart_by_an_option(tree):
    tree.fill(*parts(train="train"), n=10).fill(*parts(val="val"), n=5)
    with pytest.warns(UserWarning, match="pets: there is no test folder, so 0.2 of each class of train is for testing and val "
                                         "is validation; with val_as='test'") as told:
        real = tree.load()
    assert len(told) == 1 and told[0].filename == __file__ and sizes(real) == [16, 10, 4]
    assert "test is 0.2 of each class, drawn by key" in real.about["remark"]
    assert tree.silent(val_as="validation").fingerprint == real.fingerprint
    as_test = tree.silent(val_as="test")
    assert sizes(as_test) == [18, 2, 10] and "test is the folder val" in as_test.about["remark"]
    tree.fill(*parts(test="test"), n=1)
    with pytest.raises(ValueError, match="val_as='test' is for a folder with train and val and no test; .* holds train and val"):
        tree.load(val_as="test")


def test_train_alone(tree):
    tree.fill(*parts(train="train"), n=10)
    assert sizes(tree.silent()) == [14, 2, 4]


def test_a_class_called_train(tree):
    tree.fill("boat", "plane", "train", n=5)
    real = tree.silent()
    assert real.classes == ("boat", "plane", "train") and sizes(real) == [9, 3, 3]


@pytest.mark.parametrize("folders, message", [
    (("train/cat", "train/dog", "Train/cat", "Train/dog"), "two folders for train, Train and train"),
    (("train/cat", "train/dog", "dev/cat", "valid/cat"), "two folders for validation, dev and valid; merge them"),
    (("cat", "dog", "test"), "holds test beside cat, dog, and no train: put the classes to train on into"),
    (("cat", "dog", "val"), "holds val beside cat, dog, and no train"),
    (("test/cat", "test/dog"), "holds test alone, and no train"),
    (("val/cat", "val/dog", "test/cat", "test/dog"), "holds val and test alone, and no train"),
    (("train/cat", "train/dog", "bird"), "holds train, without a [a-z]* of its own, beside bird"),
    (("train_set/cat", "test_set/cat"), "test_set and train_set, which look like parts .*: rename them"),
    (("my-train/cat", "my-val/cat"), "my-train and my-val, which look like parts"),
    (("train/cat", "train/dog", "test/cat", "test/bird"), "must hold the same classes; only one of them has bird, dog"),
    (("train/cat", "train/dog", "val/cat", "val/Dog"), "Dog, dog .some differ only in case"),
    (("train/cat", "train/dog", "test"), "test must hold a folder for each of two classes or more, found none and 4"),
    (("zoo/cat", "zoo/dog"), "found only 'zoo'.*; give .*zoo, if that holds the classes"),
])
def test_layouts_that_would_be_a_guess_are_refused(tree, folders, message):
    if os.path.exists(tree.root.parent / "A") and "Train/cat" in folders: pytest.skip("names of files without case")
    tree.fill(*folders)
    with pytest.raises(ValueError, match=message): tree.load()


@pytest.mark.parametrize("given, least", [(("train",), 3), (("train", "val"), 2), (("train", "test"), 2)])
def test_as_many_files_as_parts_are_drawn(tree, given, least):
    for p in given: tree.fill(f"{p}/cat", f"{p}/dog", n=least)
    assert all(sizes(tree.load(val_as="validation")))
    shutil.rmtree(tree.root / "train/dog")
    tree.fill("train/dog", n=least - 1)
    with pytest.raises(ValueError, match=rf"train has too few files of dog \({least - 1}\): a class needs at least {least}"):
        tree.load()


def test_no_share_takes_a_class_from_train(tree):
    tree.fill("cat", "dog", n=10)
    assert sizes(tree.load(test=.99, validation=.99)) == [2, 2, 16]


# What is read

def test_sub_folders_belong_to_their_class(tree):
    tree.fill("cat", "cat/2023", "cat/2024/may", "dog", "dog/2023", "dog/2024/may", n=5)
    assert sum(sizes(tree.silent())) == 30
    for c in ("cat", "dog"):
        for i in range(5): (tree.root / c / f"{i}{tree.suffix}").unlink()
    real = tree.silent()
    assert sum(sizes(real)) == 20 and real.classes == ("cat", "dog")


def test_classes_are_in_natural_order(tree):
    tree.fill("class10", "class2", "class1", "Class 3")
    assert tree.silent().classes == ("Class 3", "class1", "class2", "class10")


def test_many_suffixes_in_any_case(tree):
    suffixes = {"image": (".png", ".tif", ".TIFF", ".JPG", ".jfif", ".ppm"), "sound": SOUND_SUFFIXES + (".AIFF", ".WAV")}
    for suffix in suffixes[tree.kind]:
        for c in ("cat", "dog"): tree.fill(f"{c}/{suffix[1:]}x", n=1, suffix=suffix)
    assert sum(sizes(tree.silent())) == 2 * len(suffixes[tree.kind])


def test_one_suffix_alone(tree):
    tree.fill("cat", "dog", suffix={"image": ".tif", "sound": ".mp3"}[tree.kind])
    assert sum(sizes(tree.silent())) == 8


def test_links_are_followed_and_loops_are_not(tree, tmp_path):
    tree.fill("cat", "dog")
    Tree(tree.kind, tmp_path / "else").fill("birds")
    (tree.root / "bird").symlink_to(tmp_path / "else/birds")
    (tree.root / "cat/again").symlink_to(tree.root / "cat")
    (tree.root / "dog/up").symlink_to(tree.root)
    (tree.root / "dog/there").symlink_to(tmp_path / "else")
    (tmp_path / "else/back").symlink_to(tree.root / "dog")
    (tmp_path / "else/birds/round").symlink_to(tree.root)
    (tree.root / "eel").symlink_to(tmp_path / "gone")
    (tree.root / "dog/self").symlink_to(tree.root / "dog/self")
    (tree.root / f"dog/lost{tree.suffix}").symlink_to(tmp_path / "gone")
    with pytest.warns(UserWarning, match="3 by a broken link") as told: real = tree.load()
    message = str(told[0].message)
    assert "by a broken link, such as eel" in message and "by a link in a circle, such as" in message
    assert real.classes == ("bird", "cat", "dog")
    assert sum(sizes(real)) == 12 + 4, "the birds twice: as a class, and where a link in dog leads"


# What is left out

@pytest.mark.parametrize("name, says", [
    ("cat/notes.txt", "(.txt, such as cat/notes.txt)"),
    ("cat/7", "(without a suffix, such as cat/7)"),
    ("dog/a.heic", {"image": "`magick mogrify -format png *.heic`", "sound": "'image_folder'"}),
    ("dog/a.mp4", {"image": "`ffmpeg -i FILE.mp4 FILE-%04d.png`", "sound": "`ffmpeg -i FILE.mp4 -vn FILE.wav`"}),
    ("dog/a.M4A", {"image": "'sound_folder'", "sound": "`ffmpeg -i FILE.m4a FILE.wav`"}),
    ("dog/may/a.zip", "(.zip, such as dog/may/a.zip; unpack them)"),
    ("dog/a.npz", "RealData.from_tensors takes arrays"),
    ("a.zip", "(.zip beside the folders, such as a.zip; unpack them)"),
])
def test_what_is_left_out_is_told_with_its_remedy(tree, name, says):
    tree.fill("cat", "dog").put(name, ".hidden", "cat/Thumbs.db")
    says = says[tree.kind] if isinstance(says, dict) else says
    with pytest.warns(UserWarning, match="pets: read 8 [a-z]*, left out 3: 1 ") as told: real = tree.load()
    assert len(told) == 1 and told[0].filename == __file__ and says in str(told[0].message)
    assert "1 hidden" in real.about["remark"] and "1 of bookkeeping" in real.about["remark"]


def test_a_file_of_the_kind_beside_the_classes_is_told(tree):
    tree.fill("cat", "dog", ".", n=4)
    with pytest.warns(UserWarning, match=f"read 8 [a-z]*, left out 4: 4 {tree.suffix} beside the folders"): tree.load()


def test_a_folder_beside_the_parts_is_told(tree):
    tree.fill("train/cat", "train/dog", "test/cat", "test/dog", "raw")
    with pytest.warns(UserWarning, match="1 folder beside those of the parts .*, such as raw"): tree.load()


def test_nobody_is_told_of_bookkeeping(tree):
    tree.fill("cat", "dog").put("README.md", "LICENSE", "labels.csv", "cat/.DS_Store", "dog/desktop.ini", "__MACOSX/._cat")
    assert tree.silent().about["remark"].startswith("read 8 ")


def test_an_empty_class_says_what_it_holds(tree):
    tree.fill("cat", "dog").put("eel/a.txt", "eel/b.txt")
    with pytest.raises(ValueError, match=r"class folder .*eel holds 2 .txt, and no .* that ends in .*; fill it or take it away"):
        tree.load()
    shutil.rmtree(tree.root / "eel")
    (tree.root / "eel/sub").mkdir(parents=True)
    with pytest.raises(ValueError, match="class folder .*eel is empty, and no"): tree.load()


# The folder and its name

def test_the_folder_itself(tree, tmp_path):
    tree.fill("cat", "dog").put("a.csv")
    for given in (None, 3, "", b"pets"):
        with pytest.raises(ValueError, match=f"folder must be the path of a folder, .*got {given!r}"): tree.load(folder=given)
    with pytest.raises(NotADirectoryError, match=r"folder must name .*a\.csv', which is a file"):
        tree.load(folder=tree.root / "a.csv")
    with pytest.raises(FileNotFoundError, match="folder must name .*gone': there is none"): tree.load(folder=tmp_path / "gone")


def test_names(tree):
    tree.fill("cat", "dog")
    assert tree.load(name="my pets").name == "my pets"
    for name, message in (("MNIST", "registered data set"), ("a/b", "without slashes"), (7, "a word or more"),
                          (" ", "a word or more")):
        with pytest.raises(ValueError, match=f"name must .*{message}"): tree.load(name=name)
    tree.root = tree.root.rename(tree.root.with_name("cifar10"))
    assert tree.load().name == "cifar10 (folder)"


def test_numbers_of_numpy_are_numbers(tree):
    tree.fill("cat", "dog")
    more = dict(size=np.int64(8), channels=np.int8(3)) if tree.kind == "image" else dict(sample_rate=np.int32(8_000))
    real = tree.load(validation=np.float32(.1), test=np.float64(.2), seed=np.int64(0), **more)
    assert real.fingerprint == tree.load().fingerprint


def test_no_augmentation_by_none_or_nothing(tmp_path):
    tree = Tree("image", tmp_path / "pets").fill("cat", "dog")
    assert tree.load(strategy=None).strategy == tree.load(strategy="").strategy == ""
    assert tree.load(strategy=None).fingerprint == tree.load(strategy="").fingerprint


def test_summary_has_no_path_of_this_machine(tree, tmp_path):
    tree.fill("cat", "dog").put("cat/notes.txt")
    with pytest.warns(UserWarning) as told: real = tree.load()
    assert str(tmp_path) not in str(real.about) and str(tmp_path) not in str(told[0].message)
    assert re.match(r"read 8 \w+, left out 1: 1 \.txt; test is 0\.2 of each class", real.about["remark"])
