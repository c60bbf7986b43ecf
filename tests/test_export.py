"""What leaves ddrepro comes back and scores the same to the last digit; what was altered on the way is refused."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddrepro.core.files import DamagedFile
from ddrepro.data import load_data
from ddrepro.distill import load_distilled, read_back
from ddrepro.distill.hub import PARQUET
from ddrepro.distill.soft_labels import smoothed
from ddrepro.evaluate import evaluate
from helpers import one_process

SETS = ("dsdm/digits/ipc1", "idm/digits/ipc1", "mtt/digits/ipc1", "dd/digits/ipc1")   # canvases, another start, a learned rate, learned steps
EXPORTS = ("to_dc", "to_folder", "to_hub", "save")


def exported(s, how: str, folder: Path):
    "Where an export of a set lies"
    path = folder / ("set.pt" if how == "to_dc" else how)
    made = getattr(s, how)(path)
    return made


def scores(s, real) -> list:
    "Accuracies of one network, as they are"
    epochs = None if s.card.get("learned_steps") else 3
    return evaluate(s, real, seeds=1, epochs=epochs, device="cpu").accuracy.tolist()


@pytest.mark.parametrize("name", SETS)
def test_a_round_trip_through_every_export_scores_the_same(name, tmp_path):
    s, real = load_distilled(name), load_data("digits")
    with one_process():
        before = scores(s, real)
        for how in EXPORTS:
            back = read_back(exported(s, how, tmp_path))
            assert scores(back, real) == before, how
            for a, b in zip(s.decoded()[0].values(), back.decoded()[0].values(), strict=True): assert torch.equal(a, b), how
            assert (back.card, back.classes, back.normalisation) == (s.card, s.classes, s.normalisation)


def test_soft_labels_go_along(tmp_path):
    s, real = load_distilled("dsdm/digits/ipc1"), load_data("digits")
    soft = replace(s, soft=smoothed(range(10), 4, 10, .3))
    with one_process():
        before = scores(soft, real)
        assert before != scores(s, real)          # they matter
        for how in EXPORTS:
            if how == "to_dc":
                with pytest.warns(UserWarning, match="hard labels"): path = exported(soft, how, tmp_path)
            else: path = exported(soft, how, tmp_path)
            assert scores(read_back(path), real) == before, how


def test_several_modalities_and_sounds_go_along(tmp_path):
    s, real = load_distilled("dm/digits_av/ipc1"), load_data("digits_av")
    few = replace(s, tensors={m: x[:, :1] for m, x in s.tensors.items()})
    with one_process():
        before = scores(few, real)
        for how in ("to_folder", "to_hub", "save"): assert scores(read_back(exported(few, how, tmp_path)), real) == before, how
        with pytest.raises(ValueError, match="say which by modality"): few.to_dc(tmp_path / "x.pt")
        assert len(list((tmp_path / "to_folder").rglob("*.wav"))) == 10


def test_dc_file_is_as_dc_writes_it(tmp_path, data_root):
    released = data_root.parent / "released_sets/mit/control_noise_dc_fashionmnist_ipc1.pt"
    if not released.is_file(): pytest.skip("released_sets does not lie beside DDREPRO_DATA")
    theirs = torch.load(released, weights_only=True)
    ours = torch.load(load_distilled("dsdm/digits/ipc1").to_dc(tmp_path / "ours.pt"), weights_only=True)
    assert set(theirs) <= set(ours)
    (images, labels), (their_images, their_labels) = ours["data"][0], theirs["data"][0]
    assert type(ours["data"][0]) is type(theirs["data"][0])
    assert (images.dtype, labels.dtype, images.dim()) == (their_images.dtype, their_labels.dtype, their_images.dim())


@pytest.mark.parametrize("how", ("to_dc", "to_folder", "to_hub"))
def test_what_was_altered_is_refused_by_name(how, tmp_path):
    path = exported(load_distilled("dsdm/digits/ipc1"), how, tmp_path)
    if how == "to_dc":
        content = torch.load(path, weights_only=True)
        content["data"][0][0][3] += 1e-6
        torch.save(content, path)
    elif how == "to_folder": (path / "0003/image0000.png").write_bytes((path / "0004/image0000.png").read_bytes())
    else:
        card = json.loads((path / "ddrepro.json").read_text())
        card["normalisation"]["image"]["mean"] = [.25]
        (path / "ddrepro.json").write_text(json.dumps(card))
    with pytest.raises(DamagedFile, match=str(path)): read_back(path)


@pytest.mark.parametrize("damage", ("cut", "empty", "foreign", "gone"))
@pytest.mark.parametrize("how", ("to_dc", "to_hub"))
def test_damage_is_said(how, damage, tmp_path):
    path = exported(load_distilled("dsdm/digits/ipc1"), how, tmp_path)
    file = path if how == "to_dc" else path / PARQUET
    content = file.read_bytes()
    if damage == "gone": file.unlink()
    else: file.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "foreign": b"<html></html>" * 100}[damage])
    with pytest.raises((DamagedFile, FileNotFoundError), match=file.name): read_back(path)


def test_datasets_reads_what_to_hub_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    s = load_distilled("dsdm/digits/ipc1")
    s.to_hub(tmp_path / "hub", "cc-by-4.0", "digits in ten canvases")
    rows = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    inputs, labels = s.decoded()
    assert rows["label"][:] == labels.tolist() and rows.features["label"].names == list(s.classes)
    assert np.array_equal(np.array(rows.with_format("numpy")["image_values"][:]), inputs["image"].numpy())
    assert rows[7]["image"].size == (32, 32)
    head = (tmp_path / "hub/README.md").read_text().split("---")[1]
    assert "license: cc-by-4.0" in head and "dataset-distillation" in head


def test_a_folder_of_something_else_is_no_export(tmp_path):
    with pytest.raises(DamagedFile, match="is no export"): read_back(tmp_path)
    shutil.copy(Path(__file__), tmp_path / "code.pt")
    with pytest.raises(DamagedFile, match="code.pt"): read_back(tmp_path / "code.pt")
