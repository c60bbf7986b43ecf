"""Sets that others released: every layout, damaged and hostile files, and what is made of them."""
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import save_file

from ddrepro.cli import main
from ddrepro.core.files import DamagedFile
from ddrepro.data.real import Part, RealData
from ddrepro.data.registry import load_data
from ddrepro.data.sets.image_sets import IMAGE_SETS
from ddrepro.data.whitening import space_signs
from ddrepro.distill import released_sets
from ddrepro.distill.distilled import DistilledData, export
from ddrepro.distill.released_folders import open_released
from ddrepro.distill.released_formats import FAMILIES
from ddrepro.distill.released_sets import DeclaredSet, settled_for
from ddrepro.evaluate.classification import evaluation_job
from ddrepro.evaluate.tasks import evaluate
from ddrepro.nets.recipes import Recipe
from ddrepro.score_sets import ScoreRequest, prepared_of, score_set
from helpers import ENVIRONMENT, one_process

IPC = 2
LABELS = torch.arange(10).repeat_interleave(IPC)
HOT = torch.eye(10)[LABELS]
RANDOM = torch.Generator().manual_seed(0)


def like_pictures(*shape) -> torch.Tensor:
    "Smooth learned pictures of about unit variance"
    x = torch.nn.functional.interpolate(torch.randn(*shape[:2], 8, 8, generator=RANDOM), shape[2:], mode="bilinear")
    return x + .02 * torch.randn(shape, generator=RANDOM)


IMAGES = like_pictures(10 * IPC, 1, 32, 32)
PIXELS = (IMAGES - IMAGES.min()) / (IMAGES.max() - IMAGES.min())
NHWC = IMAGES.permute(0, 2, 3, 1).numpy()


# A file of every layout, as its family writes it

def packed(value) -> bytes:
    "msgpack as flax writes it"
    if isinstance(value, dict):
        return b"\xde" + struct.pack(">H", len(value)) + b"".join(packed(k) + packed(x) for k, x in value.items())
    if isinstance(value, str): return b"\xd9" + bytes([len(value)]) + value.encode()
    if isinstance(value, int): return b"\xce" + struct.pack(">I", value)
    if isinstance(value, bytes): return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, (list, tuple)):
        return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
    inner = packed([list(value.shape), value.dtype.name, value.tobytes()])
    return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


def dc(folder, name="res_DC_MNIST_ConvNet_2ipc.pt", **how):
    both = [[IMAGES, LABELS], [IMAGES + 1, LABELS]]
    kept = {"ConvNet": [np.float64(.91), np.float64(.93)]}
    torch.save({"data": both, "accs_all_exps": kept}, folder / name, **how)
    return folder / name


def dc_legacy(folder): return dc(folder, "res_DM_x.pt", _use_new_zipfile_serialization=False)


def datadam(folder):
    torch.save({"data": (IMAGES, LABELS), "accs_all_exps": {"ConvNet": []}}, folder / "res_DataDAM_2ipc_.pt")
    return folder / "res_DataDAM_2ipc_.pt"


def other_variant(folder):
    torch.save({"data": (IMAGES, LABELS), "acc_all_exps": {"ConvNet": [.5]}}, folder / "res_IDM.pt")
    return folder / "res_IDM.pt"


def mtt(folder, **more):
    files = {"images_100": IMAGES + 1, "labels_100": LABELS, "images_best": IMAGES, "labels_best": LABELS,
             "images_zca_100": IMAGES + 2} | more
    for name, x in files.items(): torch.save(x, folder / f"{name}.pt")
    return folder


def datm(folder): return mtt(folder, labels_best=9 * HOT, lr_best=torch.tensor(.03))


def idc(folder):
    inside = folder / "conv3in_factor2_ipc2"
    inside.mkdir()
    torch.save([PIXELS, LABELS], inside / "data_best.pt")
    return inside


def ncfm(folder):
    (folder / "distilled_data").mkdir()
    for it in (9, 100): torch.save([PIXELS, LABELS], folder / f"distilled_data/data_{it}.pt")
    return folder / "distilled_data"


def speech(folder):
    torch.save([like_pictures(20, 1, 64, 64), LABELS], folder / "data.pt")
    return folder / "data.pt"


def kip(folder):
    np.savez(folder / "kip_cifar10_ConvNet_ssize20_zca_l_ckpt10.npz", images=NHWC, labels=(3 * HOT - .5).numpy())
    return folder / "kip_cifar10_ConvNet_ssize20_zca_l_ckpt10.npz"


def kip_arrays(folder):
    np.save(folder / "kip_images.npy", NHWC)
    np.save(folder / "kip_labels.npy", (3 * HOT - .5).numpy())
    return folder / "kip_images.npy"


def rfad(folder):
    np.savez(folder / "best.npz", images=IMAGES.numpy(), labels=(HOT - .1).numpy(), k=np.eye(2), jit=np.float32(1))
    return folder / "best.npz"


def frepo(folder):
    np.savez(folder / "proto.npz", image=NHWC, label=(HOT - .1).numpy())
    return folder / "proto.npz"


def rcig(folder):
    state = {"ema_average": {"x_proto": NHWC, "y_proto": (HOT - .1).numpy()}, "step": 7}
    (folder / "checkpoint_final").write_bytes(packed(state))
    return folder / "checkpoint_final"


def ssnl(folder):
    steps = [(IMAGES[i::IPC], LABELS[i::IPC], torch.tensor(.1 * (i + 1))) for i in range(IPC)]
    torch.save(steps + [(x, y, lr / 2) for x, y, lr in steps], folder / "results.pth")
    return folder / "results.pth"


def plain(folder):
    torch.save({"images": IMAGES, "labels": LABELS.float()}, folder / "mine.pt")
    return folder / "mine.pt"


def tensor(folder):
    torch.save(torch.nn.Parameter(IMAGES), folder / "mine.pt")
    return folder / "mine.pt"


def safetensors(folder):
    save_file({"images": IMAGES, "labels": LABELS}, folder / "set.safetensors")
    return folder / "set.safetensors"


def png(folder):
    classes = load_data("digits").classes
    for i, (x, c) in enumerate(zip(PIXELS, LABELS.tolist())):
        place = folder / classes[c]
        place.mkdir(exist_ok=True)
        Image.fromarray((255 * x[0]).round().byte().numpy()).save(place / f"{i}.png")
    return folder


def listed(folder):
    png(folder)
    lines = [f"{p.relative_to(folder)},{p.parent.name}" for p in sorted(folder.glob("*/*.png"))]
    (folder / "sets.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    return folder / "sets.csv"


def wav(folder):
    for i, c in enumerate(LABELS.tolist()):
        (folder / f"{c:04d}").mkdir(exist_ok=True)
        wave = np.sin(np.arange(8000) * (200 + 40 * c) / 8000 * 2 * np.pi) * .5
        soundfile.write(folder / f"{c:04d}/{i}.wav", wave, 8000)
    return folder


def avdd(folder):
    real = load_data("digits_av")
    for m, name in (("audio", "audSyn"), ("image", "imgSyn")):
        for e in range(2):
            for it in (10, 2000): torch.save(like_pictures(20, *real.shapes[m]) + e, folder / f"exp_{e}_{name}_{it}.pt")
    return folder


def avdd_classes(folder):
    real = load_data("digits_av")
    for c in range(10):
        tree = {"0": {f"{m}_syn": {"0": like_pictures(IPC, *real.shapes[m]), "20": like_pictures(IPC, *real.shapes[m])}
                      for m in ("audio", "image")}}
        torch.save(tree, folder / f"class:{c}.pt")
    return folder


def lors(folder, **more):
    tree = dict(image=like_pictures(6, *load_data("digit_scenes").shapes["image"]), text=torch.randn(6, 24),
                similarity_params=torch.ones(6),
                similarity_mat=torch.eye(6) + .1, syn_lr_img=torch.tensor(.1), syn_lr_txt=torch.tensor(.2)) | more
    torch.save(tree, folder / "distilled_100.pt")
    return folder / "distilled_100.pt"


LAYOUTS = [   # writer, data, layout, experiments, kind of labels, space
    (dc, "digits", "dc", 2, "hard", "normalised"), (dc_legacy, "digits", "dc", 2, "hard", "normalised"),
    (datadam, "digits", "dc", 1, "hard", "normalised"), (other_variant, "digits", "dc", 1, "hard", "normalised"),
    (mtt, "digits", "mtt", 1, "hard", "normalised"), (datm, "digits", "datm", 1, "logits", "normalised"),
    (idc, "digits", "idc", 1, "hard", "pixels"), (ncfm, "digits", "idc", 1, "hard", "pixels"),
    (speech, "spoken_digits", "idc", 1, "hard", "normalised"),
    (kip, "digits", "kip", 1, "targets", "zca"), (kip_arrays, "digits", "kip", 1, "targets", "zca"),
    (rfad, "digits", "rfad", 1, "targets", "zca"), (frepo, "digits", "frepo", 1, "targets", "zca"),
    (rcig, "digits", "rcig", 1, "targets", "zca"), (ssnl, "digits", "dd", 1, "hard", "normalised"),
    (plain, "digits", "tensors", 1, "hard", "normalised"), (tensor, "digits", "tensors", 1, "hard", "normalised"),
    (safetensors, "digits", "tensors", 1, "hard", "normalised"), (png, "digits", "class_folders", 1, "hard", "pixels"),
    (listed, "digits", "listed", 1, "hard", "pixels"), (wav, "spoken_digits", "class_folders", 1, "hard", "pixels"),
    (avdd, "digits_av", "avdd", 2, "hard", "normalised"),
    (avdd_classes, "digits_av", "avdd_classes", 1, "hard", "normalised"),
]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    "Data sets are loaded once for all tests of this file"
    keep = cache(load_data)
    with pytest.MonkeyPatch.context() as patch:
        for module in (sys.modules[__name__], released_sets): patch.setattr(module, "load_data", keep)
        yield


@pytest.mark.parametrize("write, on, family, experiments, kind, space", LAYOUTS,
                         ids=[case[0].__name__ for case in LAYOUTS])
def test_every_layout(tmp_path, write, on, family, experiments, kind, space):
    real = load_data(on)
    path = write(tmp_path)
    released = open_released(path)
    assert (released.family, len(released.sets), released.sets[0].kind) == (family, experiments, kind)
    assert settled_for(DeclaredSet(), released, real).space == space
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = DistilledData.from_file(path, real, experiments - 1, **(dict(space="normalised") if space == "zca" else {}))
    assert s.ipc == IPC and s.card["seed"] == experiments - 1 and set(s.tensors) == set(real.modalities)
    inputs, labels = s.decoded()
    assert labels.bincount().unique().numel() == 1 and {m: tuple(x.shape[1:]) for m, x in inputs.items()} == real.shapes
    assert (s.soft is None) == (kind == "hard")
    assert not kind == "targets" or s.soft.loss == "squared"


def test_what_files_say_beside_their_samples(tmp_path):
    folders = {name: tmp_path / name for name in ("dc", "mtt", "datm", "idc", "ssnl", "avdd")}
    for folder in folders.values(): folder.mkdir()
    assert open_released(dc(folders["dc"])).stated == {"ConvNet": [91., 93.]}
    best = open_released(mtt(folders["mtt"]))
    assert torch.equal(best.sets[0].tensors["image"],
                       IMAGES) and not best.sets[0].rates     # not the un-whitened view, not iteration 100
    learned = DistilledData.from_file(datm(folders["datm"]), "digits", temperature=3)
    assert learned.card["rates"]["image"] == pytest.approx(.03)
    assert torch.allclose(learned.soft.probabilities.flatten(0, 1),
                          (9 * HOT / 3).softmax(1)) and learned.soft.temperature == 3
    canvas = DistilledData.from_file(idc(folders["idc"]), "digits")
    assert (canvas.factor, canvas.order, canvas.space) == (2, "rows",
                                                           {"image": "pixels"}) and len(canvas.decoded()[1]) == 80
    steps = DistilledData.from_file(ssnl(folders["ssnl"]), "digits").card["learned_steps"]
    assert (steps["epochs"], steps["per_step"], len(steps["rates"]["image"])) == (2, 1, 4)
    assert [len(p.name) > 0 for p in open_released(avdd(folders["avdd"])).paths] == [True] * 4


def test_samples_come_in_any_order_and_go_class_by_class(tmp_path):
    mixed = torch.randperm(20, generator=RANDOM)
    torch.save([IMAGES[mixed], LABELS[mixed]], tmp_path / "data.pt")
    s = DistilledData.from_file(tmp_path / "data.pt", "digits", space="normalised")
    for c in range(10):
        found = {tuple(x.flatten().tolist()) for x in s.tensors["image"][c]}
        assert found == {tuple(x.flatten().tolist()) for x in IMAGES[LABELS == c]}


def test_labels_in_another_file(tmp_path):
    torch.save(LABELS.flip(0).float(), tmp_path / "y.pt")
    path = tensor(tmp_path)
    assert "no file of labels" in open_released(path).sets[0].notes[0]
    given = open_released(path, labels=tmp_path / "y.pt").sets[0]
    assert given.labels[0] == 9 and not given.notes


def test_pairs(tmp_path):
    real = load_data("digit_scenes")
    s = DistilledData.from_file(lors(tmp_path), real)
    assert (s.task, len(s.tensors["text"]), s.card["rates"]["text"]) == ("retrieval", 6, pytest.approx(.2))
    assert "similarities" in open_released(tmp_path / "distilled_100.pt").sets[0].notes[0]
    torch.save({"image": IMAGES}, tmp_path / "vl.pt")
    with pytest.raises(DamagedFile, match="pictures of pairs without their texts"): open_released(tmp_path / "vl.pt")


def test_pictures_with_captions(tmp_path, monkeypatch):
    real = load_data("digit_scenes")
    pixels = real.normalisation["image"](real.train.images[:6])
    pixels = real.normalisation["image"].undo(pixels).clamp(0, 1)
    lines = ["image,caption"]
    for i, x in enumerate(pixels):
        Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        lines.append(f'{i}.png,"{real.pairs("train").captions[i]}"')
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("DDREPRO_RUNS", str(tmp_path / "runs"))
    asked = ScoreRequest(tmp_path / "pairs.csv", "digit_scenes", nets=1, epochs=1, declared=DeclaredSet(rate=.1))
    with one_process(): score = score_set(asked, real, "cpu", say=lambda line: None)
    assert (len(score.prepared.sets[0].tensors["text"]), score.measure) == (6, "TR R@1")
    assert "real pictures" in score.verdict and "common" not in score.prepared.recipes


def test_texts_vectors_and_weights_are_said_to_be_such(tmp_path):
    (tmp_path / "dilm.json").write_text("".join(json.dumps({"sentence": "a film", "labels": c}) + "\n" for c in (0, 1)))
    with pytest.raises(ValueError, match="holds 2 texts"): DistilledData.from_file(tmp_path / "dilm.json", "digits")
    torch.save({"data": [[torch.randn(10, 768), torch.arange(10)]]}, tmp_path / "text_res_DC.pt")
    with pytest.raises(ValueError, match="vectors of 768 numbers"):
        DistilledData.from_file(tmp_path / "text_res_DC.pt", "digits")
    torch.save(OrderedDict({"enc.weight": torch.ones(3, 3)}), tmp_path / "styler.pt")
    with pytest.raises(DamagedFile, match="weights of a network"): open_released(tmp_path / "styler.pt")


@pytest.mark.parametrize("images, labels, words", [
    (IMAGES[:, :, :28, :28], LABELS, "is 1×28×28, one of digits 1×32×32"),
    (IMAGES[:-1], LABELS[:-1], "1 samples of 'nine' and 2 of"),
    (IMAGES, LABELS + 1, "labels from 1 to 10, the data have 10"), (IMAGES, LABELS + .5, "which are no classes"),
    (IMAGES.expand(20, 3, 32, 32) + torch.arange(3).view(3, 1, 1), LABELS, "is 3×32×32"),
    (IMAGES / 0, LABELS, "NaN or infinity"),
    (IMAGES, torch.eye(5)[LABELS % 5], "labels of 5 classes, the data have 10"),
    (IMAGES, LABELS[:5], "20 samples and 5 labels"),
])
def test_wrong_shapes_are_said(images, labels, words):
    with pytest.raises(ValueError, match=words), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        DistilledData.from_tensors(images, labels, "digits")


def test_round_trip_of_soft_labels_and_of_an_export(tmp_path):
    s = DistilledData.from_tensors(IMAGES, 3 * HOT - .5, "digits")
    s.save(tmp_path / "kept")
    assert DistilledData.load(tmp_path / "kept").soft == s.soft
    assert prepared_of(ScoreRequest(tmp_path / "kept", "digits"), load_data("digits")).sets[0].soft == s.soft
    hard = DistilledData.from_tensors(IMAGES, LABELS, "digits")
    export(hard, tmp_path / "png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = DistilledData.from_file(tmp_path / "png", "digits")
    assert (back.natural("image") - hard.natural("image")).abs().max() <= .5 / 255 + 1e-6


def test_networks_learn_from_each_kind_of_label():
    real = load_data("digits")
    some = real.train.select(np.concatenate([real.train.by_class[c][:8] for c in range(10)]))
    images, hot = real.normalisation["image"](some.inputs["image"]), torch.eye(10)[some.labels]
    quick = Recipe("quick", 40, 40, "sgd", rate=.05, augment=False)
    reached, jobs = {}, {}
    for name, labels, kind in (("hard", some.labels, None), ("soft", .9 * hot + .01, None),
                               ("logits", 6 * hot, "logits"), ("targets", 5 * hot - .5, None)):
        with warnings.catch_warnings(), one_process():
            warnings.simplefilter("ignore")
            s = DistilledData.from_tensors(images, labels, real, kind=kind, temperature=2)
            jobs[name] = evaluation_job(s, real, quick, "test", 12, "linear")
            reached[name] = evaluate(s, real, quick, seeds=1, width=12, device="cpu").accuracy[0]
    assert min(reached.values()) > 25, reached
    assert jobs["logits"]["temperature"] == 2 and jobs["targets"]["loss"] == "squared" and "loss" not in jobs["hard"]
    assert torch.equal(jobs["targets"]["labels"].sum(0), (5 * hot - .5).sum(0))
    assert torch.allclose(jobs["logits"]["labels"], (3 * hot).softmax(1)[some.labels.argsort(stable=True)])


# Damaged and hostile files

RAN = "ran"   # a file that hostile code would make


class Runs:
    "Asks to have a function called"
    def __init__(self, function, *arguments): self.asked = function, arguments
    def __reduce__(self): return self.asked


def attack(folder): return Runs(os.system, f"touch {folder / RAN}")


def torch_zip(path, program: bytes, files=(), compress=zipfile.ZIP_STORED):
    "An archive as torch writes it, with a pickle of one's own"
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in [("a/data.pkl", program), ("a/version", b"3\n"), *files]: archive.writestr(name, content)


def tensor_program(numel, size, stride, offset=0) -> bytes:
    "A pickle that declares a tensor"
    class Key:
        def __init__(self, numel): self.numel = numel
    class Writer(pickle.Pickler):
        def persistent_id(self, x):
            return ("storage", torch.FloatStorage, "0", "cpu", x.numel) if isinstance(x, Key) else None
    file = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    Writer(file, protocol=2).dump({"images": Runs(rebuild, Key(numel), offset, size, stride, False, OrderedDict())})
    return file.getvalue()


def legacy(path, program: bytes):
    magic = 0x1950a86a20f9469cfc6c
    path.write_bytes(b"".join(pickle.dumps(x, 2)
                              for x in (magic, 1001,
                                        {})) + program + pickle.dumps(["0"], 2) + struct.pack("<q", 1) + b"\0" * 4)


def npz_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(2**27,)))
        for _ in range(128): file.write(bytes(2**20))


def npy(path, header: str, content=b"\0" * 8):
    padded = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(padded)) + padded + content)


def laughs():
    inner = [1]
    for _ in range(20): inner = [inner] * 10
    return inner


def around():
    ring = []
    ring.append(ring)
    return ring


def picture_bomb(folder):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib_crc(kind + data))
    for c in ("zero", "one"):
        (folder / c).mkdir(parents=True)
        head = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 0, 0, 0, 0)
        (folder / c / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR",
                                                                        head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def zlib_crc(data: bytes) -> int:
    import zlib
    return zlib.crc32(data)


def eps_folder(folder, ran):
    for c in ("zero", "one"):
        (folder / c).mkdir(parents=True)
        (folder / c / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + str(ran).encode() + b") (w) file closefile\n")


def zip_twice(path):
    torch.save({"images": IMAGES[:1]}, path)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"other")


def write_hostile(folder: Path) -> dict:   # name → words that say why it is refused
    "Files that nobody should open carelessly"
    at = lambda name: folder / name
    expected = {}

    def file(name, words):
        expected[name] = words
        return at(name)

    ran = attack(folder)
    torch_zip(file("code_zip.pt", "asks for posix.system"), pickle.dumps({"data": ran}, 2))
    legacy(file("code_legacy.pt", "asks for posix.system"), pickle.dumps(ran, 2))
    file("code_plain.pkl", "asks for __builtin__.eval").write_bytes(pickle.dumps(Runs(eval, "1"), 2))
    file("code_protocol4.pkl",
         "asks for subprocess.Popen").write_bytes(pickle.dumps([Runs(subprocess.Popen, ["touch", str(folder / RAN)])],
                                                               4))
    file("code_hub.pt", "asks for torch.hub.load")
    torch_zip(at("code_hub.pt"), b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00atR.")
    file("code_instance.pkl", "asks for posix.system")
    at("code_instance.pkl").write_bytes(b"\x80\x02(X\x01\x00\x00\x00aiposix\nsystem\n.")
    np.save(file("code.npy", "holds objects, which are pickles"), np.array([ran], object), allow_pickle=True)
    np.savez(file("code.npz", "holds objects, which are pickles"), images=np.array([ran], object))
    torch_zip(file("script.pt", "TorchScript"), pickle.dumps({}, 2), [("a/constants.pkl", b"\x80\x02).")])
    torch_zip(file("expanded.pt", "whose storage has 1 elements"), tensor_program(1, (10**9,), (0,)),
              [("a/data/0", b"\0" * 4)])
    torch_zip(file("storage.pt", "declares 1,000,000,000 elements"), tensor_program(10**9, (10**9,), (1,)),
              [("a/data/0", b"\0" * 4)])
    legacy(file("storage_legacy.pt", "declares 4,000,000,008 bytes"), tensor_program(10**9, (10**9,), (1,)))
    torch_zip(file("negative.pt", "a tensor of size (-5,)"), tensor_program(1, (-5,), (1,)), [("a/data/0", b"\0" * 4)])
    torch_zip(file("negative_stride.pt", "strides (-1,)"), tensor_program(4, (2,), (-1,), 1),
              [("a/data/0", b"\0" * 16)])
    torch_zip(file("negative_storage.pt", "a storage of -1 elements"), tensor_program(-1, (1,), (1,)),
              [("a/data/0", b"\0" * 4)])
    torch_zip(file("beyond.pt", "whose storage has 1 elements"), tensor_program(1, (1,), (1,), 10**6),
              [("a/data/0", b"\0" * 4)])
    torch_zip(file("compressed.pt", "compressed files"), pickle.dumps({}, 2), [("a/data/0", bytes(2**22))],
              zipfile.ZIP_DEFLATED)
    npz_bomb(file("bomb.npz", "would unpack to"))
    npy(file("billion.npy", "4,000,000,000 bytes, and 8 are there"),
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }")
    npy(file("negative.npy", "declares the shape (-2, 4)"),
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 4), }")
    npy(file("header.npy", "no header of an array"), "(" * 5000)
    npy(file("long_header.npy", "no header of an array"),
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 50_000 + "), }")
    file("billion.msgpack", "a list of 1,000,000,000 values").write_bytes(b"\x81\xa1a\xdd\x3b\x9a\xca\x00")
    file("deep.msgpack", "nests more than").write_bytes(b"\x81\xa1a" + b"\x91" * 10**6)
    file("memo.pkl", "of its memo").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    file("bytes.pkl", "cut off or no pickle").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.")
    file("laughs.pkl", "too many values").write_bytes(pickle.dumps(laughs(), 2))
    file("around.pkl", "too many values").write_bytes(pickle.dumps(around(), 2))
    file("deep.json", "not valid JSON").write_bytes(b"[" * 10**6)
    file("header.safetensors", "no safetensors file").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    file("outside.csv", "lies outside its folder").write_text("file,label\n../../etc/passwd,0\n")
    file("pointer.pt",
         "pointer of Git LFS").write_text("version https://git-lfs.github.com/\noid sha256:0\nsize 1\n")
    file("empty.pt", "is empty").touch()
    file("page.pt", "a web page").write_text("<!DOCTYPE html><html></html>")
    zip_twice(file("twice.pt", "files of the same name"))
    torch.save({"images": IMAGES}, file("cut.pt", "damaged zip archive"))
    at("cut.pt").write_bytes(at("cut.pt").read_bytes()[:-300])
    os.mkfifo(file("pipe.pt", "folder, pipe or device"))
    picture_bomb(file("pictures", "9,000 × 9,000 pixels"))
    eps_folder(file("postscript", "cannot be read as a picture"), folder / RAN)
    return expected


CHILD = """
import json, resource, signal, sys, time
from pathlib import Path
from ddrepro.core.files import DamagedFile
from ddrepro.distill.released_folders import open_released
limit = 8 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (200, 200))
folder, found = Path(sys.argv[1]), {}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in json.loads(sys.argv[2]):
    signal.alarm(60)          # the default action ends the process: a file that hangs fails the test
    start = time.process_time()
    try: found[name] = ["read", type(open_released(folder / name)).__name__]
    except DamagedFile as why: found[name] = ["refused", str(why)]
    except BaseException as why: found[name] = ["failed", f"{type(why).__name__}: {why}"]
    found[name] += [time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]
print(json.dumps(found))
"""


def test_damaged_and_hostile_files(tmp_path):
    expected = write_hostile(tmp_path)
    assert len(expected) >= 20
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), json.dumps(list(expected))], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode != -signal.SIGALRM, "a file was read for more than a minute"
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (tmp_path / RAN).exists(), "code of a file was run"
    for name, words in expected.items():
        outcome, said, seconds, more = found[name]
        assert outcome == "refused" and words in said, (name, outcome, said)
        assert name.split(".")[0] in said, (name, said)             # the file is named
        assert seconds < 20 and more < 600 * 1024, (name, seconds, more)


def test_attacks_are_attacks(tmp_path):
    "The code that the files above hold does run where a file is read carelessly"
    with open(os.devnull, "w"): torch.load(io.BytesIO(zip_of(attack(tmp_path))), weights_only=False)
    assert (tmp_path / RAN).exists()


def zip_of(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "empty.pt").touch()
    assert main(["score", str(tmp_path / "empty.pt"), "--on", "digits"]) == 2
    assert "empty.pt is empty" in capsys.readouterr().err
    path = dc(tmp_path)
    assert main(["score", str(path)]) == 2 and "--on says it" in capsys.readouterr().err
    assert main(["score", str(path), "--on", "digit"]) == 2 and "the nearest is 'digits'" in capsys.readouterr().err
    assert main(["score", str(path), "--on", "digits", "--space", "pixels"]) == 2
    assert "said to be pixels in [0, 1]" in capsys.readouterr().err


# The released files

def stub(name: str) -> RealData:
    "Data with the shape, classes and constants of a published set, and a few random pictures"
    known = IMAGE_SETS[name]
    pictures = (255 * torch.rand(20, *known.shape, generator=RANDOM)).byte()
    part = Part({"image": pictures}, torch.arange(10).repeat(2))
    return RealData(name, known.classes, part, part, part, {"image": known.normalisation}, known.strategy)


RELEASED = [   # file, data, layout, method, experiments, what the file states, space, looks
    ("dc_mnist_ipc1_5exps.pt", "mnist", "dc", "dc", 5, (92.02, .43), "normalised", "normalised"),
    ("dc_cifar10_ipc1_5exps.pt", "cifar10", "dc", "dc", 5, (28.19, .64), "normalised", "normalised"),
    ("dc_mnist_ipc1_legacy_torch.pt", "mnist", "dc", "dc", 1, (92.01, .31), "normalised", "normalised"),
    ("dm_mnist_ipc10.pt", "mnist", "dc", "dm", 1, (92.50, .25), "normalised", "normalised"),
    ("camdm_cifar10_ipc10.pt", "cifar10", "dc", "dm", 1, (47.85, .43), "normalised", "normalised"),
    ("mtt_cifar10_ipc10_nozca_images_5000.pt", "cifar10", "mtt", "mtt", 1, None, "normalised", "normalised"),
    ("control_real_kmeans_cifar10_ipc1_normalised.pt", "cifar10", "tensors", "control", 1, None, "normalised", "real"),
    ("control_real_kmeans_cifar10_ipc1_pixels01.pt", "cifar10", "tensors", "control", 1, None, "pixels", "real"),
    ("control_noise_dc_fashionmnist_ipc1.pt", "fashion_mnist", "dc", "control", 1, None, "normalised", "noise"),
    ("dd_mnist_ipc1_dict.pt", "mnist", "tensors", "dd", 1, None, "normalised", "normalised"),
]


@pytest.fixture
def released_folder(data_root):
    "Sets that people released, beside the folder of data sets"
    folder = data_root.parent / "released_sets" / "mit"
    if not folder.is_dir(): pytest.skip(f"no released sets on this machine: {folder} is not there")
    return folder


@pytest.mark.parametrize("name, on, family, method, experiments, stated, space, looks", RELEASED,
                         ids=[case[0] for case in RELEASED])
def test_released_files(released_folder, name, on, family, method, experiments, stated, space, looks):
    p = prepared_of(ScoreRequest(released_folder / name, on, declared=DeclaredSet(space=space)), stub(on))
    assert (p.released.family, p.method, len(p.sets)) == (family, method, experiments)
    numbers = np.array(p.released.stated.get("ConvNet", []))
    assert stated is None and not len(numbers) or (numbers.mean(), numbers.std()) == pytest.approx(stated, abs=.006)
    signs = p.signs["image"]
    assert (signs.real, signs.noise) == (looks == "real", looks == "noise")
    assert signs.real or signs.noise or signs.looks == looks and not p.warnings


def test_released_whitened_files(released_folder):
    kept = open_released(released_folder / "kip_cifar10_ipc10_images.npy")
    assert (kept.family, kept.sets[0].kind, tuple(kept.sets[0].labels.shape)) == ("kip", "targets", (100, 10))
    said = settled_for(DeclaredSet(), kept, stub("cifar10"))
    assert (said.space, said.way) == ("zca", "kip")
    for images, space in (("mtt_cifar10_ipc1_zca_images_5000.pt", "zca"),
                          ("mtt_cifar10_ipc10_nozca_images_5000.pt", "normalised")):
        assert settled_for(DeclaredSet(), open_released(released_folder / images), stub("cifar10")).space == space
    constants = IMAGE_SETS["cifar10"].normalisation
    assert space_signs(kept.sets[0].tensors["image"], constants).looks == "zca"


def test_released_texts_and_vectors(released_folder):
    for task, count in (("sst2", 40), ("mnli", 60)):
        texts = open_released(released_folder / f"dilm_{task}_dpc20_dataset_0.json").sets[0]
        assert len(texts.texts) == count and texts.labels.bincount().unique().tolist() == [20]
    with pytest.raises(ValueError, match="vectors of 768 numbers"):
        prepared_of(ScoreRequest(released_folder / "dc_text_embedding_sst2class_ipc1_5exps.pt", "mnist"), stub("mnist"))


def test_every_family_has_a_file_above():
    written = {case[2] for case in LAYOUTS} | {"pairs", "text"}
    assert set(FAMILIES) <= written, set(FAMILIES) - written
