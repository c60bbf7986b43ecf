"""The image sets from small made-up files of every published format, from the real packs, and from folders."""
import hashlib
import io
import re
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.transforms import functional

import ddrepro.data.sets.image_sets as chapter
from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed
from ddrepro.data.folder_walk import PICTURE_SUFFIXES
from ddrepro.data.pictures import read_image
from ddrepro.data.real import DIGITS, FULL
from ddrepro.data.registry import list_data, load_data
from ddrepro.data.sets.folders import image_folder, median_size
from helpers import idx, served

# shape, sizes, classes, constants and augmentation as the papers have them
PROTOCOL = {
    "mnist": ((1, 28, 28), 60000, 10000, 10, (.1307,), (.3081,), DIGITS),
    "fashion_mnist": ((1, 28, 28), 60000, 10000, 10, (.2861,), (.3530,), FULL),
    "svhn": ((3, 32, 32), 73257, 26032, 10, (.4377, .4438, .4728), (.1980, .2010, .1970), DIGITS),
    "cifar10": ((3, 32, 32), 50000, 10000, 10, (.4914, .4822, .4465), (.2023, .1994, .2010), FULL),
    "cifar100": ((3, 32, 32), 50000, 10000, 100, (.5071, .4866, .4409), (.2673, .2564, .2762), FULL)}
NAMES = list(PROTOCOL)


@pytest.mark.parametrize("name", NAMES)
def test_constants_are_the_protocols(name):
    known = chapter.IMAGE_SETS[name]
    sizes = known.train, known.test, len(known.classes)
    constants = known.normalisation.mean, known.normalisation.std
    assert (known.shape, *sizes, *constants, known.strategy) == PROTOCOL[name]
    row = list_data().set_index("name").loc[name]
    assert (row.modalities, row.classes, row.sizes) == ("image", len(known.classes), known.sizes)


# Files of the published formats, small

SIZES = {"train": 200, "test": 100}


def labels_of(name, part):
    "As many of each class, in no order"
    classes = 100 if name == "cifar100" else 10
    labels = np.arange(SIZES[part]) % classes
    return labels[np.argsort(keyed(0, "labels", part).random(len(labels)))]


def images_of(name, part):
    shape = chapter.IMAGE_SETS[name].shape
    return keyed(0, "images", name, part).integers(0, 256, (SIZES[part], *shape), dtype=np.uint8)


def sha(array): return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def archive(files):
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"made/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def svhn_file(part):
    images, labels = images_of("svhn", part), labels_of("svhn", part)
    y = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    savemat(made := io.BytesIO(), {"X": images.transpose(2, 3, 1, 0), "y": y})
    return made.getvalue()


def cifar_rows(name, part):
    labels = labels_of(name, part)
    columns = [labels] if name == "cifar10" else [labels // 5, labels]      # coarse before fine
    return np.concatenate([np.stack(columns, 1).astype(np.uint8), images_of(name, part).reshape(len(labels), -1)], 1)


def cifar10_file():
    batches = {f"data_batch_{i + 1}.bin": rows.tobytes()
               for i, rows in enumerate(np.split(cifar_rows("cifar10", "train"), 5))}
    names = "\n".join(chapter.OBJECTS).encode() + b"\n\n"
    return archive({"batches.meta.txt": names, **dict(sorted(batches.items(), reverse=True)),
                    "test_batch.bin": cifar_rows("cifar10", "test").tobytes()})


def cifar100_file():
    names = "\n".join(f"kind_{i:02}" for i in range(100)).encode()
    return archive({"coarse_label_names.txt": b"things", "fine_label_names.txt": names,
                    **{f"{p}.bin": cifar_rows("cifar100", p).tobytes() for p in SIZES}})


@pytest.fixture
def made(tmp_path, monkeypatch):
    "A server with small files of every set, which the chapter is told to trust"
    site = tmp_path / "site"
    site.mkdir()
    proofs = {}
    for name, kind in (("mnist", MNIST), ("fashion_mnist", FashionMNIST)):
        (site / name).mkdir()
        resources, proofs[name] = [], {}
        for prefix, p in (("train", "train"), ("t10k", "test")):
            images, labels = images_of(name, p)[:, 0], labels_of(name, p)
            order = np.argsort(labels, kind="stable") if name == "fashion_mnist" else slice(None)
            proofs[name][p] = {"images": sha(images[order]), "labels": sha(labels[order])}
            for file, array in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
                (site / name / file).write_bytes(idx(array))
                resources.append((file, hashlib.md5((site / name / file).read_bytes()).hexdigest()))
        monkeypatch.setattr(kind, "resources", resources)
    files = {
        "svhn": {f"{p}_32x32.mat": svhn_file(p) for p in SIZES},
        "cifar10": {"cifar-10-binary.tar.gz": cifar10_file()},
        "cifar100": {"cifar-100-binary.tar.gz": cifar100_file()},
    }
    md5 = {name: {f: hashlib.md5(c).hexdigest() for f, c in contents.items()} for name, contents in files.items()}
    for contents in files.values():
        for file, content in contents.items(): (site / file).write_bytes(content)
    with served(site) as address:
        monkeypatch.setattr(MNIST, "mirrors", [f"{address}mnist/"])
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"{address}fashion_mnist/"])
        monkeypatch.setattr(chapter, "SITE", dict.fromkeys(files, address))
        monkeypatch.setattr(chapter, "ARCHIVES", md5)
        monkeypatch.setattr(chapter, "PROOFS", proofs | {"cifar10": chapter.PROOFS["cifar10"]})
        yield site, tmp_path / "data"


def pixels(*parts):
    return sorted(x.tobytes() + bytes([y]) for p in parts for x, y in zip(p.inputs["image"].numpy(), p.labels.numpy()))


def expected_pixels(name, part):
    return sorted(x.tobytes() + bytes([y])
                  for x, y in zip(images_of(name, part), labels_of(name, part).astype(np.uint8)))


@pytest.mark.parametrize("name", NAMES)
def test_every_set_is_downloaded_once_and_read_as_it_was_written(made, name):
    site, root = made
    assert chapter.where_images(name, root) == ""
    real = load_data(name, root=root)
    shape, *_, strategy = PROTOCOL[name]
    classes = PROTOCOL[name][3]
    constants = PROTOCOL[name][4:6]
    assert chapter.where_images(name, root) == "downloaded" and {p.name for p in root.iterdir()} == {"torchvision"}
    assert real.shapes == {"image": shape} and real.train.inputs["image"].dtype == torch.uint8
    assert pixels(real.train, real.validation) == expected_pixels(name, "train")
    assert pixels(real.test) == expected_pixels(name, "test")
    share = max(1, round(.1 * SIZES["train"] / classes))
    assert real.validation.labels.bincount().tolist() == [share] * classes and len(real.classes) == classes
    assert (real.normalisation["image"].mean, real.normalisation["image"].std) == constants
    assert real.strategy == strategy
    assert real.about["source"] == chapter.IMAGE_SETS[name].source
    assert real.about["published"]
    assert "0.1 of the published train" in real.about["remark"]
    assert "JPEG" not in real.about["remark"]
    shutil.rmtree(site)
    again = load_data(name, root=root, download=False)
    assert again.fingerprint == real.fingerprint
    few = load_data(name, root=root, download=False, train_per_class=1, validation=.25)
    assert few.train.labels.bincount().tolist() == [1] * classes
    assert len(few.validation) == max(1, round(.25 * SIZES["train"] / classes)) * classes
    assert len(few.test) == SIZES["test"]
    assert load_data(name, root=root, train_per_class=1).train.labels.bincount().max() == 1


def test_names_of_the_hundred_come_from_the_archive(made):
    ours = chapter.cifar100(root=made[1])
    theirs = chapter.cifar100(root=made[1], constants="cifar10")
    assert ours.classes[:2] == ("kind_00", "kind_01")
    assert theirs.normalisation["image"] == chapter.IMAGE_SETS["cifar10"].normalisation != ours.normalisation["image"]
    assert theirs.fingerprint != ours.fingerprint and "CIFAR-10's constants" in theirs.about["remark"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_download_is_refused_and_leaves_nothing_to_read(made, name):
    site, root = made
    file = next(p for p in sorted((site / name if (site / name).is_dir() else site).iterdir())
                if p.is_file() and p.name in {*chapter.ARCHIVES.get(name, ()), "train-images-idx3-ubyte.gz"})
    good = file.read_bytes()
    for damaged in (good[:len(good) // 2], good[:len(good) // 3] + b"??" + good[len(good) // 3 + 2:]):
        file.write_bytes(damaged)
        with pytest.raises((DamagedFile, ConnectionError), match="on a machine with a network"):
            load_data(name, root=root)
        assert chapter.where_images(name, root) == ""
    file.write_bytes(good)
    assert len(load_data(name, root=root).test) == SIZES["test"]


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_by_name(made, name):
    root = made[1]
    load_data(name, root=root)
    for path in sorted(p for p in (root / "torchvision").rglob("*")
                       if p.is_file() and p.suffix != ".gz" or p.name.endswith("tar.gz")):
        good = path.read_bytes()
        for damaged in (good[:3], good[:len(good) // 2], good[:-1] + bytes([good[-1] ^ 1])):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{re.escape(str(root / 'torchvision'))}.* damaged"):
                load_data(name, root=root, download=False)
        path.write_bytes(good)


@pytest.mark.parametrize("name", NAMES)
def test_neither_files_nor_network_names_all_ways(made, monkeypatch, name):
    root, nowhere = made[1], "http://127.0.0.1:9/"
    for kind in (MNIST, FashionMNIST): monkeypatch.setattr(kind, "mirrors", [nowhere])
    monkeypatch.setattr(chapter, "SITE", dict.fromkeys(chapter.ARCHIVES, nowhere))
    places = [
        str(root / "torchvision"),
        f"load_data('{name}') on a machine with a network",
        *chapter.pack_names(name).values(),
        *chapter.ARCHIVES.get(name, ()),
    ]
    for error, download in ((ConnectionError, True), (FileNotFoundError, False)):
        with pytest.raises(error) as raised: load_data(name, root=root, download=download)
        for place in [name, *places]: assert place in str(raised.value)


def write_packs(root, monkeypatch, name):
    "Packs of a set from its made-up pictures, which the chapter is told to trust"
    proofs = {}
    for p in SIZES:
        images, labels = images_of(name, p), labels_of(name, p)
        order = np.argsort(labels, kind="stable")
        arrays = {"images": images[:, 0], "labels": labels}
        if name == "fashion_mnist": arrays = {k: x[order] for k, x in arrays.items()}
        if name == "cifar10":
            files = []
            for image in images:
                Image.fromarray(image.transpose(1, 2, 0)).save(file := io.BytesIO(), "JPEG", quality=75)
                files.append(np.frombuffer(file.getvalue(), np.uint8))
            arrays = {"jpeg": np.concatenate(files), "offsets": np.cumsum([0, *map(len, files)]), "labels": labels}
        path = root / chapter.pack_names(name)[p]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
        proofs[p] = {k: sha(x) for k, x in arrays.items()}
    monkeypatch.setattr(chapter, "PROOFS", chapter.PROOFS | {name: proofs})


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_packs_and_downloads_are_the_same_data(made, tmp_path, monkeypatch, name):
    downloaded = load_data(name, root=made[1])
    write_packs(tmp_path / "packs", monkeypatch, name)
    assert chapter.where_images(name, tmp_path / "packs") == "DDREPRO_DATA packs"
    assert load_data(name, root=tmp_path / "packs", download=False).fingerprint == downloaded.fingerprint


def test_mnist_that_av_mnist_downloaded_is_used(tmp_path, monkeypatch):
    write_packs(tmp_path, monkeypatch, "mnist")
    (tmp_path / "mnist").rename(tmp_path / "av_mnist")
    assert chapter.where_images("mnist", tmp_path) == "downloaded"
    assert len(load_data("mnist", root=tmp_path, download=False).test) == 100


def test_cifar10_as_jpeg_says_so_and_gives_way_to_the_original(made, monkeypatch):
    root = made[1]
    write_packs(root, monkeypatch, "cifar10")
    real = load_data("cifar10", root=root)
    assert chapter.where_images("cifar10", root) == "DDREPRO_DATA packs (JPEG)"
    remark = "decoded from JPEG quality 75: not exactly comparable with the original pixels"
    assert real.about["remark"].startswith(remark)
    assert not (root / "torchvision").exists()
    assert len(real.train) + len(real.validation) == 200
    assert real.classes == chapter.OBJECTS
    Image.fromarray(images_of("cifar10", "test")[4].transpose(1, 2, 0)).save(file := io.BytesIO(), "JPEG", quality=75)
    assert (real.test.inputs["image"][4].numpy().transpose(1, 2, 0) == np.asarray(Image.open(file))).all()
    chapter.downloads(root).mkdir()
    shutil.copy(made[0] / "cifar-10-binary.tar.gz", chapter.downloads(root))
    original = load_data("cifar10", root=root, download=False)
    assert "JPEG" not in original.about["remark"] and pixels(original.test) == expected_pixels("cifar10", "test")


@pytest.mark.parametrize("name, array", [
    ("mnist", "images"),
    ("fashion_mnist", "labels"),
    ("cifar10", "jpeg"),
    ("cifar10", "offsets"),
])
def test_another_pack_is_refused(tmp_path, monkeypatch, name, array):
    write_packs(tmp_path, monkeypatch, name)
    monkeypatch.setitem(chapter.PROOFS[name]["test"], array, "0" * 64)
    with pytest.raises(ValueError, match=f"{array} of .*{name}_test.* is damaged or another version"):
        load_data(name, root=tmp_path, download=False)
    path = tmp_path / chapter.pack_names(name)["test"]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedFile, match="damaged or not a pack"): load_data(name, root=tmp_path, download=False)


def test_half_a_pair_of_packs_is_none(tmp_path, monkeypatch):
    write_packs(tmp_path, monkeypatch, "fashion_mnist")
    (tmp_path / chapter.pack_names("fashion_mnist")["test"]).unlink()
    with pytest.raises(FileNotFoundError, match="fashion_mnist_test.npz"):
        load_data("fashion_mnist", root=tmp_path, download=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option, words", [
    (dict(train_per_class=0), "at least 1"),
    (dict(validation=0), "between 0 and 1"),
    (dict(validation=1.), "between 0 and 1"),
])
def test_options_out_of_range_are_refused_before_anything_is_read(tmp_path, name, option, words):
    with pytest.raises(ValueError, match=words): load_data(name, root=tmp_path, **option)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(made, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))): load_data("cifar100", root=tmp_path / "file")


# The real packs

@pytest.fixture(scope="module")
def packs():
    "Loads a real set once, or skips"
    loaded = {}

    def load(name):
        if not chapter.find_packs(name): pytest.skip(f"no packs of {name} in the folder of data sets")
        if name not in loaded: loaded[name] = load_data(name, download=False)
        return loaded[name]
    return load


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_the_real_packs(packs, data_root, name):
    real, known = packs(name), chapter.IMAGE_SETS[name]
    assert "/".join(str(len(p)) for p in (real.train, real.validation, real.test)) == known.sizes
    assert real.shapes == {"image": known.shape} and real.train.inputs["image"].dtype == torch.uint8
    both = (real.train.labels.bincount() + real.validation.labels.bincount()).tolist()
    expected = [known.train // 10] * 10, [1000] * 10
    if name == "mnist":
        expected = ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
                    [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert (both, real.test.labels.bincount().tolist()) == expected
    images = torch.cat([real.train.inputs["image"], real.validation.inputs["image"]])
    x = images.transpose(0, 1).flatten(1)[:, ::13].float() / 255
    constants = real.normalisation["image"]
    assert (x.mean(1) - torch.tensor(constants.mean)).abs().max() < 1e-3
    if name == "cifar10":
        # of the pixels, unlike the authors' constants
        assert (x.std(1) - torch.tensor([.2470, .2435, .2616])).abs().max() < 3e-3
        inside = real.train.inputs["image"][::5].float().div(255).flatten(2).std(2).mean(0)
        # which are means over images, less some detail in JPEG
        assert (inside - torch.tensor(constants.std)).abs().max() < 3e-3
        assert "JPEG" in real.about["remark"] and chapter.where_images(name) == "DDREPRO_DATA packs (JPEG)"
    else:
        assert (x.std(1) - torch.tensor(constants.std)).abs().max() < 1e-3
        assert chapter.where_images(name) == "DDREPRO_DATA packs"


def test_parts_of_a_real_set_are_disjoint_and_cover_it(packs, data_root):
    real = packs("fashion_mnist")
    prints = [{hashlib.md5(x.tobytes()).digest() for x in getattr(real, p).inputs["image"].numpy()}
              for p in ("train", "validation", "test")]
    assert [len(p) for p in prints] == [54000, 6000, 10000] and len(set.union(*prints)) == 70000


# Digits

def test_digits_are_embedded():
    real = load_data("digits")
    assert real.train.labels.bincount().tolist() == [110] * 10 and real.strategy == DIGITS and not real.signals
    assert [len(p) for p in (real.train, real.validation, real.test)] == [1100, 240, 400]
    assert load_data("digits").fingerprint == real.fingerprint
    batch = real.batch("train", range(1100))["image"]
    assert abs(batch.mean()) < 1e-3 and abs(batch.std() - 1) < 1e-2


# Your own folder

def write_folder(root, classes=("ant", "bee"), n=5, size=(24, 16), suffix=".png", mode="RGB"):
    for c in classes:
        (root / c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            noise = keyed(0, "picture", c, i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).convert(mode).save(root / c / f"{i}{suffix}")
    return root


@pytest.mark.parametrize("suffix", [*PICTURE_SUFFIXES, ".PNG", ".Jpg"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    real = image_folder(write_folder(tmp_path / "insects", suffix=suffix, mode=mode))
    assert real.name == "insects" and real.classes == ("ant", "bee") and real.shapes == {"image": (3, 16, 16)}
    assert [p.labels.tolist() for p in (real.train, real.validation, real.test)] == [[0] * 3 + [1] * 3, [0, 1], [0, 1]]
    assert str(tmp_path) not in str(real.about) and not real.about["published"]


def test_the_split_is_keyed_and_constants_are_of_train(tmp_path):
    folder = write_folder(tmp_path, n=20)
    real, same, other = (image_folder(folder, seed=seed) for seed in (0, 0, 1))
    assert real.fingerprint == same.fingerprint != other.fingerprint
    assert [len(p) for p in (real.train, real.validation, real.test)] == [28, 4, 8]
    prints = [set(pixels(getattr(real, p))) for p in ("train", "validation", "test")]
    assert len(set.union(*prints)) == 40
    x = real.train.inputs["image"].float().div(255).transpose(0, 1).flatten(1)
    np.testing.assert_allclose(real.normalisation["image"].mean, x.mean(1), atol=1e-4)
    np.testing.assert_allclose(real.normalisation["image"].std, x.std(1, correction=0), atol=1e-4)


@pytest.mark.parametrize("size", [(100, 40), (17, 9), (8, 64)])
def test_resizing_is_bilinear_with_antialias_then_a_centre_crop(tmp_path, size):
    folder = write_folder(tmp_path, size=size, n=3)
    real = image_folder(folder, size=16)
    image = torch.from_numpy(np.array(Image.open(folder / "ant/0.png"))).permute(2, 0, 1).float()
    side = functional.resize(image, 16, antialias=True)
    wanted = functional.center_crop(side, 16).round()
    everything = torch.cat([getattr(real, p).inputs["image"] for p in ("train", "validation", "test")]).float()
    assert (everything - wanted).abs().amax((1, 2, 3)).min() <= 1


@pytest.mark.parametrize("sides, expected", [
    ([32, 32], 32),
    ([30, 35], 32),
    ([3, 5], 8),
    ([500, 400, 300], 64),
    ([43, 43, 12], 40),
    ([64, 20, 21], 24),
])
def test_default_size_is_near_the_median(tmp_path, sides, expected):
    for i, side in enumerate(sides): Image.new("L", (side, side + i)).save(tmp_path / f"{i}.png")
    assert median_size(sorted(tmp_path.iterdir())) == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path, mode, channels):
    grey = np.repeat(np.arange(0, 256, 17, dtype=np.uint8)[None], 16, 0)
    if mode == "1": grey = np.where(grey > 100, 255, 0).astype(np.uint8)
    if mode == "I;16": image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "P": image = Image.fromarray(grey).convert("RGB").convert("P")
    else: image = Image.fromarray(grey).convert(mode)
    jpeg = mode in ("CMYK", "YCbCr")
    path = tmp_path / ("x.jpg" if jpeg else "x.png")
    if jpeg: image.save(path, quality=100)
    else: image.save(path)
    tolerance = {"P": 26, "CMYK": 3, "YCbCr": 3}.get(mode, 0)
    read = np.asarray(read_image(path, channels)).astype(int)
    assert read.shape == ((16, 16) if channels == 1 else (16, 16, 3))
    assert np.abs(read.reshape(16, 16, -1) - grey[..., None].astype(int)).max() <= tolerance


def test_transparency_is_white_and_a_gif_its_first_frame(tmp_path):
    half = Image.new("RGBA", (9, 9), (0, 0, 0, 51))
    half.save(tmp_path / "half.png")
    assert np.unique(read_image(tmp_path / "half.png")).tolist() == [204]
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.unique(read_image(tmp_path / "palette.png")).tolist() == [255]
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "two.gif").getpixel((4, 4)) == (255, 0, 0)


def test_exif_turns_a_photograph(tmp_path):
    image = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}          # tag → Pillow's transposition
    for orientation, turn in turns.items():
        (tag := Image.Exif())[0x0112] = orientation
        image.save(path := tmp_path / f"{orientation}.png", exif=tag)
        wanted = image if turn is None else image.transpose(turn)
        assert (np.asarray(read_image(path, 1)) == np.asarray(wanted)).all(), orientation


def test_given_parts_are_kept(tmp_path):
    write_folder(tmp_path / "train", n=10)
    write_folder(tmp_path / "test", n=2)
    real = load_data("image_folder", folder=str(tmp_path), size=8, channels=1)
    assert [len(p) for p in (real.train, real.validation, real.test)] == [18, 2, 4]
    assert real.shapes == {"image": (1, 8, 8)}
    write_folder(tmp_path / "validation", n=3)
    assert [len(p) for p in (lambda r: (r.train, r.validation, r.test))(image_folder(tmp_path))] == [20, 6, 4]
    write_folder(tmp_path / "test", classes=("cat",))
    with pytest.raises(ValueError, match=r"must hold the same classes; only one of them has cat"):
        image_folder(tmp_path)


def test_what_is_no_picture_is_left_alone(tmp_path):
    before = image_folder(write_folder(tmp_path)).fingerprint
    for name in (".DS_Store", "ant/Thumbs.db", "ant/.hidden.png", "notes.txt", "ant/README.txt"):
        (tmp_path / name).write_text("no picture")
    write_folder(tmp_path, classes=(".cache",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real = image_folder(tmp_path)
    assert real.fingerprint == before
    counts = "read 10 pictures, left out 6: 3 hidden, 1 .txt beside the folders, 2 of bookkeeping;"
    assert real.about["remark"].startswith(counts)


def broken(folder):
    (folder / "bee/3.png").write_bytes((folder / "bee/3.png").read_bytes()[:200])


def foreign(folder):
    (folder / "bee/3.png").write_text("not a picture")


def missing(folder):
    shutil.rmtree(folder)


def unclassed(folder):
    for path in folder.glob("*/*"): path.rename(folder / f"{path.parent.name}{path.name}")
    for c in ("ant", "bee"): (folder / c).rmdir()


def empty(folder): (folder / "cow").mkdir()


def few(folder):
    for i in range(3): (folder / f"bee/{i}.png").unlink()


def alone(folder): shutil.rmtree(folder / "ant")


@pytest.mark.parametrize("damage, error, words", [
    (missing, FileNotFoundError, r"folder must name a folder .*insects"),
    (unclassed, ValueError, r"insects must hold a folder for each of two classes.*none and 10 .png beside"),
    (empty, ValueError, r"class folder .*cow is empty.*\.png.*fill it or take it away"),
    (broken, DamagedFile, r"bee.3\.png cannot be read as an image"),
    (foreign, DamagedFile, r"bee.3\.png cannot be read as an image"),
    (few, ValueError, r"insects has too few files of bee \(2\): .* at least 3"),
    (alone, ValueError, r"found only 'bee'"),
])
@pytest.mark.parametrize("size", [None, 16])
def test_what_is_wrong_with_a_folder_is_named(tmp_path, damage, error, words, size):
    folder = write_folder(tmp_path / "insects")
    damage(folder)
    with pytest.raises(error, match=words): image_folder(folder, size=size)


@pytest.mark.parametrize("option, words", [
    (dict(channels=2), "channels must be one of 1, 3"),
    (dict(channels="RGB"), "channels must be one of 1, 3; got 'RGB'"),
    (dict(channels=True), "channels must be one of 1, 3; got True"),
    (dict(size=0), "size must be a whole number of pixels, at least 8, got 0"),
    (dict(size=(32, 32)), r"size must be .*, got \(32, 32\)"),
    (dict(size="32"), "size must be .*, got '32'"),
    (dict(size=20.5), "size must be .*, got 20.5"),
    (dict(validation=0), "validation must be a number between 0 and 1, got 0"),
    (dict(test=1.5), "test must be a number between 0 and 1, got 1.5"),
    (dict(test="0.2"), "test must be .*, got '0.2'"),
    (dict(seed="a"), "seed must be a whole number, got 'a'"),
    (dict(strategy="color_crops"), "strategy='color_crops': .* the nearest is 'crop'"),
    (dict(strategy="none"), "strategy='none': .*; '' is no augmentation"),
    (dict(strategy=3), "strategy must be a text or None, got 3"),
    (dict(name="cifar10"), "name must not be that of a registered data set"),
    (dict(name="a/b"), "name must be without slashes"),
    (dict(val_as="train"), "val_as must be one of None, 'validation', 'test'; got 'train'"),
])
def test_wrong_options_of_a_folder_are_named_before_it_is_read(tmp_path, option, words):
    with pytest.raises(ValueError, match=words): image_folder(tmp_path, **option)


def test_every_byte_of_a_picture_may_be_damaged(tmp_path):
    folder = write_folder(tmp_path, n=3, size=(8, 8))
    for suffix in (".png", ".jpg", ".gif", ".webp", ".bmp"):
        Image.open(folder / "ant/0.png").save(path := tmp_path / f"x{suffix}")
        good = path.read_bytes()
        for i in range(0, len(good), 7):
            for damaged in (good[:i], good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1:]):
                path.write_bytes(damaged)
                try: assert read_image(path).mode == "RGB"
                except DamagedFile as error: assert path.name in str(error)
