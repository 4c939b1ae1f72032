"""Pictures and clips encoded per second on one core, against transformers' processors:

    python tests/measurements/speed_against_processors.py

Both begin with the same bytes (a JPEG of 640 x 480, 10 s of WAV at 16 kHz) and end with the float32 tensors that the
towers take. transformers: Pillow and CLIPImageProcessor (336 x 336), PyAV and WhisperFeatureExtractor, which makes 30 s
of every clip. Ours, with the same windows, with windows that end with their clip (``model.audio.window: true``), and
with those as samples, of which the device makes the rest (``model.audio.log_mel: device``). CPU times are interleaved;
printed are medians, and the ratio for a whole sample.
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
from avlm.models.vit import normalise
from tests.data.small_files import image_file, picture, tone

VISION = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=24, num_heads=16, image_size=336, patch_size=14
)
AUDIO = {"hidden_size": 1280, "intermediate_size": 5120, "num_layers": 32, "num_heads": 20, "num_mels": 128}
ROUNDS = 40


def main() -> None:
    torch.set_num_threads(1)
    jpeg = image_file(picture(640, 480), "JPEG")
    wav = tone(10.0)
    whole, own = (AudioConfig(**AUDIO, window=window) for window in ("fixed", "true"))
    sent = AudioConfig(**AUDIO, log_mel="device")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    extractor = WhisperFeatureExtractor(feature_size=128)

    def their_picture() -> torch.Tensor:
        with Image.open(io.BytesIO(jpeg)) as opened:
            return image_processor(opened.convert("RGB"), return_tensors="pt").pixel_values[0]

    def their_sound() -> torch.Tensor:
        waveform = decode_as_others_do(wav)
        return extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features[0]

    our_picture = lambda: normalise(image.fit(image.decode(jpeg, 10**8), VISION)[None], VISION)[0]
    our_sound = lambda config: audio.mels(audio.decode(wav, 600.0), config)[0]
    assert (their_picture() - our_picture()).abs().mean() < 0.02
    assert (their_sound() - our_sound(whole)).abs().max() < 1e-3
    works = {
        "transformers, picture": their_picture,
        "ours, picture": our_picture,
        "transformers, sound": their_sound,
        "ours, sound": lambda: our_sound(whole),
        "ours, sound, window of the clip": lambda: our_sound(own),
        "ours, sound, its samples": lambda: our_sound(sent),
    }
    seconds = medians(works)
    for name, second in seconds.items():
        print(f"{name:32} {1000 * second:8.2f} ms")
    theirs = seconds["transformers, picture"] + seconds["transformers, sound"]
    for name in ("ours, sound", "ours, sound, window of the clip", "ours, sound, its samples"):
        ratio = theirs / (seconds["ours, picture"] + seconds[name])
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
