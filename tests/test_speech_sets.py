"""The speech sets from small trees and archives in the format of the real ones, and FSDD itself where it is at hand."""
import hashlib
import io
import shutil
import zipfile

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

import ddrepro.data.sets.av_mnist as av_mnist
import ddrepro.data.sets.speech_sets as chapter
from ddrepro.core.files import DamagedFile
from ddrepro.core.seeding import keyed
from ddrepro.data.real import PARTS
from ddrepro.data.registry import list_data, load_data
from ddrepro.data.sets.av_mnist import find_pack, obtain, read_archive
from ddrepro.data.signals import (
    AVDD_MEL,
    DIGITS_LOG,
    DIGITS_MEL,
    SPEECH_LOG,
    LogSpectrogram,
    read_sound,
    resample,
    signal_facts,
    signal_from,
    to_wave,
)
from helpers import served

CLIPS = 24


def sizes(real): return {p: len(getattr(real, p)) for p in PARTS}


def tone(hz, rate, seconds=1.0): return np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)


def chirp(rate): return scipy.signal.chirp(np.arange(rate) / rate, 100, 1, rate / 2 - 200)


# The spectrogram

def by_scipy(wave, p):
    "Magnitudes (128, 125) on a square of 128, averaged by 2×2, log(x + 1e-3)"
    window = scipy.signal.get_window("hann", p.n_fft)
    frames = dict(nperseg=p.n_fft, noverlap=p.n_fft - p.hop, boundary="even", padded=False)
    magnitude = np.abs(scipy.signal.stft(wave, window=window, **frames)[2]) * window.sum()
    assert magnitude.shape == (128, 125)
    square = np.pad(magnitude, ((0, 0), (1, 2)))
    return np.log(square.reshape(64, 2, 64, 2).mean((1, 3)) + 1e-3)


@pytest.mark.parametrize("p", [SPEECH_LOG, DIGITS_LOG])
def test_frame_counts_and_values(p):
    assert (p.bins, p.frames, p.padding, p.shape) == (128, 125, (1, 2), (1, 64, 64))
    rate = p.sample_rate
    noise = keyed(0, "made").standard_normal(rate)
    for wave in (tone(440, rate), chirp(rate), noise, np.r_[tone(440, rate, .5), np.zeros(rate // 2)]):
        image = p(torch.from_numpy(wave).float())
        assert image.shape == (1, 64, 64) and image.dtype == torch.float32
        assert np.abs(image[0].numpy() - by_scipy(wave, p)).max() < 5e-3


def test_short_and_long_sounds():
    wave = torch.from_numpy(tone(440, 16_000)).float()
    assert torch.equal(SPEECH_LOG(wave[:9_000]), SPEECH_LOG(torch.cat([wave[:9_000], torch.zeros(7_000)])))
    assert torch.equal(SPEECH_LOG(torch.cat([wave, wave])), SPEECH_LOG(wave))
    one_by_one = torch.stack([SPEECH_LOG(wave), SPEECH_LOG(0 * wave)])
    assert torch.allclose(SPEECH_LOG(torch.stack([wave, 0 * wave])), one_by_one, atol=1e-5)
    long = LogSpectrogram(16_000, samples=80_000)(torch.from_numpy(tone(440, 16_000, 5)).float())
    assert long.shape == (1, 64, 64) and long[0].mean(1).argmax() == 3


def test_there_and_back():
    long, short = LogSpectrogram(16_000, samples=48_000), LogSpectrogram(16_000, samples=4_000, hop=32)
    for p in (SPEECH_LOG, DIGITS_LOG, long, short):
        x = p(torch.from_numpy(tone(1000, p.sample_rate, 3)).float())
        wave = to_wave(x, p)
        assert wave.shape == (p.samples,) and torch.isfinite(wave).all() and wave.abs().max() <= 1
        heard = torch.fft.rfft(wave).abs().argmax() * p.sample_rate / p.samples
        assert abs(heard - 1000) < 2 * p.sample_rate / p.n_fft
    assert torch.isfinite(to_wave(torch.full((1, 64, 64), 1e4), SPEECH_LOG)).all()


def test_parameters_as_plain_data():
    for p in (AVDD_MEL, DIGITS_MEL, SPEECH_LOG, DIGITS_LOG): assert signal_from(signal_facts(p)) == p
    assert signal_from(vars(AVDD_MEL)) == AVDD_MEL
    for wrong in ({"kind": "Mel"}, {"kind": "LogSpectrogram"}, {"sample_rate": 3, "colour": 1}):
        with pytest.raises(ValueError): signal_from(wrong)


def test_a_ratio_of_large_terms_is_exact():
    "1143 to 1100: ten seconds keep their length, and the tone is in its place at their end"
    wave = resample(torch.from_numpy(tone(440, 11_430, 10)).float(), 11_430, 11_000)
    assert wave.shape == (110_000,)
    assert (wave[200:-200] - torch.from_numpy(tone(440, 11_000, 10)).float()[200:-200]).abs().max() < 5e-3
    assert resample(torch.zeros(11_430), 11_430, 11_000).shape == (11_000,)


def test_resampling_keeps_the_tone():
    for rate in (8_000, 11_025, 22_050, 32_000, 44_100, 44_101, 48_000, 96_000):
        wave = resample(torch.from_numpy(tone(440, rate)).float(), rate, 16_000)
        assert abs(len(wave) - 16_000) <= 1
        expected = torch.from_numpy(tone(440, 16_000)).float()
        assert (wave[200:-200] - expected[200:len(wave) - 200]).abs().max() < 5e-3, rate


def test_reading(tmp_path):
    both = np.stack([.5 * tone(440, 22_050), 0 * tone(440, 22_050)], axis=1)
    for name, near in (("a.wav", 1e-3), ("a.flac", 1e-3), ("a.ogg", 5e-2)):
        soundfile.write(tmp_path / name, both, 22_050)
        wave = read_sound(tmp_path / name, 16_000)
        assert (wave[200:-200] - .25 * torch.from_numpy(tone(440, 16_000)).float()[200:-200]).abs().max() < near
        assert abs(len(read_sound(tmp_path / name, 16_000, seconds=.1)) - 1_600) <= 2


# spoken_digits and fsdd

def test_spoken_digits():
    real = load_data("spoken_digits")
    assert sizes(real) == {"train": 1100, "validation": 240, "test": 400} and real.shapes == {"audio": (1, 64, 64)}
    assert real.strategy == "" and real.signals == {"audio": DIGITS_LOG} and real.about["published"] is False
    batch = real.batch("train", range(1100))["audio"]
    assert abs(batch.mean()) < 1e-3 and abs(batch.std() - 1) < 1e-3
    assert load_data("spoken_digits", train_per_class=1000).fingerprint == real.fingerprint


def made_archive():
    "FSDD's repository: one speaker, ten digits, fifty takes of noise"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for digit in range(10):
            for take in range(50):
                wave = (8000 * keyed(0, "made", digit, take).standard_normal(200 + take)).astype(np.int16)
                soundfile.write(wav := io.BytesIO(), wave, 8000, format="WAV", subtype="PCM_16")
                file.writestr(f"made/recordings/{digit}_ada_{take}.wav", wav.getvalue())
    return content.getvalue()


@pytest.fixture
def site(tmp_path):
    "A folder that is served, and its address"
    folder = tmp_path / "site"
    folder.mkdir()
    with served(folder) as address: yield folder, address


def test_fsdd_is_downloaded_once(site, tmp_path, monkeypatch):
    folder, address = site
    (folder / "fsdd.zip").write_bytes(archive := made_archive())
    arrays = read_archive(archive)
    monkeypatch.setattr(av_mnist, "FSDD_URL", address + "fsdd.zip")
    monkeypatch.setitem(av_mnist.SHA, "fsdd", {k: hashlib.sha256(x.tobytes()).hexdigest() for k, x in arrays.items()})
    with pytest.raises(FileNotFoundError, match="fsdd/fsdd.npz is not there.*DDREPRO_DATA"):
        chapter.fsdd(root=tmp_path / "data", download=False)
    real = chapter.fsdd(root=tmp_path / "data")
    assert sizes(real) == {"train": 400, "validation": 50, "test": 50}
    shutil.rmtree(folder)
    assert chapter.fsdd(root=tmp_path / "data", download=False).fingerprint == real.fingerprint
    with pytest.raises(ConnectionError, match="fsdd: cannot download.*DDREPRO_DATA"):
        chapter.fsdd(root=tmp_path / "elsewhere")


def test_the_real_fsdd(data_root):
    if not find_pack("fsdd", data_root): pytest.skip("no pack of FSDD there")
    real = load_data("fsdd", download=False)
    assert sizes(real) == {"train": 2400, "validation": 300, "test": 300}
    for p, n in sizes(real).items(): assert getattr(real, p).labels.bincount().tolist() == [n // 10] * 10
    batch = real.batch("train", range(2400))["audio"]
    assert real.shapes == {"audio": (1, 64, 64)} and abs(batch.mean()) < 1e-3 and abs(batch.std() - 1) < 1e-3
    pack = obtain("fsdd")
    first = np.flatnonzero(pack["take"] < 5)[0]
    wave = pack["audio"][pack["offsets"][first]:pack["offsets"][first + 1]].astype(np.float64) / 32768
    expected = by_scipy(np.pad(wave, (0, 8000))[:8000], DIGITS_LOG)
    assert np.abs(real.test.inputs["audio"][0, 0].numpy() - expected).max() < 5e-3
    assert load_data("fsdd", train_per_class=20, download=False).train.labels.bincount().tolist() == [20] * 10
    assert list_data().set_index("name").found["fsdd"] == "DDREPRO_DATA pack"


# mini_speech_commands

def write_commands(folder, clips=CLIPS):
    "folder/COMMAND/*.wav as in the real set, with what a Mac leaves in the zip"
    for c, command in enumerate(chapter.COMMANDS):
        (folder / command).mkdir(parents=True)
        for i in range(clips):
            wave = .1 * keyed(0, "made", c, i).standard_normal(12_000 + 200 * i)
            soundfile.write(folder / command / f"{(7 * i) % clips:04x}_nohash_0.wav", wave, 16_000)
        (folder / command / "._0000_nohash_0.wav").write_bytes(b"Mac")
    (folder / "README.md").write_text("made up")


def zip_commands(folder):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        for f in sorted(folder.rglob("*")):
            if f.is_file(): file.write(f, f"mini_speech_commands/{f.relative_to(folder)}")
        file.writestr("__MACOSX/mini_speech_commands/yes/._0000_nohash_0.wav", b"Mac")
    return content.getvalue()


@pytest.fixture
def commands(tmp_path, monkeypatch):
    "A folder of data sets with the unpacked set in it, of a few clips"
    monkeypatch.setattr(chapter, "CLIPS", CLIPS)
    write_commands(tmp_path / "data/mini_speech_commands")
    return tmp_path / "data"


def test_commands_from_a_folder_and_from_a_zip(commands, tmp_path, monkeypatch):
    real = chapter.mini_speech_commands(root=commands, download=False)
    assert real.classes == ("yes", "no", "go", "stop", "left", "right", "up", "down")
    assert real.shapes == {"audio": (1, 64, 64)}
    assert sizes(real) == {"train": 19 * 8, "validation": 2 * 8, "test": 3 * 8}
    assert real.about["published"] is True and "unpacked folder" in real.about["remark"]
    for c, command in enumerate(real.classes):
        names = sorted(f.name for f in (commands / "mini_speech_commands" / command).glob("[!.]*.wav"))[::8]
        for x, name in zip(real.test.inputs["audio"][real.test.by_class[c]], names):
            wave, _ = soundfile.read(commands / "mini_speech_commands" / command / name)
            assert np.abs(x[0].numpy() - by_scipy(np.pad(wave, (0, 16_000))[:16_000], SPEECH_LOG)).max() < 5e-3
    (tmp_path / "zipped").mkdir()
    content = zip_commands(commands / "mini_speech_commands")
    (tmp_path / "zipped/mini_speech_commands.zip").write_bytes(content)
    zipped = chapter.mini_speech_commands(root=tmp_path / "zipped", download=False)
    assert zipped.fingerprint == real.fingerprint and hashlib.sha256(content).hexdigest() in zipped.about["remark"]
    assert len(chapter.mini_speech_commands(train_per_class=2, root=commands).train) == 16
    monkeypatch.setenv("DDREPRO_DATA", str(commands))
    assert list_data().set_index("name").found["mini_speech_commands"] == str(commands / "mini_speech_commands")
    assert load_data("mini_speech_commands").fingerprint == real.fingerprint


def test_commands_are_downloaded_once(commands, site, tmp_path, monkeypatch, capsys):
    folder, address = site
    content = zip_commands(commands / "mini_speech_commands")
    (folder / "mini.zip").write_bytes(content)
    monkeypatch.setattr(chapter, "COMMANDS_URL", address + "mini.zip")
    root, sha = tmp_path / "new", hashlib.sha256(content).hexdigest()
    real = chapter.mini_speech_commands(root=root)
    assert sha in capsys.readouterr().out and sha in (root / "mini_speech_commands.zip.sha256").read_text()
    (folder / "mini.zip").unlink()
    assert chapter.mini_speech_commands(root=root, download=False).fingerprint == real.fingerprint
    (root / "mini_speech_commands.zip").write_bytes(content[:5000] + b"??" + content[5002:])
    with pytest.raises(DamagedFile, match="has changed since the download"): chapter.mini_speech_commands(root=root)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ConnectionError, match="cannot download.*Either put the folder"):
        chapter.mini_speech_commands(root=elsewhere)
    with pytest.raises(FileNotFoundError, match="is not there. Either put the folder"):
        chapter.mini_speech_commands(root=elsewhere, download=False)


def test_other_counts_and_damage_are_refused(commands, site, tmp_path, monkeypatch):
    folder, address = site
    source = commands / "mini_speech_commands"
    whole = zip_commands(source)
    victim = next((source / "up").glob("[!.]*.wav"))
    recording = victim.read_bytes()
    victim.unlink()
    with pytest.raises(DamagedFile, match="yes 24.*up 23.*expected 24 .wav"):
        chapter.mini_speech_commands(root=commands)
    monkeypatch.setattr(chapter, "COMMANDS_URL", address + "mini.zip")
    half = whole[:len(whole) // 2]
    for content, says in ((zip_commands(source), "up 23"), (half, "not an intact zip"), (b"", "not an intact zip")):
        (folder / "mini.zip").write_bytes(content)
        with pytest.raises(DamagedFile, match=says): chapter.mini_speech_commands(root=tmp_path / "new")
        assert not (tmp_path / "new").exists()
    victim.write_bytes(recording[:20])
    with pytest.raises(ValueError, match=f"up/{victim.name} of .* cannot be read as a sound"):
        chapter.mini_speech_commands(root=commands)
    (tmp_path / "zipped").mkdir()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 16
    (tmp_path / "zipped/mini_speech_commands.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match="zip cannot be read|cannot be read as a sound"):
        chapter.mini_speech_commands(root=tmp_path / "zipped")


# a folder of one's own

RATES = {"wav": 44_100, "flac": 22_050, "ogg": 8_000}


def write_sounds(folder, classes=("cat", "dog"), n=10):
    "Class k is a tone of 500 (k + 1) Hz, of several lengths, rates, formats and numbers of channels"
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            kind = list(RATES)[i % 3]
            wave = .5 * tone(500 * (c + 1), RATES[kind], .3 + .2 * i)
            file = f"{i:02d}.{kind.upper() if i == 0 else kind}"
            soundfile.write(folder / name / file, np.stack([wave] * (1 + i % 3), 1), RATES[kind])


def test_a_flat_folder(tmp_path):
    write_sounds(tmp_path / "pets")
    for hidden in ("pets/.git", "pets/cat/.hidden"): (tmp_path / hidden).mkdir()
    for passed_over in ("pets/readme.txt", "pets/cat/notes.txt", "pets/cat/._00.wav"):
        (tmp_path / passed_over).write_text("not a sound")
    with pytest.warns(UserWarning, match="pets: read 20 sounds, left out 5: 1 .txt, .* such as cat/notes.txt") as told:
        real = load_data("sound_folder", folder=tmp_path / "pets")
    assert len(told) == 1 and told[0].filename == __file__
    (tmp_path / "pets/cat/notes.txt").unlink()
    assert real.name == "pets"
    assert real.classes == ("cat", "dog")
    assert real.signals == {"audio": SPEECH_LOG}
    assert real.strategy == ""
    assert sizes(real) == {"train": 14, "validation": 2, "test": 4}
    for p in PARTS:
        part = getattr(real, p)
        rows = part.inputs["audio"][:, 0].exp().sum(2).argmax(1)          # 500 Hz is bin 8.0, 1000 Hz bin 15.9
        assert (rows - 4 * (part.labels + 1)).abs().max() <= 1
    again, other = chapter.sound_folder(tmp_path / "pets"), chapter.sound_folder(tmp_path / "pets", seed=1)
    assert again.fingerprint == real.fingerprint != other.fingerprint
    assert len(chapter.sound_folder(tmp_path / "pets", train_per_class=2).train) == 4


def test_length_and_rate_of_a_folder(tmp_path):
    write_sounds(tmp_path / "pets")
    for seconds, rate, hop in ((.5, 8_000, 32), (1, 8_000, 64), (3, 16_000, 128), (.05, 4_000, 2), (1, 48_000, 128)):
        real = chapter.sound_folder(tmp_path / "pets", name="mine", seconds=seconds, sample_rate=rate)
        p = real.signals["audio"]
        assert (real.name, p.samples, p.hop) == ("mine", round(seconds * rate), hop)
        assert real.shapes == {"audio": (1, 64, 64)}
        assert to_wave(real.train.inputs["audio"][0], p).shape == (p.samples,)


def test_parts_given_as_folders(tmp_path):
    write_sounds(tmp_path / "pets/train", n=5)
    write_sounds(tmp_path / "pets/test", n=1)
    assert sizes(chapter.sound_folder(tmp_path / "pets")) == {"train": 8, "validation": 2, "test": 2}
    write_sounds(tmp_path / "pets/validation", n=2)
    real = chapter.sound_folder(tmp_path / "pets")
    assert sizes(real) == {"train": 10, "validation": 4, "test": 2} and real.name == "pets"
    shutil.rmtree(tmp_path / "pets/test/dog")
    write_sounds(tmp_path / "pets/test", classes=("wolf",), n=1)
    with pytest.raises(ValueError, match="only one of them has dog, wolf"): chapter.sound_folder(tmp_path / "pets")


def test_three_sounds_a_class_are_enough(tmp_path):
    write_sounds(tmp_path / "pets", n=3)
    assert sizes(chapter.sound_folder(tmp_path / "pets")) == {p: 2 for p in PARTS}


def test_errors_name_what_and_where(tmp_path):
    folder = tmp_path / "pets"
    with pytest.raises(FileNotFoundError, match="pets.: there is none"): chapter.sound_folder(folder)
    folder.mkdir()
    (folder / "alone.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="pets must hold a folder for each of .*found none and 1 .wav"): chapter.sound_folder(folder)
    write_sounds(folder, ("cat",))
    with pytest.raises(ValueError, match="found only 'cat'"): chapter.sound_folder(folder)
    write_sounds(folder, ("dog",), n=2)
    with pytest.raises(ValueError, match=r"too few files of dog \(2\): .* at least 3"): chapter.sound_folder(folder)
    (folder / "eel").mkdir()
    (folder / "dog/02.wav").write_bytes((folder / "dog/01.flac").read_bytes())
    with pytest.raises(ValueError, match=r"eel is empty, and no sound that ends in .wav, .*; fill it"):
        chapter.sound_folder(folder)
    (folder / "eel/a.m4a").write_bytes(b"")
    with pytest.raises(ValueError, match=r"eel holds 1 .m4a .*`ffmpeg -i FILE.m4a FILE.wav`"): chapter.sound_folder(folder)
    shutil.rmtree(folder / "eel")
    (folder / "cat/00.WAV").write_text("not a sound")
    with pytest.raises(ValueError, match="00.WAV cannot be read as a sound"): chapter.sound_folder(folder)
    soundfile.write(folder / "cat/00.WAV", np.zeros(0), 8_000)
    with pytest.raises(ValueError, match="00.WAV holds no sound: it has 0 samples"): chapter.sound_folder(folder)


WRONG = [("seconds", 0), ("seconds", float("nan")), ("seconds", "1"), ("sample_rate", 100), ("sample_rate", "16k"),
         ("validation", 0), ("test", 1.), ("seed", .5), ("train_per_class", 0), ("train_per_class", "2"), ("name", "fsdd"),
         ("val_as", "dev")]


@pytest.mark.parametrize("option, value", WRONG)
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"{option} must (be|lie|not)"):
        chapter.sound_folder(tmp_path, **{option: value})
