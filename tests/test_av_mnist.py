"""av_mnist from real packs where there are any, and downloaded from made-up servers where there are none."""
import hashlib
import io
import shutil
import zipfile

import numpy as np
import pytest
import soundfile
import torch
from torchvision.datasets import MNIST

import ddrepro.data.sets.av_mnist as chapter
from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed
from helpers import idx, served

SIZES = {"train": (54001, "train"), "validation": (5999, "train"), "test": (10000, "test")}


def made_fsdd():
    "Two speakers, ten digits, fifty takes of noise; the archive, and the SHA-256 of its waves in order"
    content, waves = io.BytesIO(), []
    with zipfile.ZipFile(content, "w") as file:
        for digit in range(10):
            for speaker in ("ada", "bob"):
                for take in range(50):
                    wave = (8000 * keyed(0, "made", digit, speaker, take).standard_normal(200 + take)).astype(np.int16)
                    soundfile.write(wav := io.BytesIO(), wave, 8000, format="WAV", subtype="PCM_16")
                    file.writestr(f"made/recordings/{digit}_{speaker}_{take}.wav", wav.getvalue())
                    waves.append(wave.tobytes())
    return content.getvalue(), hashlib.sha256(b"".join(waves)).hexdigest()


@pytest.fixture
def made(tmp_path, monkeypatch):
    "A server with small files in the formats of MNIST and FSDD, which the chapter is told to trust"
    site = tmp_path / "site"
    site.mkdir()
    draw = keyed(0, "made")
    resources = []
    proofs = {}
    for prefix, part, n in (("train", "mnist_train", 400), ("t10k", "mnist_test", 100)):
        arrays = {"images": (draw.random((n, 28, 28)) * 255).astype(np.uint8), "labels": np.arange(n) % 10}
        proofs[part] = {k: hashlib.sha256(x.tobytes()).hexdigest() for k, x in arrays.items()}
        for k, kind in (("images", "idx3"), ("labels", "idx1")):
            name = f"{prefix}-{k}-{kind}-ubyte.gz"
            (site / name).write_bytes(idx(arrays[k]))
            resources.append((name, hashlib.md5((site / name).read_bytes()).hexdigest()))
    archive, sha = made_fsdd()
    (site / "fsdd.zip").write_bytes(archive)
    arrays = chapter.read_archive(archive)
    proofs["fsdd"] = {k: hashlib.sha256(x.tobytes()).hexdigest() for k, x in arrays.items()} | {"audio": sha}
    with served(site) as address:
        monkeypatch.setattr(MNIST, "mirrors", [address])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setattr(chapter, "FSDD_URL", address + "fsdd.zip")
        monkeypatch.setattr(chapter, "SHA", proofs)
        yield site, tmp_path / "data"


def test_what_is_not_there_is_downloaded_once(made):
    site, root = made
    assert chapter.where_av_mnist(root) == ""
    real = chapter.av_mnist(root=root)
    assert {p: len(getattr(real, p)) for p in SIZES} == {"train": 360, "validation": 40, "test": 100}
    assert sorted(p.name for p in (root / "av_mnist").iterdir()) == ["fsdd.npz", "mnist_test.npz", "mnist_train.npz"]
    assert chapter.where_av_mnist(root) == "downloaded"
    shutil.rmtree(site)
    assert chapter.av_mnist(root=root, download=False).fingerprint == real.fingerprint


@pytest.mark.parametrize("name", ["fsdd.zip", "train-images-idx3-ubyte.gz"])
def test_a_damaged_download_is_refused_and_leaves_nothing(made, name):
    site, root = made
    content = (site / name).read_bytes()
    for damaged in (content[:len(content) // 2], content[:len(content) // 3] + b"??" + content[len(content) // 3 + 2:]):
        (site / name).write_bytes(damaged)
        with pytest.raises((DamagedFile, ConnectionError), match="set DDREPRO_DATA"): chapter.av_mnist(root=root)
        left = {p.name for p in root.rglob("*") if p.is_file()}
        assert left <= {"mnist_train.npz", "mnist_test.npz"} and not (name.startswith("train") and left)
    (site / name).write_bytes(content)
    assert len(chapter.av_mnist(root=root).test) == 100


@pytest.mark.parametrize("pack, array", [
    ("fsdd", "audio"),
    ("fsdd", "take"),
    ("mnist_test", "images"),
    ("mnist_train", "labels"),
])
def test_another_version_is_refused(made, monkeypatch, pack, array):
    monkeypatch.setitem(chapter.SHA[pack], array, "0" * 64)
    with pytest.raises(ValueError, match=f"{array}.* is damaged or another version"): chapter.av_mnist(root=made[1])
    assert not (made[1] / f"av_mnist/{pack}.npz").exists()


def test_no_network_names_both_ways(made, monkeypatch):
    monkeypatch.setattr(chapter, "FSDD_URL", "http://127.0.0.1:9/fsdd.zip")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    for name in chapter.PACKS:
        with pytest.raises(ConnectionError, match="set DDREPRO_DATA to a folder.*machine with a network"):
            chapter.obtain(name, made[1])


def test_a_damaged_pack_is_refused(made):
    site, root = made
    chapter.av_mnist(root=root)
    pack = root / "av_mnist/mnist_test.npz"
    good = pack.read_bytes()
    for i in range(0, len(good), 397):
        for damaged in (good[:i], good[:i] + bytes([good[i] ^ 16]) + good[i + 1:]):
            pack.write_bytes(damaged)
            try: arrays = chapter.obtain("mnist_test", root)
            except ValueError as error: assert "damaged" in str(error)
            else:
                assert all(hashlib.sha256(arrays[k].tobytes()).hexdigest() == sha
                           for k, sha in chapter.SHA["mnist_test"].items())


def test_the_real_packs(data_root):
    if not all((data_root / name).is_file() for name in chapter.PACKS.values()):
        pytest.skip("no packs of MNIST and FSDD there")
    assert chapter.where_av_mnist() == "DDREPRO_DATA packs"
    real, fsdd = chapter.av_mnist(download=False), chapter.obtain("fsdd")
    assert {p: len(getattr(real, p)) for p in SIZES} == {p: n for p, (n, _) in SIZES.items()}
    assert real.shapes == {"image": (1, 28, 28), "audio": (1, 32, 32)}
    assert real.train.inputs["image"].dtype == torch.uint8
    both = torch.cat([real.train.labels, real.validation.labels]).bincount().tolist()
    assert both == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert real.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    heard = {p: chapter.pair_recordings(p, getattr(real, p).labels.numpy(), fsdd) for p in SIZES}
    for p, recordings in heard.items():
        assert (fsdd["labels"][recordings] == getattr(real, p).labels.numpy()).all()
        assert set(fsdd["take"][recordings].tolist()) == set(chapter.TAKES[p])
    assert [len(np.unique(r)) for r in heard.values()] == [2400, 300, 300]
    batch = real.batch("train", range(0, 54001, 10))
    for x in batch.values(): assert abs(x.mean()) < .02 and abs(x.std() - 1) < .02


def test_fewer_pairs_are_some_of_all(data_root):
    if not all((data_root / name).is_file() for name in chapter.PACKS.values()):
        pytest.skip("no packs of MNIST and FSDD there")
    few = chapter.av_mnist(train_per_class=50, download=False)
    assert few.train.labels.bincount().tolist() == [50] * 10 and len(few.validation) == 5999
