"""Clips cut from videos that are really encoded: of phones and web pages, damaged, mute, late, and a run that is stopped."""
import csv
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ddrepro.data.ingest as ingesting
from ddrepro.data.clip_data import clip_data
from ddrepro.data.clip_lists import ClipList, Video, folder_list
from ddrepro.data.ingest import Refusal, checksum_of, ingest
from ddrepro.data.made_clips import clock_time, make_clip, pitch
from ddrepro.data.registry import load_data
from ddrepro.data.seconds import read_seconds
from ddrepro.data.signals import DIGITS_MEL
from ddrepro.data.video import Fault, Look

RATE = 11_000
LOOK = Look(64, DIGITS_MEL)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch): monkeypatch.setenv("DDREPRO_WORKERS", "0")


def seconds_of(path, which="every", **options):
    found = read_seconds(path, which, Look(64, **options))
    return [s.reason if isinstance(s, Fault) else s for s in found]


def check_clock(seconds, moment=.5, slack=.06, sounds=True):
    "Every second shows its middle and sounds as that second"
    for k, s in enumerate(seconds):
        assert not isinstance(s, str), s
        assert clock_time(s.image) == pytest.approx((k + moment) % 10, abs=slack)
        assert s.wave.shape == (RATE,)
        if sounds: assert pitch(s.wave, RATE) == pytest.approx(400 + 100 * k, abs=2)


@pytest.mark.parametrize("name, options", [
    ("clip.mp4", {}),
    ("clip.webm", dict(video="libvpx-vp9", audio="libopus")),
    ("clip.mkv", dict(layout="5.1")),
    ("clip.mov", dict(layout="mono", sample_rate=22_050)),
    ("cd.mp4", dict(sample_rate=44_100)),
    ("slow.mp4", dict(rate=12)),
    ("one_keyframe.mp4", dict(keyframes=250)),
])
def test_codecs_and_containers(tmp_path, name, options):
    seconds = seconds_of(make_clip(tmp_path / name, 3., **options))
    assert len(seconds) == 3
    check_clock(seconds, moment=.48, slack=.11)


def test_loudness_does_not_depend_on_the_number_of_channels(tmp_path):
    "The root mean square of a tone of half of full scale"
    loud = [seconds_of(make_clip(tmp_path / f"{layout}.mkv", 2., layout=layout, audio="flac"))[1].wave.square().mean().sqrt().item()
            for layout in ("mono", "stereo", "5.1")]
    assert loud == pytest.approx([.5 / 2**.5] * 3, abs=.005)


def test_pictures_at_varying_rates_are_those_on_screen(tmp_path):
    "A player shows a picture until the next one comes, however long that is"
    path = make_clip(tmp_path / "phone.mp4", 3., times=[0, .1, .12, .3, .45, .7, 1.2, 1.49, 1.52, 2.0, 2.4, 2.95])
    shown = [clock_time(s.image) for s in seconds_of(path)]
    assert shown == pytest.approx([.45, 1.49, 2.4], abs=.04)


@pytest.mark.parametrize("turned, quarter", [(0, 0), (90, 1), (180, 3), (270, 2)])
def test_a_phones_video_stands_upright(tmp_path, turned, quarter):
    image = seconds_of(make_clip(tmp_path / "phone.mp4", 1., size=(48, 96), turned=turned))[0].image.float()
    red = image[0] - image[1] > 80
    where = [red[i:i + 32, j:j + 32].float().mean().item() for i in (0, 32) for j in (0, 32)]
    assert np.argmax(where) == quarter and sorted(where)[2] < .2 < .8 < max(where)


def test_crop_keeps_proportions(tmp_path):
    "A picture twice as wide as high, cut to its middle: the red quarter is as wide as before it was high"
    path = make_clip(tmp_path / "wide.mp4", 1., size=(64, 128))
    width = {fit: ((x := seconds_of(path, fit=fit)[0].image.float())[0, 8] - x[1, 8] > 80).sum().item()
             for fit in ("stretch", "crop")}
    assert width["stretch"] == pytest.approx(32, abs=1) and width["crop"] == pytest.approx(32, abs=1)
    path = make_clip(tmp_path / "high.mp4", 1., size=(128, 64))
    image = seconds_of(path, fit="crop")[0].image.float()
    assert (image[0, :, 8] - image[1, :, 8] > 80).sum().item() == pytest.approx(32, abs=1)


def test_sound_that_starts_late_stays_in_step(tmp_path):
    "Its first second has too little; asked for less, it is read with silence before the sound"
    path = make_clip(tmp_path / "late.mp4", 3., sound_from=.6)
    first, *others = seconds_of(path)
    assert first == "sound gap"
    for k, s in enumerate(others, 1): assert pitch(s.wave, RATE) == pytest.approx(400 + 100 * k, abs=2)
    wave = seconds_of(path, least=.3)[0].wave
    assert wave[:round(.55 * RATE)].abs().max() < .01 < .4 < wave[round(.65 * RATE):].abs().max()


def test_far_seconds_are_reached_by_a_jump_and_are_the_same(tmp_path):
    path = make_clip(tmp_path / "long.mp4", 12., keyframes=50)
    jumped, = seconds_of(path, [9])
    walked = seconds_of(path, range(10))[9]
    assert torch.equal(jumped.image, walked.image)
    assert (jumped.wave - walked.wave).abs().max() < 1e-3
    assert seconds_of(path, "middle")[0].start == 5. and seconds_of(path, "first")[0].start == 0.


def damaged(folder):
    "Files that cannot be read whole, and what is to be said of each"
    make = lambda name, *args, **options: make_clip(folder / name, *args, **options)
    cut = make("cut.mkv", 4.)
    cut.write_bytes(cut.read_bytes()[:cut.stat().st_size // 2])
    headless = make("headless.mp4", 2.)
    headless.write_bytes(headless.read_bytes()[:headless.stat().st_size // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is no video.\n" * 50)
    make("mute.mp4", 1., audio=None)
    make("radio.mp4", 1., video=None)
    make("still.mp4", 1., sound=lambda t: 0 * t)
    make("short.mp4", .6)
    return {"cut.mkv": "cut off", "headless.mp4": "unreadable", "empty.mp4": "unreadable", "text.mp4": "unreadable",
            "mute.mp4": "no sound", "radio.mp4": "no picture", "still.mp4": "silent", "short.mp4": "too short"}


def test_every_damaged_file_is_told_of_by_its_reason(tmp_path):
    for name, reason in damaged(tmp_path).items(): assert seconds_of(tmp_path / name)[-1] == reason, name
    assert seconds_of(tmp_path / "nowhere.mp4") == ["missing"]


def test_flipped_bytes_never_pass_for_what_they_were(tmp_path):
    "A second is whole, or a fault; nothing is raised"
    whole = make_clip(tmp_path / "whole.mp4", 3., keyframes=5)
    content = whole.read_bytes()
    rng = np.random.default_rng(0)
    for n in range(12):
        flipped = bytearray(content)
        for at in rng.integers(len(content) // 50, len(content), 20): flipped[at] ^= 255
        (tmp_path / "flipped.mp4").write_bytes(flipped)
        assert all(isinstance(s, Fault) or s.image.shape == (3, 64, 64) for s in read_seconds(tmp_path / "flipped.mp4", "every", Look(64)))


def own_folder(root, **options):
    "Two classes of five clips"
    for c in ("cat", "dog"):
        (root / c).mkdir(parents=True)
        for i in range(5): make_clip(root / c / f"{i}.mp4", 2., **options)
    return root


def report_of(out): return list(csv.DictReader((out / "report.csv").open()))


def test_report_lists_all_and_nothing_takes_their_place(tmp_path):
    folder = own_folder(tmp_path / "mine")
    reasons = damaged(folder / "dog")
    out = ingest(folder_list(folder, "mine").clips, tmp_path / "out", LOOK)
    rows = {Path(row["file"]).name: row["reason"] for row in report_of(out)}
    assert rows == reasons
    assert {row["class"] for row in report_of(out)} == {"dog"}
    real = clip_data(out)
    assert sum(len(p) for p in (real.train, real.validation, real.test)) == 10 * 2 + 2      # two seconds of cut.mkv


def test_refused_by_a_switch_that_names_file_and_report(tmp_path):
    folder = own_folder(tmp_path / "mine")
    make_clip(folder / "dog/mute.mp4", 1., audio=None)
    with pytest.raises(Refusal, match=r"dog/mute.mp4: no sound; .*report.csv"):
        ingest(folder_list(folder, "mine").clips, tmp_path / "out", LOOK, bad="refuse")
    with pytest.raises(FileNotFoundError, match="not to the end"): clip_data(tmp_path / "out")


def small_shards(monkeypatch): monkeypatch.setattr(ingesting, "SHARD_SECONDS", 20)     # two videos each, of "every" second


def sums(out): return {p.name: checksum_of(p) for p in sorted(out.glob("shard-*"))}


def test_stopped_and_started_again_it_is_the_same(tmp_path, monkeypatch):
    small_shards(monkeypatch)
    clips = folder_list(own_folder(tmp_path / "mine"), "mine").clips
    whole = sums(ingest(clips, tmp_path / "whole", LOOK))
    assert len(whole) == 5
    cut, done = ingesting.cut_shard, []
    def stopping(job):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(job.path)
        return cut(job)
    with monkeypatch.context() as patch:
        patch.setattr(ingesting, "cut_shard", stopping)
        with pytest.raises(KeyboardInterrupt): ingest(clips, tmp_path / "out", LOOK)
    assert len(sums(tmp_path / "out")) == 2 and not (tmp_path / "out/clips.json").exists()
    read = []
    monkeypatch.setattr(ingesting, "read_seconds", lambda path, *a: read.append(path.name) or read_seconds(path, *a))
    ingest(clips, tmp_path / "out", LOOK)
    assert len(read) == 6                                                   # of ten videos, four were there
    assert sums(tmp_path / "out") == whole
    assert not list((tmp_path / "out").glob(".*.part"))


def test_a_video_that_is_added_or_mended_costs_its_own_shard(tmp_path, monkeypatch):
    small_shards(monkeypatch)
    folder = own_folder(tmp_path / "mine")
    videos = [Video(f"v{i}", f"{c}/{i}.mp4", "every", k, "train") for k, c in enumerate(("cat", "dog")) for i in range(5)]
    listed = lambda vs: ClipList("set", folder, ("cat", "dog"), tuple(vs))
    missing = [v._replace(file="") if v.name == "v4" and v.label else v for v in videos]
    out = ingest(listed(missing), tmp_path / "out", LOOK)
    assert [row["reason"] for row in report_of(out)] == ["missing"]
    read = []
    monkeypatch.setattr(ingesting, "read_seconds", lambda path, *a: read.append(path.name) or read_seconds(path, *a))
    ingest(listed(videos), out, LOOK)
    assert read == ["3.mp4", "4.mp4"] and report_of(out) == []


def test_processes_side_by_side_cut_the_same_shards(tmp_path, monkeypatch):
    clips = folder_list(own_folder(tmp_path / "mine"), "mine").clips
    alone = sums(ingest(clips, tmp_path / "alone", LOOK))
    monkeypatch.setenv("DDREPRO_WORKERS", "1")
    assert sums(ingest(clips, tmp_path / "pool", LOOK)) == alone


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    folder = own_folder(tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'ddrepro\[video\]'"):
        load_data("av_folder", folder=folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_own_videos_are_distilled(tmp_path):
    from ddrepro.distill import distill
    from ddrepro.methods import get_method
    folder = own_folder(tmp_path / "mine", size=(32, 32))
    real = load_data("av_folder", folder=folder, size=32, signal=DIGITS_MEL, out=tmp_path / "out")
    method = get_method("avdd", ipc=1, factor=1, width=8, iterations=2, batch=4, start_from="random")
    s = distill(method, real, seed=0, progress=False) if "progress" in distill.__code__.co_varnames else distill(method, real, seed=0)
    assert {m: tuple(x.shape) for m, x in s.tensors.items()} == {"image": (2, 1, 3, 32, 32), "audio": (2, 1, 1, 32, 32)}


def test_parts_never_share_a_video(tmp_path):
    folder = own_folder(tmp_path / "mine")
    clips = folder_list(folder, "mine").clips
    parts = {p: {v.file for v in clips.videos if v.part == p} for p in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 10


def write_ave(folder):
    "Lists in AVE's format on a single video of four seconds"
    from ddrepro.data.sets.avdd_sets import AVE
    (folder / "AVE").mkdir(parents=True)
    make_clip(folder / "AVE/one.mp4", 4., sound=lambda t: np.where(t < 2.9, .5 * np.sin(3000 * t), 0))
    names = {"church bell": "Church bell", "male speech": "Male speech, man speaking", "frying": "Frying (food)"}
    category = lambda c: names.get(c, c.capitalize())
    for name, start, end in (("trainSet.txt", 0, 2), ("valSet.txt", 2, 3), ("testSet.txt", 3, 4)):
        (folder / name).write_text("".join(f"{category(c)}&one&good&{start}&{end}\n" for c in AVE))
    with (folder / "trainSet.txt").open("a") as file: file.write("Church bell&VWi2ENBuTbw&good&0&0\n")
    return folder


def test_ave_has_its_official_parts_and_keeps_silence(tmp_path):
    real = load_data("ave", folder=write_ave(tmp_path / "AVE_Dataset"), out=tmp_path / "out")
    assert [len(p) for p in (real.train, real.validation, real.test)] == [56, 28, 28]
    assert "28 silent seconds are among it" in real.about["remark"] and "1 more excluded" in real.about["remark"]
    assert real.about["published"]
    rows = report_of(tmp_path / "out")
    assert {(row["reason"], row["detail"]) for row in rows} == {("excluded", ""), ("silent", "kept")}
    assert real.shapes == {"image": (3, 224, 224), "audio": (1, 128, 56)}


def test_ave_that_lacks_a_video_is_no_published_set(tmp_path):
    folder = write_ave(tmp_path / "AVE_Dataset")
    with (folder / "testSet.txt").open("a") as file: file.write("Bark&gone&good&0&2\n")
    with pytest.warns(UserWarning, match="ave: left out 1 missing"): real = load_data("ave", folder=folder, out=tmp_path / "out")
    assert not real.about["published"]
    with pytest.raises(Refusal, match="lacks 1 of 85 videos, such as gone"):
        load_data("ave", folder=folder, out=tmp_path / "strict", bad="refuse")
    assert not (tmp_path / "strict").exists()


def test_vggs10k_reads_the_authors_table_and_drops_their_clip(tmp_path):
    from ddrepro.data.sets.avdd_sets import VGGS10K
    (tmp_path / "VGG/videos").mkdir(parents=True)
    for name in ("a", "b", "JsxLvhJ4P6w"): make_clip(tmp_path / f"VGG/videos/{name}.mp4", 6.)
    rows = [f'{v},0,"{c}",{p},{i}' for i, c in enumerate(VGGS10K) for v, p in (("a", "train"), ("b", "train"), ("b", "test"))]
    rows.append("JsxLvhJ4P6w,0,driving buses,test,9")
    (tmp_path / "VGG/vgg_subset.csv").write_text("vid,num,label,split,label_id\n" + "\n".join(rows) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real = load_data("vggs10k", folder=tmp_path / "VGG", out=tmp_path / "out")
    assert real.classes == VGGS10K and len(real.test) == 10
    assert clock_time(real.test.inputs["image"][0]) == pytest.approx(4.48, abs=.06)
    assert [row["video"] for row in report_of(tmp_path / "out")] == ["JsxLvhJ4P6w_000000"]
