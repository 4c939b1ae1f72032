"""Images and audio encoded per second on one core, against transformers' processors:

    python tests/measurements/speed_against_processors.py

Both begin with the same bytes (a JPEG of 640 x 480, 10 s of WAV at 16 kHz) and end with the float32 tensors that the
towers take. transformers: Pillow and CLIPImageProcessor (336 x 336), PyAV and WhisperFeatureExtractor, which pads every
recording to 30 s. Ours: once with the same windows, once with windows that end with their recording
(``model.audio.window: true``). CPU times are interleaved; printed are medians, and the ratio for a whole sample.
"""

import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import numpy
import torch
from PIL import Image
from transformers import CLIPImageProcessor, WhisperFeatureExtractor

from avlm.config.model import AudioConfig, VisionConfig
from avlm.data.media import audio, image
from avlm.data.media.patches import cut_into_patches
from avlm.models.vit import normalise
from tests.data.small_files import image_file, photo, tone

VISION = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size=336, patch_size=14
)
AUDIO = {"hidden_size": 1280, "intermediate_size": 5120, "num_layers": 32, "num_heads": 20, "num_mels": 128}
ROUNDS = 40


def main() -> None:
    torch.set_num_threads(1)
    jpeg = image_file(photo(640, 480), "JPEG")
    wav = tone(10.0)
    whole, own = (AudioConfig(**AUDIO, window=window) for window in ("fixed", "true"))
    image_processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    extractor = WhisperFeatureExtractor(feature_size=128)

    def their_image() -> torch.Tensor:
        with Image.open(io.BytesIO(jpeg)) as opened:
            return image_processor(opened.convert("RGB"), return_tensors="pt").pixel_values[0]

    def their_audio() -> torch.Tensor:
        waveform = decode_as_others_do(wav)
        return extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features[0]

    def our_image() -> torch.Tensor:
        pixels = image.fit(image.decode(jpeg, 10**8), VISION)
        return normalise(cut_into_patches(pixels[None], VISION), VISION)

    def our_audio(config: AudioConfig) -> torch.Tensor:
        return audio.mels(audio.decode(wav, 600.0), config)[0]

    assert (cut_into_patches(their_image()[None], VISION) - our_image()).abs().mean() < 0.02
    assert (their_audio() - our_audio(whole)).abs().max() < 1e-3
    works = {
        "transformers, image": their_image,
        "ours, image": our_image,
        "transformers, audio": their_audio,
        "ours, audio": lambda: our_audio(whole),
        "ours, audio, true length": lambda: our_audio(own),
    }
    seconds = medians(works)
    for name, second in seconds.items():
        print(f"{name:32} {1000 * second:8.2f} ms")
    theirs = seconds["transformers, image"] + seconds["transformers, audio"]
    for name in ("ours, audio", "ours, audio, true length"):
        ratio = theirs / (seconds["ours, image"] + seconds[name])
        print(f"samples per second and core, {name}: {ratio:.2f} times transformers'")


def decode_as_others_do(data: bytes) -> numpy.ndarray:
    """float32 (samples,) of a mono file."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return numpy.concatenate(frames).astype(numpy.float32) / 32768


def medians(works: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            start = time.process_time()
            work()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
