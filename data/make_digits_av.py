"""Make the spoken digits of the data set `digits_av` with the speech synthesiser eSpeak NG.

    python data/make_digits_av.py [--out data/digits_av_sounds.npz] [--check]

A speaker is a voice variant of eSpeak NG (`espeak-ng --voices=variant`). Each utterance is one English digit spoken
by one speaker with an accent, a rate and a pitch drawn for it, brought to 8 kHz mono, trimmed, given a little
background noise and normalised. The speakers of train, validation and test are disjoint, and within a part the
utterances of one digit are all by different speakers.

Needs the program `espeak-ng`, numpy and scipy; `--check` also needs torchaudio and scikit-learn. Every draw is keyed
by what it is for, so one version of eSpeak NG and of the libraries gives the same file byte for byte.
"""
import argparse
import hashlib
import re
import subprocess
import tempfile
from math import gcd
from pathlib import Path

import numpy as np
from scipy.io import wavfile
from scipy.signal import lfilter, resample_poly, stft

DIGITS = "zero one two three four five six seven eight nine".split()
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"]
PER_DIGIT = {"train": 50, "validation": 12, "test": 18}  # utterances of each digit
SAMPLE_RATE = 8000           # Hz
RATES = (140, 200)           # words per minute, eSpeak's -s
PITCHES = (25, 75)           # of 0..99, eSpeak's -p
DURATIONS = (0.14, 0.95)     # s, what an utterance may last, the 10 ms kept either side included
LONGEST = 0.9                # s, what is kept of it
QUIETEST = 0.01              # root mean square of a trimmed utterance, full scale 1
NEAREST = 2.5                # dB between the spectra of two speakers; closer ones count as one speaker
SNR = (20, 35)               # dB, speech to background noise
PEAK = 10 ** (-3 / 20)       # -3 dBFS
UNCLEAR = ["anika", "anikaRobot"]  # cross-validation over training speakers read 1 digit of 7 by anika
NEUTRAL = dict(accent="en-us", rate=170, pitch=50)  # how speakers are compared


def keyed(*key):
    "A generator of random numbers that depends on `key` alone."
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def espeak(*args):
    "What `espeak-ng` prints when called with `args`."
    return subprocess.run(["espeak-ng", *args], capture_output=True, text=True, check=True).stdout


def espeak_version():
    "Such as 'eSpeak NG text-to-speech: 1.51', without the place of its data."
    return espeak("--version").split("Data at")[0].strip()


def list_variants():
    "Gender ('M', 'F' or '-') of every installed voice variant, by file name."
    rows = re.findall(r"/([MF-]) .*!v/(.+?)(?: {2,}.*)?$", espeak("--voices=variant"), flags=re.MULTILINE)
    return {name.strip(): gender for gender, name in sorted(rows, key=lambda row: row[1])}


def list_accents():
    "Those of `ACCENTS` that are installed; an unknown one would be replaced by another without a word."
    installed = espeak("--voices=en").split()
    return [accent for accent in ACCENTS if accent in installed]


def speak(digit, voice, accent, rate, pitch):
    "Speech at `SAMPLE_RATE`, full scale 1, with the silence around it."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        espeak("-v", f"{accent}+{voice}", "-s", str(rate), "-p", str(pitch), "-w", str(path), DIGITS[digit])
        source_rate, speech = wavfile.read(path)
    divisor = gcd(SAMPLE_RATE, source_rate)
    return resample_poly(speech / 32768, SAMPLE_RATE // divisor, source_rate // divisor)


def trim(speech, frame=80, floor=0.02):
    "`speech` from the first to the last 10 ms frame louder than `floor` of the loudest, and one frame either side."
    frames = speech[:len(speech) // frame * frame].reshape(-1, frame)
    level = np.sqrt((frames ** 2).mean(1))
    if not level.any(): return speech[:0]
    loud = np.flatnonzero(level > floor * level.max())
    return speech[max(loud[0] - 1, 0) * frame:(loud[-1] + 2) * frame]


def is_usable(speech):
    "Whether a trimmed utterance has the length of a digit and can be heard."
    shortest, longest = DURATIONS
    return shortest <= len(speech) / SAMPLE_RATE <= longest and np.sqrt((speech ** 2).mean()) >= QUIETEST


def spectrum(speech):
    "Log power in dB of the first, middle and last third of an utterance in 32 bands of 125 Hz."
    _, _, transform = stft(speech, SAMPLE_RATE, nperseg=256, noverlap=128)
    power = (abs(transform[1:]) ** 2).reshape(32, 4, -1).sum(1)
    thirds = np.stack([third.mean(1) for third in np.array_split(power, 3, axis=1)])
    return 10 * np.log10(thirds / thirds.max() + 1e-4)


def choose_speakers(variants):
    "The variants that are clear, speak all ten digits usably and do not sound (nearly) like an earlier one."
    spectra = {}
    for voice in variants:
        if voice in UNCLEAR:
            print(f"left out {voice}: unclear")
            continue
        utterances = [trim(speak(digit, voice, **NEUTRAL)) for digit in range(10)]
        if not all(map(is_usable, utterances)):
            print(f"left out {voice}: an utterance too short, too long or too quiet")
            continue
        own = np.stack([spectrum(utterance) for utterance in utterances])
        twin = next((other for other in spectra if np.sqrt(((own - spectra[other]) ** 2).mean()) < NEAREST), None)
        if twin is None: spectra[voice] = own
        else: print(f"left out {voice}: sounds like {twin}")
    return list(spectra)


def split_speakers(speakers, genders):
    """Speakers of each part.

    Variants that share a name but for its number (robosoft, robosoft2) are versions of one speaker, and go to train,
    as do the two whispers, so that no part is asked about whispers without any in train.
    The others are laid out by gender, shuffled within it, and 12 validation and 18 test speakers taken at even steps.
    """
    family = {voice: voice.rstrip("0123456789") if len(voice) > 2 else voice for voice in speakers}
    names = list(family.values())
    single = [voice for voice in speakers if names.count(family[voice]) == 1 and not voice.startswith("whisper")]
    shuffled = keyed("digits_av", "speakers").permutation(single).tolist()
    by_gender = sorted(shuffled, key=lambda voice: genders[voice])
    held_out = PER_DIGIT["validation"] + PER_DIGIT["test"]
    taken = [by_gender[i] for i in np.linspace(0, len(by_gender) - 1, held_out).round().astype(int)]
    validation = taken[1::5] + taken[3::5]  # two of every five
    test = [voice for voice in taken if voice not in validation]
    return {"train": [voice for voice in speakers if voice not in taken], "validation": validation, "test": test}


def background(generator, size):
    "White or pink noise of unit power; pink by Kellet's filter of three poles."
    white = generator.standard_normal(size)
    if generator.random() < 0.5: return white
    pink = lfilter([0.049922, -0.095993, 0.050613, -0.004409], [1, -2.494956, 2.017266, -0.522190], white)
    return pink / np.sqrt((pink ** 2).mean())


def finish(speech, generator):
    "Cut to `LONGEST`, add background noise, normalise the peak, and round to int16."
    speech = speech[:int(LONGEST * SAMPLE_RATE)]
    snr = generator.uniform(*SNR)
    level = np.sqrt((speech ** 2).mean()) * 10 ** (-snr / 20)
    noisy = speech + level * background(generator, len(speech))
    return np.round(noisy / abs(noisy).max() * PEAK * 32767).astype(np.int16)


def make_utterance(digit, voice, accents, attempts=20):
    "One utterance and how it was spoken; accent, rate and pitch are drawn again when it comes out unusable."
    for attempt in range(attempts):
        generator = keyed("digits_av", "utterance", DIGITS[digit], voice, attempt)
        manner = dict(accent=str(generator.choice(accents)), rate=int(generator.integers(*RATES, endpoint=True)),
                      pitch=int(generator.integers(*PITCHES, endpoint=True)))
        speech = trim(speak(digit, voice, **manner))
        if is_usable(speech): return finish(speech, generator), manner
    raise ValueError(f"voice {voice!r} spoke no usable {DIGITS[digit]!r} in {attempts} attempts")


def make_sounds():
    "The arrays of the file, ordered by part, digit and speaker."
    genders, accents = list_variants(), list_accents()
    speakers = choose_speakers(genders)
    parts = split_speakers(speakers, genders)
    audio, rows = [], []
    for part, size in PER_DIGIT.items():
        if len(parts[part]) < size: raise ValueError(f"{part} needs {size} speakers, there are {len(parts[part])}")
        for digit in range(10):
            for voice in sorted(keyed("digits_av", part, digit).permutation(parts[part])[:size].tolist()):
                sound, manner = make_utterance(digit, voice, accents)
                audio.append(sound)
                rows.append((digit, part, voice, *manner.values()))
    labels, part, voice, accent, rate, pitch = zip(*rows)
    return dict(audio=np.concatenate(audio), offsets=np.cumsum([0] + [len(sound) for sound in audio], dtype=np.int64),
                labels=np.array(labels, np.int64), part=np.array(part, "<U10"), voice=np.array(voice, "<U32"),
                accent=np.array(accent, "<U32"), rate=np.array(rate, np.int64), pitch=np.array(pitch, np.int64),
                sample_rate=np.array(SAMPLE_RATE, np.int64), made_with=np.array(espeak_version()))


def report(path):
    "Print what the file at `path` holds, and its checksums."
    sounds = np.load(path, allow_pickle=False)
    seconds = np.diff(sounds["offsets"]) / SAMPLE_RATE
    for part, size in PER_DIGIT.items():
        chosen = sounds["part"] == part
        print(f"{part}: {chosen.sum()} utterances, {size} a digit, {len(set(sounds['voice'][chosen]))} speakers, "
              f"{seconds[chosen].min():.2f} to {seconds[chosen].max():.2f} s, mean {seconds[chosen].mean():.2f} s")
    print(f"{path}: {path.stat().st_size} bytes")
    print("sha256 of the file: ", hashlib.sha256(path.read_bytes()).hexdigest())
    print("sha256 of the audio:", hashlib.sha256(sounds["audio"].astype("<i2").tobytes()).hexdigest())


def check(path):
    "Print how well logistic regression on log-mel spectrograms tells the digits of unknown speakers (validation)."
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from torchaudio.transforms import MelSpectrogram

    sounds = np.load(path, allow_pickle=False)
    audio, offsets, labels, part = (sounds[name] for name in ("audio", "offsets", "labels", "part"))
    padded = np.zeros((len(labels), SAMPLE_RATE), np.float32)
    for row, start, stop in zip(padded, offsets, offsets[1:]): row[:stop - start] = audio[start:stop] / 32768
    mel = MelSpectrogram(SAMPLE_RATE, n_fft=512, hop_length=256, n_mels=32)
    features = torch.log(mel(torch.from_numpy(padded)) + 1e-6).flatten(1).numpy()
    train, validation = part == "train", part == "validation"
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    classifier.fit(features[train], labels[train])
    right = classifier.predict(features[validation]) == labels[validation]
    print(f"validation accuracy {right.mean():.1%}")
    for digit, word in enumerate(DIGITS): print(f"  {word:5s} {right[labels[validation] == digit].mean():.0%}")
    for voice in np.unique(sounds["voice"][validation]):
        print(f"  {voice:12s} {right[sounds['voice'][validation] == voice].mean():.0%}")


def main():
    parser = argparse.ArgumentParser(description="Make the spoken digits of the data set digits_av.")
    default = Path(__file__).parent / "digits_av_sounds.npz"
    parser.add_argument("--out", type=Path, default=default, help="file to write")
    parser.add_argument("--check", action="store_true", help="fit a simple classifier, report its validation accuracy")
    args = parser.parse_args()
    print(espeak_version())
    np.savez_compressed(args.out, **make_sounds())
    report(args.out)
    if args.check: check(args.out)


if __name__ == "__main__":
    main()
