"""Caption cleaning against the authors' code, caption sets from made-up trees of every format, and the real pack."""
import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddrepro.data.sets.caption_sets as chapter
import ddrepro.data.sets.digit_scenes as digit_scenes
from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed
from ddrepro.data.pairs import CLIP, PairData, clean_caption, pairs_html
from ddrepro.data.real import PARTS
from ddrepro.data.registry import list_data, load_data

pytestmark = pytest.mark.filterwarnings("ignore:.*R@k means little:UserWarning")

# What pre_caption(text, 30) of princetonvisualai/multimodal_dataset_distillation returns
# (commit c696fd6, data/flickr30k_dataset.py)
LONG = [f"w{i}" for i in range(40)]
REFERENCE = [
    ("A dog runs.", "a dog runs"),
    ("Two young guys with shaggy hair look at their hands while hanging out in the yard .",
     "two young guys with shaggy hair look at their hands while hanging out in the yard"),
    ('A man says "hello"!', "a man says hello"),
    ("  Leading and trailing   spaces  ", "leading and trailing spaces"),
    ("UPPER CASE WORDS", "upper case words"),
    ("semi;colon:and~tilde", "semi colon and tilde"),
    ("hash #1 (one) * star", "hash 1 one star"),
    ("It's a mother-in-law, isn't it?", "it's a mother-in-law, isn't it?"),
    ("a.b.c.d", "a b c d"),
    ("...", ""),
    ("Ünïcödé ÉCOLE straße", "ünïcödé école straße"),
    ("日本語 の 字幕。", "日本語 の 字幕。"),
    ("<script>alert('x')</script>", "<script>alert 'x' </script>"),
    ("100% & 50$ / 3 @ home", "100% & 50$ / 3 @ home"),
    (" ".join(LONG[:29]), " ".join(LONG[:29])),
    (" ".join(LONG[:30]), " ".join(LONG[:30])),
    (" ".join(LONG[:31]).upper(), " ".join(LONG[:30])),
    (" . ".join(LONG), " ".join(LONG[:30])),
    ("many\n\nlines  \n here", "many lines here"),
    ("ends with newline.\n", "ends with newline")]


def test_captions_are_cleaned_as_the_authors_do():
    assert len(REFERENCE) == 20
    for caption, expected in REFERENCE: assert clean_caption(caption) == expected


# Scenes

@pytest.fixture(scope="module")
def scenes(): return load_data("digit_scenes")


def test_scenes_are_the_same_every_time(scenes):
    assert isinstance(scenes, PairData)
    assert scenes.fingerprint == "f4a86ead07f93b496fa2e108ef06e9a1" == load_data("digit_scenes").fingerprint


def test_parts_share_no_handwriting():
    samples = digit_scenes.split_samples(digit_scenes.scikit_digits().target)
    drawn = {p: {f.sample for i in range(500) for f in digit_scenes.draw_scene(p, i, samples[p]).figures}
             for p in PARTS}
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["validation"] & drawn["test"]


def test_captions_are_true(scenes):
    "Every caption names each digit with its colour; places and grounds that it names are the scene's"
    samples = digit_scenes.split_samples(digit_scenes.scikit_digits().target)
    colour_of = {word: c for c in digit_scenes.COLOURS for word in (c, digit_scenes.SYNONYMS[c])}
    digit_of = {word: d for d, name in enumerate(digit_scenes.NAMES) for word in (name, str(d))}
    place_of = sorted(((phrase, i) for i, both in enumerate(digit_scenes.PLACES) for phrase in both),
                      key=lambda p: -len(p[0]))
    for i in range(500):
        scene = digit_scenes.draw_scene("test", i, samples["test"])
        for caption in scenes.test.captions[i]:
            words = clean_caption(caption).replace(",", "").split()
            named = [(colour_of[a], digit_of[b]) for a, b in zip(words, words[1:]) if a in colour_of and b in digit_of]
            assert sorted(named) == sorted((f.colour, f.digit) for f in scene.figures), caption
            text = caption.lower()
            places = set()
            for phrase, place in place_of:
                if phrase not in text: continue
                text = text.replace(phrase, "")
                places.add(place)
            assert places <= {f.place for f in scene.figures}, caption
            assert {g for g in digit_scenes.GROUNDS if g in words} <= {scene.ground}, caption
            assert ("striped" not in words or scene.striped) and ("plain" not in words or not scene.striped), caption


# The pack

def test_flickr8k_from_its_pack(data_root):
    files = chapter.flickr8k_files(data_root)
    if not all(path.is_file() for path in files.values()): pytest.skip("no Flickr8k in DDREPRO_DATA")
    real = load_data("flickr8k")
    rows = json.loads((data_root / "flickr8k" / "captions.json").read_text())
    official = "validation" in files
    assert [len(getattr(real, p)) for p in PARTS] == [6000 if official else 5000, 1000, 1000]
    assert real.shapes == {"image": (3, 64, 64)}
    assert ("drawn by key" in real.about["remark"]) != official
    captions = {(r["split"], r["index"]): r["captions"] for r in rows}
    assert real.test.captions == [captions["test", i] for i in range(1000)]
    assert len(real.pairs("test")) == 5000 and real.normalisation["image"] == CLIP
    with np.load(files["test"]) as pack:
        assert (real.test.images[3].permute(1, 2, 0).numpy() == pack["images"][3]).all()
    if official: return
    rest = {p: [tuple(captions) for captions in getattr(real, p).captions] for p in ("train", "validation")}
    assert sorted(rest["train"] + rest["validation"]) == sorted(tuple(captions["train", i]) for i in range(6000))
    with np.load(files["train"]) as pack: pictures = pack["images"]
    row = next(i for i in range(6000) if captions["train", i] == real.validation.captions[500])
    assert (real.validation.images[500].permute(1, 2, 0).numpy() == pictures[row]).all()


def test_damaged_pack_is_named(data_root, tmp_path):
    source = data_root / "flickr8k" / "captions.json"
    if not source.is_file(): pytest.skip("no Flickr8k in DDREPRO_DATA")
    (tmp_path / "flickr8k").mkdir()
    for path in chapter.flickr8k_files(tmp_path).values(): path.write_bytes(b"no pack")
    with pytest.raises(DamagedFile, match="captions.json is damaged or another version"):
        load_data("flickr8k", root=tmp_path)
    (tmp_path / "flickr8k" / "captions.json").write_bytes(source.read_bytes())
    with pytest.raises(DamagedFile, match=r"flickr8k_\w+_64.npz is damaged"): load_data("flickr8k", root=tmp_path)


# Karpathy's files

def picture(*key, shape=(20, 30, 3)):
    return Image.fromarray(keyed(0, "test/pictures", *key).integers(0, 256, shape, dtype=np.uint8))


def make_tree(root, name):
    "A tree of the published form; its rows"
    folder = root / name if name == "coco" else root / name / "flickr30k-images"
    rows = []
    for i, split in enumerate(("train", "train", "restval" if name == "coco" else "train", "val", "test", "test")):
        sentences = [dict(raw=f"Picture {i}, said {j} times.") for j in range(6 if i == 4 else 5)]
        row = dict(filename=f"{i}.png", split=split, sentences=sentences)
        if name == "coco": row["filepath"] = ("train2014", "val2014")[i % 2]
        target = folder / row.get("filepath", "") / row["filename"]
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(target)
        rows.append(row)
    write_rows(root, name, rows)
    return rows


def write_rows(root, name, rows):
    (root / name / f"dataset_{name}.json").write_text(json.dumps(dict(images=rows, dataset=name)))


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_karpathy(name, tmp_path, monkeypatch):
    make_tree(tmp_path, name)
    monkeypatch.setenv("DDREPRO_DATA", str(tmp_path))
    assert list_data().set_index("name").found[name] == "DDREPRO_DATA files"
    real = load_data(name, size=16)
    assert [len(getattr(real, p)) for p in PARTS] == [3, 1, 2]
    assert real.test.captions[0][5] == "Picture 4, said 5 times."
    assert real.pairs("test").image_of.tolist() == [0] * 6 + [1] * 5
    assert "images" not in vars(real.test)
    expected = np.asarray(picture(4).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (real.test.images[0].numpy() == expected).all() and "images" not in vars(real.train)
    assert real.fingerprint == load_data(name, size=16).fingerprint != load_data(name, size=17).fingerprint
    folder = tmp_path / name if name == "coco" else tmp_path / name / "flickr30k-images"
    file = tmp_path / name / f"dataset_{name}.json"
    named = load_data(name, size=16, file=file, images=folder, root=tmp_path / "elsewhere")
    assert named.fingerprint == real.fingerprint


def rows_with(change):
    "Rows of a tree after a change"
    def make(root):
        rows = make_tree(root, "flickr30k")
        change(rows)
        write_rows(root, "flickr30k", rows)
    return make


@pytest.mark.parametrize("change, message", [
    (lambda rows: rows[1].update(filename="gone.png"), "names 'gone.png', which is not in .*flickr30k-images"),
    (lambda rows: [row.update(filename="gone.png") for row in rows[:3]], r"names 'gone.png' \(and 2 others\)"),
    (lambda rows: rows[2]["sentences"][3].update(raw=" . "), "caption 3 of '2.png' is empty once cleaned"),
    (lambda rows: rows[2].update(sentences=[]), "'2.png' has no caption"),
    (lambda rows: rows[0].update(split="tests"), "split of 0.png must be one of .* the nearest is 'test'"),
    (lambda rows: rows[0].pop("sentences"), "image 0 must have filename, split and sentences"),
    (lambda rows: rows.insert(0, "no row"), "image 0 must have filename, split and sentences"),
    (lambda rows: [row.update(split="train") for row in rows],
     "dataset_flickr30k.json has no validation and no test image")])
def test_wrong_karpathy_files_are_refused(change, message, tmp_path):
    rows_with(change)(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message): load_data("flickr30k", root=tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="coco: .*dataset_coco.json is not there; give file=.*DDREPRO_DATA"):
        load_data("coco", root=tmp_path)
    make_tree(tmp_path, "flickr30k")
    with pytest.raises(FileNotFoundError, match="nowhere is not there; give images="):
        load_data("flickr30k", root=tmp_path, images=tmp_path / "nowhere")
    (tmp_path / "flickr30k" / "flickr30k-images" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    real = load_data("flickr30k", root=tmp_path)
    with pytest.raises(DamagedFile, match=r"dataset_flickr30k.json, image 4: '4.png' cannot be read as an image"):
        real.test.images
    file = tmp_path / "flickr30k" / "dataset_flickr30k.json"
    file.write_text("{")
    with pytest.raises(DamagedFile, match="not valid JSON"): load_data("flickr30k", root=tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(DamagedFile, match="dataset_flickr30k.json is not valid JSON"): load_data("flickr30k", root=tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(DamagedFile, match="holds no list 'images'"): load_data("flickr30k", root=tmp_path)


# Tables

@pytest.fixture
def table(tmp_path):
    "A function that writes a table of pictures 0…9 and gives its path"
    (tmp_path / "photos").mkdir()
    for i in range(10): picture(i).save(tmp_path / "photos" / f"{i}.png")
    def write(lines, header=("image", "caption"), encoding="utf-8"):
        with open(tmp_path / "table.csv", "w", encoding=encoding, newline="") as file:
            csv.writer(file).writerows([header, *lines])
        return tmp_path / "table.csv"
    return write


STRANGE = [
    "<script>alert('x')</script>",
    "Zwölf Boxkämpfer, größer als Öl",
    "犬が走る。",
    "Line one\nand line two",
    'He says "hi", then goes',
]


def test_csv(table):
    lines = [(f"photos/{i}.png", f"Picture {i}") for i in range(10)] + [("photos/3.png", s) for s in STRANGE]
    real = load_data("caption_csv", file=table(lines), size=16)
    assert [len(getattr(real, p)) for p in PARTS] == [8, 1, 1]
    captions = [captions for p in PARTS for captions in getattr(real, p).captions]
    assert sorted(map(len, captions)) == [1] * 9 + [6] and ["Picture 3", *STRANGE] in captions
    assert all(getattr(real, p).images.shape[1:] == (3, 16, 16) for p in PARTS)
    assert load_data("caption_csv", file=table(lines), size=16).fingerprint == real.fingerprint
    other = load_data("caption_csv", file=table(lines), size=16, seed=1)
    assert other.train.captions != real.train.captions
    shown = pairs_html(torch.zeros(1, 3, 4, 4), [STRANGE])
    assert "<script" not in shown and "犬が走る。" in shown and "größer" in shown


def test_csv_with_other_columns_and_a_byte_order_mark(table):
    lines = [(i, f"Picture {i}", f"photos/{i}.png") for i in range(10)]
    file = table(lines, ("id", "text", "path"), "utf-8-sig")
    real = load_data("caption_csv", file=file, image_column="path", caption_column="text", name="mine")
    assert (real.name, real.shapes) == ("mine", {"image": (3, 64, 64)})


GOOD = [(f"photos/{i}.png", "A picture.") for i in range(10)]


@pytest.mark.parametrize("lines, options, message", [
    ([*GOOD, ("photos/99.png", "A picture.")], {}, "table.csv, line 12 names '99.png', which is not in .*photos"),
    ([*GOOD, ("photos/1.png", "...")], {}, "line 12: the caption of 'photos/1.png' is empty"),
    ([*GOOD, ("photos/1.png",)], {}, "line 12: the caption of 'photos/1.png' is empty"),
    ([*GOOD, ("", "A picture.")], {}, "line 12: image is empty"),
    (GOOD, dict(image_column="imge"),
     "image_column of .* must be one of 'image', 'caption'; got 'imge'; the nearest is 'image'"),
    (GOOD, dict(caption_column="captions"), "the nearest is 'caption'"),
    ([*GOOD, ("photos/1.png", "A cat", " asleep.")], {},
     "line 12 has more fields than the first line: put captions with commas in quotes"),
    (GOOD, dict(split="splt"), "split of .* must be one of 'image', 'caption'"),
    (GOOD, dict(constants="Clip"), "constants must be one of 'clip', 'own'"),
    (GOOD[:2], {}, "2 pictures are too few")])
def test_wrong_tables_are_refused(lines, options, message, table):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data("caption_csv", file=table(lines), **options)


def test_tables_that_are_none(tmp_path, table):
    with pytest.raises(FileNotFoundError, match="file must name a CSV file"):
        load_data("caption_csv", file=tmp_path / "gone.csv")
    with pytest.raises(FileNotFoundError, match="file must name a CSV file"): load_data("caption_csv", file=tmp_path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="empty.csv is empty"): load_data("caption_csv", file=tmp_path / "empty.csv")
    foreign = table([("photos/1.png", "größer")], encoding="latin-1")
    with pytest.raises(DamagedFile, match="not UTF-8"): load_data("caption_csv", file=foreign)


# Quotation marks. Rows 3 and 7 of ten are given, in lines 5 and 9; a word of a message stands for its sentence

def quoted(third, seventh="Picture 7", head="image,caption", row="photos/{}.png,{}"):
    captions = [f"Picture {i}" for i in range(10)]
    captions[3], captions[7] = third, seventh
    return "\n".join([head, *(row.format(i, caption) for i, caption in enumerate(captions))]) + "\n"


@pytest.mark.parametrize("third, expected", [
    ('A 5" spot', 'A 5" spot'),
    ('"A 5"" spot"', 'A 5" spot'),
    ('"A ""red"" spot, large"', 'A "red" spot, large'),
    ('"Two lines,\nthe second short"', "Two lines,\nthe second short"),
    ('"A blank line\n\nand a ""word"", then\r\nmore"', 'A blank line\n\nand a "word", then\r\nmore'),
    ('"Like photos/4.png, only\nlarger, and redder"', "Like photos/4.png, only\nlarger, and redder"),
    ("'A spot'", "'A spot'"),
    ("“A spot”", "“A spot”"),
])
def test_quoted_captions_are_kept_whole(third, expected, table, tmp_path):
    table([])
    (tmp_path / "table.csv").write_bytes(quoted(third).encode())
    real = load_data("caption_csv", file=tmp_path / "table.csv", size=16)
    captions = [own for p in PARTS for own in getattr(real, p).captions]
    assert len(captions) == 10 and [expected] in captions


@pytest.mark.parametrize("third, seventh, message", [
    ('"A spot, large', "Picture 7", "line 5 opens a quotation mark that is never closed"),
    ('"A spot', '"Picture 7', "line 5 opens a quotation mark that is closed in line 9, where text follows it"),
    ('"A spot', 'Picture 7"', r"line 5 opens a quotation mark that swallows line 6 \(photos/4.png"),
    ('"A spot', '"Picture 7"', "line 5 opens a quotation mark that is closed in line 9"),
    ('"A spot', '""', "line 5 opens a quotation mark that is never closed"),
    ('"A spot" is large', "Picture 7", "line 5 has text behind a closing quotation mark"),
    ('"A spot"s', "Picture 7", "line 5 has text behind a closing quotation mark"),
    (r'"A \"red\" spot, large"', "Picture 7", 'line 5 has marks behind a backslash: write ""'),
    (r'"A spot \""', "Picture 7", 'line 5 has marks behind a backslash: write ""'),
    ("Picture 3", '"' + "A spot\n" * 30_000, "line 9 opens a quotation mark that is never closed"),
    (' "A spot, large"', "Picture 7", "line 5 has more fields .* without a blank before the opening one"),
    ("“A spot, large”", "Picture 7", "line 5 has more fields than the first line"),
])
def test_quotation_marks_that_do_not_match_are_refused_with_their_line(third, seventh, message, table, tmp_path):
    table([])
    (tmp_path / "table.csv").write_text(quoted(third, seventh))
    with pytest.raises(ValueError, match=f"table.csv, {message}"): load_data("caption_csv", file=tmp_path / "table.csv")


def test_marks_are_refused_whatever_the_order_of_columns(table, tmp_path):
    table([])
    for head, row in (("caption,image", "{1},photos/{0}.png"), ("id,caption,image", "{0},{1},photos/{0}.png")):
        (tmp_path / "table.csv").write_text(quoted('"Two\nlines"', head=head, row=row))
        assert len(load_data("caption_csv", file=tmp_path / "table.csv", size=16).train) == 8
        lines = quoted('"A spot', head=head, row=row).splitlines()
        lines[5] = lines[5].replace("4,photos", '4",photos')
        (tmp_path / "table.csv").write_text("\n".join(lines))
        with pytest.raises(DamagedFile, match="table.csv, line 5 opens a quotation mark that swallows line 5"):
            load_data("caption_csv", file=tmp_path / "table.csv")


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"),
    lambda text: text.replace("\n", "\n\n"),
    lambda text: "\n\n" + text,
    lambda text: text + ",\n , \n\n",
    lambda text: text.rstrip("\n"),
    lambda text: "\ufeff" + text,
])
def test_line_ends_and_empty_lines_make_no_difference(change, table, tmp_path):
    file = table(GOOD)
    before = load_data("caption_csv", file=file, size=16).fingerprint
    file.write_bytes(change(file.read_bytes().decode().replace("\r\n", "\n")).encode())
    assert load_data("caption_csv", file=file, size=16).fingerprint == before


@pytest.mark.parametrize("content, message", [
    (quoted("größer").encode("utf-16"), "is not UTF-8 text, but UTF-16 text; save it as CSV in UTF-8"),
    (quoted("größer").encode("utf-16-le"), "but UTF-16 text"),
    (quoted("größer").encode("utf-16-be"), "but UTF-16 text"),
    (quoted("größer").encode("utf-32"), "but UTF-32 text"),
    (quoted("größer").encode("cp1252"), "line 5 is not UTF-8 text; in Windows-1252 it would read 'photos/3.png,größer'.*iconv"),
    (quoted("犬が走る").encode("shift-jis"), "line 5 is not UTF-8 text"),
    (quoted("A\0spot").encode(), "line 5 holds a NUL byte"),
    (b"PK\x03\x04" + bytes(range(1, 99)), "a zip file, such as a workbook of Excel"),
    (b"\x1f\x8b" + bytes(range(1, 99)), "a gzip file"),
    (b"image,caption\n", "table.csv has no row below its first line"),
    (b"\n \n", "table.csv is empty: its first line must name its columns"),
    (b"image,caption,caption\n1.png,a,b\n", "table.csv: 2 columns are named 'caption' in its first line"),
    (b'image,"caption\n1.png,a\n', "table.csv, line 1 opens a quotation mark that is never closed"),
])
def test_other_texts_are_refused_by_what_they_are(content, message, tmp_path):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused: load_data("caption_csv", file=tmp_path / "table.csv")
    assert "table.csv" in str(refused.value)


@pytest.mark.parametrize("sign, word", [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_other_separators_are_named(sign, word, tmp_path):
    (tmp_path / "table.csv").write_text(f"image{sign}caption\n1.png{sign}A cat, asleep.\n")
    message = f"columns must be separated by commas; {word} separate those of its first line"
    with pytest.raises(ValueError, match=message):
        load_data("caption_csv", file=tmp_path / "table.csv")


@pytest.mark.parametrize("options, message", [
    (dict(file=3), "file must be the path of a CSV file, a string or a Path, got 3"),
    (dict(size="48"), "size must be a whole number of pixels, at least 8, got '48'"),
    (dict(size=48.5), "at least 8, got 48.5"),
    (dict(size=4), "at least 8, got 4"),
    (dict(size=True), "at least 8, got True"),
    (dict(validation="a"), "validation must be a number between 0 and 1, got 'a'"),
    (dict(test=1.5), "test must be a number between 0 and 1, got 1.5"),
    (dict(validation=float("nan")), "validation must be a number between 0 and 1, got nan"),
    (dict(validation=.5, test=.5), "must leave pictures to train on, got 0.5 and 0.5"),
    (dict(constants="Clip"), "constants must be one of 'clip', 'own'; got 'Clip'; the nearest is 'clip'"),
    (dict(seed=.5), "seed must be a whole number, got 0.5"),
    (dict(name="a/b"), "name must be without slashes"),
    (dict(name=7), "name must be a word or more, got 7")])
def test_wrong_options_are_refused_before_anything_is_read(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_data("caption_csv", **dict(file=tmp_path / "gone.csv") | options)
    if "size" in options:
        with pytest.raises(ValueError, match=message): load_data("flickr30k", root=tmp_path, **options)


def test_a_table_never_has_the_name_of_a_registered_set(table):
    file, known = table(GOOD), set(list_data().name)
    for name in known:
        assert chapter.table_name(Path(f"{name}.csv")) == f"{name}.csv"
        assert chapter.table_name(Path(name)) == f"{name} (table)"
        assert not {f"{name}.csv", f"{name} (table)"} & known
        with pytest.raises(ValueError, match="name must not be that of a registered data set"):
            chapter.table_name(file, name.upper())
    assert load_data("caption_csv", file=file.rename(file.with_name("flickr30k.csv"))).name == "flickr30k.csv"
    bare = file.with_name("flickr30k.csv").rename(file.with_name("flickr30k"))
    assert load_data("caption_csv", file=bare).name == "flickr30k (table)"
    with pytest.raises(ValueError, match="got 'flickr30k'"): load_data("caption_csv", file=bare, name="flickr30k")


# Given parts

FOLDS = ["train", "test", "val", "Train ", "dev", "validation", "train", "test", "train", "test"]
SPLIT = [
    *((f"photos/{i}.png", f"Picture {i}.", fold) for i, fold in enumerate(FOLDS)),
    ("photos/3.png", "Again 3.", "train"),
]
HEADER = ("image", "caption", "fold")


def test_parts_are_taken_from_a_column(table):
    real = load_data("caption_csv", file=table(SPLIT, HEADER), split="fold", size=16)
    first = {p: [captions[0] for captions in getattr(real, p).captions] for p in PARTS}
    rows = {"train": (0, 3, 6, 8), "validation": (2, 4, 5), "test": (1, 7, 9)}
    assert first == {p: [f"Picture {i}." for i in rows[p]] for p in PARTS}
    assert real.train.captions[1] == ["Picture 3.", "Again 3."]
    expected = np.asarray(picture(7).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert (real.test.images[1].numpy() == expected).all()
    drawn = load_data("caption_csv", file=table(SPLIT, HEADER), size=16)
    without = load_data("caption_csv", file=table([line[:2] for line in SPLIT]), size=16)
    assert drawn.fingerprint == without.fingerprint != real.fingerprint


@pytest.mark.parametrize("lines, message", [
    ([*SPLIT, ("photos/3.png", "More.", "test")],
     "table.csv, line 5 puts 'photos/3.png' in train, line 13 in test; a picture belongs to one part"),
    ([*SPLIT, ("./photos/3.png", "More.", "dev")], "line 5 puts './photos/3.png' in train, line 13 in validation"),
    ([*SPLIT, ("photos/3.png", "More.", "tarin")],
     "table.csv, line 13: fold must be one of .*; got 'tarin'; the nearest is 'train'"),
    ([*SPLIT, ("photos/3.png", "More.")], "table.csv, line 13: fold must be one of .*; got ''"),
    ([line for line in SPLIT if line[2] != "test"],
     "table.csv has no test image: train, validation, test each need one at least"),
    (SPLIT[:1], "table.csv has no validation and no test image")])
def test_wrong_parts_are_refused(lines, message, table):
    with pytest.raises(ValueError, match=message): load_data("caption_csv", file=table(lines, HEADER), split="fold")


# Few pictures, and files that are none

def test_a_tiny_test_part_is_told_once(table):
    lines = [(f"photos/{i}.png", "A picture.") for i in range(10)]
    message = "table.csv has only 1 of its pictures for testing, fewer than 20, .*R@1 by chance: 100 %"
    with pytest.warns(UserWarning, match=message) as warned: real = load_data("caption_csv", file=table(lines))
    assert len(warned) == 1 and warned[0].filename == __file__ and "R@k means little" in real.about["remark"]


def test_a_test_part_of_twenty_is_not(table, tmp_path):
    for i in range(10, 40): picture(i).save(tmp_path / "photos" / f"{i}.png")
    lines = [(f"photos/{i}.png", "A picture.") for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "R@k" not in load_data("caption_csv", file=table(lines), test=.5).about["remark"]
    with pytest.warns(UserWarning, match="only 19 of"): load_data("caption_csv", file=table(lines), test=19 / 40)


@pytest.mark.parametrize("content", [b"no picture", b"", b"GIF", b"\x89PNG\r\n\x1a\n rubbish"])
def test_what_is_no_picture_is_found_with_the_table(content, table, tmp_path):
    (tmp_path / "photos" / "5.png").write_bytes(content)
    message = r"table.csv, line 7: '5\.png' cannot be read as an image .*; repair it, or take out what names it"
    with pytest.raises(DamagedFile, match=message): load_data("caption_csv", file=table(GOOD))


def test_a_truncated_picture_is_named_with_its_line_when_read(table, tmp_path):
    file = tmp_path / "photos" / "5.png"
    file.write_bytes(file.read_bytes()[:-400])
    folds = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    lines = [(*line, fold) for line, fold in zip(GOOD, folds)]
    real = load_data("caption_csv", file=table(lines, HEADER), split="fold")
    assert real.test.images.shape == (2, 3, 64, 64)
    message = r"table.csv, line 7: '5\.png' cannot be read as an image \(image file is truncated"
    with pytest.raises(DamagedFile, match=message):
        real.train.images


def test_headers_alone_are_read_with_the_table(table, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a picture was decoded"))
    load_data("caption_csv", file=table(GOOD))


def test_the_registry_knows_them():
    shown = list_data().set_index("name")
    for name in ("digit_scenes", "flickr8k", "flickr30k", "coco", "caption_csv"):
        assert (shown.modalities[name], shown.classes[name]) == ("image+text", 0)
    assert shown.found["digit_scenes"] == "embedded" and re.fullmatch(r"\d+/\d+/\d+", shown.sizes["coco"])
