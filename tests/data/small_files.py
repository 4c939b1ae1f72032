"""Small files, configs and a tokenizer made on the spot, for the tests of avlm.data."""

import io
import json
import wave
from pathlib import Path

import av
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig

VISION = VisionConfig(hidden_size=8, intermediate_size=8, num_layers=2, num_heads=1, image_size=28, patch_size=7)
ANY_GRID = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    patch_size=14,
    frames_per_patch=2,
    feature_layer=-1,
    class_token=False,
    pre_norm=False,
    axial_rope=True,
    resize="area",
)
AUDIO = AudioConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1)
CONTROL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL += ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = [
    "hello world, what is this picture of?",
    "user assistant system USER: ASSISTANT: answer",
    "one two three four",
]
VOCABULARY = 400


def model(vision=VISION, audio=AUDIO, downsample: int = 1, stack: int = 1) -> ModelConfig:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    return ModelConfig(
        decoder=DecoderConfig(vocab_size=VOCABULARY, **size),
        vision=vision,
        audio=audio,
        vision_projector=ProjectorConfig(downsample=downsample) if vision else None,
        audio_projector=ProjectorConfig(downsample=stack) if audio else None,
    )


def data(tokenizer: Path, **changes) -> DataConfig:
    options = {"train": "x", "tokenizer": str(tokenizer), "template": "chatml", "seq_length": 256, "packing_buffer": 6}
    return DataConfig(**{**options, "shuffle_buffer": 8, "num_workers": 0, **changes})


def write_tokenizer(folder: Path, control: list[str] = CONTROL, corpus: list[str] = CORPUS, **config) -> Path:
    """Byte-level BPE like that of Llama 3 and GPT-2."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise, as photographs are."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.BICUBIC)


def image_file(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tone(seconds: float, rate: int = 16_000, channels: int = 1, frequency: float = 440.0) -> bytes:
    """A 16-bit WAV file; channel c is 1 / (c + 1) as loud as the first."""
    t = np.arange(round(seconds * rate)) / rate
    samples = np.stack([8000 / (c + 1) * np.sin(2 * np.pi * frequency * t) for c in range(channels)], axis=1)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def video_file(
    seconds: float,
    rate: int = 8,
    sound: bool | float = False,
    container: str = "matroska",
    codec: str = "mpeg4",
    sound_from: float = 0.0,
) -> bytes:
    """Frame n is grey of brightness 2 n; its sound is as long, or of the given seconds (0.0: an empty track), and
    begins at ``sound_from``."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = 8
        track = file.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound is not False else None
        for n in range(round(seconds * rate)):
            pixels = np.full((48, 64, 3), min(255, 2 * n), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
        if track and sound:
            num_samples = round((seconds if sound is True else sound) * 16_000)
            noise = np.random.default_rng(0).normal(0, 1000, (1, num_samples)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
            frame.sample_rate = 16_000
            frame.pts = round(sound_from * 16_000)
            file.mux(track.encode(frame))
            file.mux(track.encode(None))
    return buffer.getvalue()
