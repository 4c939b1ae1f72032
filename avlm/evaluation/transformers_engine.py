"""A model folder as transformers runs it: its chat template, its processor and its ``generate``, in float32.

Files are opened as users of transformers open them: images by Pillow, videos by PyAV. Of audio it takes samples at
16 kHz, for which there is no way of its own; a video's audio is audio that follows the video.
"""

import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import av
import numpy
import torch
from PIL import Image, ImageOps

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.media import audio
from avlm.data.media.video import USUAL_RATE, has_audio
from avlm.data.sample import Sample
from avlm.data.text.pieces import TAG, Messages
from avlm.weights.folder import media_in_texts, stop_ids
from avlm.weights.served import check_code

PROMPTS = 16  # answered together


class Engine:
    tolerance = 1e-3  # nats

    def __init__(self, folder: Path, data: DataConfig, model: ModelConfig, device: torch.device | None = None) -> None:
        try:
            import transformers
        except ImportError:
            raise ValueError("--engine transformers needs it: pip install transformers") from None
        self.data = data
        self.media = media_in_texts(folder, data.markers)
        self.stop_ids = stop_ids(folder)
        trust = check_code(folder)
        network = transformers.AutoModelForMultimodalLM if model.modalities else transformers.AutoModelForCausalLM
        prompts = transformers.AutoProcessor if model.modalities else transformers.AutoTokenizer
        self.network = (
            network.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust).eval().to(device or "cpu")
        )
        self.processor = prompts.from_pretrained(folder, trust_remote_code=trust)
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)  # any: it is masked

    @torch.inference_mode()
    def answer(self, samples: list[Sample], max_new_tokens: int) -> list[list[int]]:
        # Some processors want images and videos in every prompt of a batch, or in none.
        alike = defaultdict(list)
        for i, sample in enumerate(samples):
            alike[bool(sample.images), bool(sample.videos)].append(i)
        found: dict[int, list[int]] = {}
        for places in alike.values():
            for first in range(0, len(places), PROMPTS):
                chosen = places[first : first + PROMPTS]
                found |= zip(chosen, self._answer([samples[i] for i in chosen], max_new_tokens))
        return [found[i] for i in range(len(samples))]

    def _answer(self, samples: list[Sample], max_new_tokens: int) -> list[list[int]]:
        prompts = self.prompts(samples)
        length = prompts["input_ids"].shape[1]
        stops = self.stop_ids or None
        options: dict[str, Any] = {"eos_token_id": stops, "pad_token_id": self.tokenizer.pad_token_id}
        options |= {"do_sample": False, "repetition_penalty": 1.0}  # which some published folders have otherwise
        ids = self.network.generate(**prompts, max_new_tokens=max_new_tokens, **options)
        return [_until(answer, self.stop_ids) for answer in ids[:, length:].tolist()]

    def prompts(self, samples: list[Sample]) -> dict[str, Any]:
        """The inputs of the network, for the conversations up to their last turns."""
        texts, images, videos, metadata, clips = [], [], [], [], []
        for sample in samples:
            messages, heard = self._with_audio_of_videos(sample)
            has_template = getattr(self.processor, "chat_template", None) is not None
            chat = self.processor if has_template else self.tokenizer
            text = chat.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            for kind, token in self.media.items():
                text = text if f"<{kind}>" in token else text.replace(f"<{kind}>", token)
            texts.append(text)
            shown = [Image.open(io.BytesIO(file)) for file in sample.images]
            images.append([ImageOps.exif_transpose(image).convert("RGB") for image in shown])  # as its load_image does
            filmed = [self._frames(file) for file in sample.videos]
            videos.append([frames for frames, _ in filmed])
            metadata.append([of_frames for _, of_frames in filmed])
            clips += [audio.decode(file, self.data.max_audio_seconds).numpy() for file in heard]
        media: dict[str, Any] = {}
        if any(images):
            media["images"] = images
        if any(videos):
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": True}
        if clips:
            media |= {"audio": clips, "sampling_rate": audio.SAMPLE_RATE}
        made = self.processor(text=texts, **media, add_special_tokens=False, padding=True, return_tensors="pt")
        return made.to(self.network.device)

    def _with_audio_of_videos(self, sample: Sample) -> tuple[Messages, list[bytes]]:
        """The turns up to the last, and the files of all audio: that of a video follows it."""
        files = {"audio": iter(sample.audios), "video": iter(sample.videos)}
        heard = []

        def heard_too(tag: re.Match) -> str:
            if tag[1] not in files:
                return tag[0]
            file = next(files[tag[1]])
            is_silent = tag[1] == "video" and not (self.data.video.audio and has_audio(file))
            if not is_silent:
                heard.append(file)
            return tag[0] if is_silent or tag[1] == "audio" else f"{tag[0]}<audio>"

        turns = [{**turn, "content": TAG.sub(heard_too, turn["content"])} for turn in sample.messages[:-1]]
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns], heard

    def _frames(self, file: bytes) -> tuple[Any, Any]:
        """All of a video, uint8 (frames, height, width, 3), among which the processor chooses, and how fast it is."""
        from transformers.video_utils import VideoMetadata

        with av.open(io.BytesIO(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = float(container.streams.video[0].average_rate or USUAL_RATE)
        return numpy.stack(frames), VideoMetadata(len(frames), fps=rate, duration=len(frames) / rate)


def _until(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
