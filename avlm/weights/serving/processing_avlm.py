"""Prompts for AVLM in transformers: the processor of the vision-language model, which also takes audio."""

import math

import numpy as np
from transformers import BaseVideoProcessor, BatchFeature, WhisperFeatureExtractor
from transformers import LlavaProcessor as BaseProcessor
from transformers.audio_utils import make_list_of_audio


class AVLMFeatureExtractor(WhisperFeatureExtractor):
    """Clips of 16 kHz -> log-mel windows side by side (clips, M, frames); which frames make features (clips, frames).
    The last window of a clip is short unless ``windows`` are "fixed". ``edge``: what the encoder sees past a clip; it
    makes a row of two frames, and ``downsample`` means of ``pool`` rows are a feature. All are set by the settings."""

    model_input_names = ["input_features", "input_features_mask"]

    def __call__(self, raw_speech, sampling_rate=None, **kwargs) -> BatchFeature:
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"audio of {sampling_rate} Hz: resample it to {self.sampling_rate} Hz")
        clips = [self._windows(np.asarray(clip)) for clip in make_list_of_audio(raw_speech)]
        longest = max(log_mel.shape[1] for log_mel, _ in clips)
        padded = [np.pad(log_mel, ((0, 0), (0, longest - log_mel.shape[1]))) for log_mel, _ in clips]
        masks = [(np.arange(longest) < covered).astype(np.int64) for _, covered in clips]
        return BatchFeature({"input_features": padded, "input_features_mask": masks}, tensor_type="pt")

    def _windows(self, clip: np.ndarray) -> tuple[np.ndarray, int]:
        if clip.ndim != 1 or not len(clip) or clip.dtype.kind != "f":
            raise ValueError(f"audio of {clip.dtype} {clip.shape}: give floats from -1 to 1, (samples,)")
        hop, whole, parts = self.hop_length, self.window_frames, []
        size = len(clip) if self.log_mel == "clip" else whole * hop
        for part in (clip[start : start + size] for start in range(0, len(clip), size)):
            frames = math.ceil(len(part) / hop / whole) * whole
            more = 4 * (self.edge == "masked")  # the recording might go on
            samples = np.pad(part, (0, (frames + more) * hop - len(part)))
            parts.append(self._torch_extract_fbank_features(samples[None])[0, :, :frames])
        log_mel, covered = np.concatenate(parts, 1), math.ceil(len(clip) / hop)
        if self.windows == "fixed":
            return log_mel, log_mel.shape[1]
        if self.edge != "silence":
            log_mel[:, covered:] = 0
        covered += covered % 2 * (self.edge != "masked")
        return log_mel[:, : covered + 2 * (self.edge == "silence")], covered


class AVLMVideoProcessor(BaseVideoProcessor):
    """For bases without videos: frames at the middles of ``num_frames`` equal parts, or ``fps`` within bounds."""

    def sample_frames(self, metadata, num_frames=None, fps=None, **kwargs):
        total, wanted = metadata.total_num_frames, num_frames
        if num_frames is None:
            wanted = max(1, round(total / metadata.fps * fps))
            num_frames = min(max(wanted, self.min_frames), self.max_frames)
            if num_frames == wanted:
                return np.minimum(np.arange(wanted) * metadata.fps / fps + 1e-6, total - 1).astype(int)
        return ((np.arange(num_frames) + 0.5) * total / num_frames).astype(int)


class AVLMProcessor(BaseProcessor):
    """As its base, and ``audio``: clips of 16 kHz, one for each ``audio_token`` in the texts."""

    tokenizer_class = "AutoTokenizer"  # for a base that knows nothing else
    OWN = ("feature_extractor", "audio_token", "audio_token_id")
    OWN_VIDEO = ("video_processor", "video_token", "video_token_id", "features_per_frame")

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        processor = super().from_pretrained(folder, **kwargs)
        options = cls.get_processor_dict(folder, **kwargs)[0]
        processor.chat_template = options.get("chat_template")
        kinds = {"feature_extractor": AVLMFeatureExtractor, "video_processor": AVLMVideoProcessor}
        for name in filter(options.__contains__, cls.OWN + cls.OWN_VIDEO * ("features_per_frame" in options)):
            setattr(processor, name, kinds[name](**options[name]) if name in kinds else options[name])
        return processor

    def to_dict(self):
        own = {name: getattr(self, name) for name in self.OWN + self.OWN_VIDEO if hasattr(self, name)}
        return super().to_dict() | {name: x.to_dict() if hasattr(x, "to_dict") else x for name, x in own.items()}

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs) -> BatchFeature:
        heard, said, texts = {}, [], [text] if isinstance(text, str) else list(text or ())
        clips = [] if audio is None or not len(audio) else make_list_of_audio(audio)
        for kind, given in {"audio": clips, "image": images, "video": videos}.items():
            marked = sum(each.count(getattr(self, f"{kind}_token", None) or "\0") for each in texts)
            if marked != len(given) if kind == "audio" else marked and given is None:
                raise ValueError(f"the texts have {marked} {kind} tokens for {len(given or ())}: write one for each")
        if clips:
            heard = self.feature_extractor(clips, {**kwargs.get("audio_kwargs", {}), **kwargs}.get("sampling_rate"))
            replacements = [self.replace_audio_token(heard, i) for i in range(len(heard["input_features"]))]
            text, said = self.get_text_with_replacements(texts, audio_replacements=replacements)
        inputs = super().__call__(images=images, text=text, videos=videos, **kwargs)
        if said and kwargs.get("return_text_replacement_offsets"):
            seen = inputs.get("text_replacement_offsets", [[]] * len(said))  # some bases have none for text alone
            inputs["text_replacement_offsets"] = [[*of_audio, *others] for of_audio, others in zip(said, seen)]
        return BatchFeature({**inputs, **heard})

    def replace_audio_token(self, audio_inputs, audio_idx, **kwargs) -> str:
        windows, made_by = audio_inputs["input_features_mask"][audio_idx], self.feature_extractor
        rows = [(int(window.sum()) + 1) // 2 // made_by.pool for window in windows.split(made_by.window_frames)]
        return self.audio_token * sum(math.ceil(of_window / made_by.downsample) for of_window in rows)

    def replace_video_token(self, video_inputs, video_idx, **kwargs) -> str:
        if not hasattr(self, "features_per_frame"):
            return super().replace_video_token(video_inputs, video_idx, **kwargs)
        return self.video_token * self.features_per_frame * len(video_inputs["pixel_values_videos"][video_idx])
