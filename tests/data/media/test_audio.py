import dataclasses
import io
import struct
import wave

import av
import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from avlm.data.media import audio
from tests.data.small_files import AUDIO, tone, video_file

RATE = audio.SAMPLE_RATE
SECONDS = [0.1, 0.32, 1.0, 2.505, 9.999, 29.99, 30.0, 30.02, 65.0]


def whisper(clip: torch.Tensor, num_mels: int) -> torch.Tensor:
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    return torch.tensor(extractor(clip.numpy(), sampling_rate=RATE, return_tensors="np")["input_features"][0])


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("samples", [1, 399, 16_000, 16_001, 479_900, 480_000])
def test_a_fixed_window_equals_whispers_extractor(num_mels, samples):
    clip = torch.randn(samples) * 0.1
    [mel] = audio.mels(clip, dataclasses.replace(AUDIO, num_mels=num_mels, window="fixed"))
    assert mel.shape == (num_mels, 3000)
    torch.testing.assert_close(mel, whisper(clip, num_mels), atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 399, 16_000, 16_001, 40_079, 479_900, 480_000])
def test_a_true_window_is_the_start_of_the_extractors_and_ends_in_exact_zeros(samples):
    clip = torch.randn(samples) * 0.1
    [mel] = audio.mels(clip, AUDIO)
    covered = -(-samples // 160)
    assert mel.shape[1] == covered + covered % 2
    torch.testing.assert_close(mel[:, :covered], whisper(clip, 80)[:, :covered], atol=1e-4, rtol=0)
    assert (mel[:, covered:] == 0).all()


@pytest.mark.parametrize("window", ["true", "fixed"])
def test_nothing_of_a_long_clip_is_cut(window):
    clip = torch.randn(65 * RATE) * torch.linspace(0.01, 0.2, 65 * RATE)
    config = dataclasses.replace(AUDIO, window=window)
    windows = audio.mels(clip, config)
    expected = [3000, 3000, 500] if window == "true" else [3000] * 3
    assert [audio.num_frames(mel, config) for mel in windows] == expected
    for mel, part in zip(windows, clip.split(30 * RATE)):
        torch.testing.assert_close(mel, audio.mels(part, config)[0])


@pytest.mark.parametrize("seconds", SECONDS)
def test_rows_cover_the_clip_and_no_more(seconds):
    clip = torch.zeros(round(seconds * RATE))
    rows = sum(audio.num_frames(mel, AUDIO) // 2 for mel in audio.mels(clip, AUDIO))
    assert 0 <= rows * 320 - len(clip) < 320


def test_smaller_windows_and_other_mel_counts_work():
    small = dataclasses.replace(AUDIO, max_positions=250, num_mels=40)
    windows = audio.mels(torch.randn(6 * RATE), small)
    assert [mel.shape for mel in windows] == [(40, 500), (40, 100)]


def test_silence_is_a_clip():
    [mel] = audio.mels(torch.zeros(RATE), AUDIO)
    assert torch.isfinite(mel).all() and mel.shape == (80, 100)


def test_channels_are_averaged():
    mono = audio.decode(tone(0.5, channels=1), 10)
    many = audio.decode(tone(0.5, channels=4), 10)
    mean_gain = np.mean([1 / (c + 1) for c in range(4)])
    torch.testing.assert_close(many, mono * mean_gain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_every_rate_becomes_16_khz_with_its_pitch_and_length(rate):
    clip = audio.decode(tone(1.0, rate=rate, channels=2), 10)
    assert abs(len(clip) - RATE) <= 1
    spectrum = torch.fft.rfft(clip[:RATE]).abs()
    assert abs(spectrum.argmax().item() - 440) <= 1


@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_sample_format_has_the_same_loudness(width):
    wave_form = np.sin(np.arange(8000) / 10) * 0.5
    integers = (wave_form * 2 ** (8 * width - 1)).astype({1: np.int16, 2: "<i2", 4: "<i4"}[width])
    raw = (integers + 128).astype(np.uint8) if width == 1 else integers
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(RATE)
        file.writeframes(raw.tobytes())
    expected = torch.tensor(wave_form, dtype=torch.float32)
    torch.testing.assert_close(
        audio.decode(buffer.getvalue(), 10), expected, atol=max(1e-7, 2.0 ** -(8 * width - 2)), rtol=0
    )


def wav(samples: np.ndarray, rate: int = RATE, chunks: bytes = b"") -> bytes:
    """A WAV file of (samples,) or (samples, channels) of a type that the module wave does not write."""
    tag, channels = (3 if samples.dtype.kind == "f" else 1), samples[0].size
    width, body = samples.itemsize, samples.tobytes()
    header = struct.pack("<IHHIIHH", 16, tag, channels, rate, rate * width * channels, width * channels, 8 * width)
    size = struct.pack("<I", 36 + len(body) + len(chunks))
    return b"RIFF" + size + b"WAVEfmt " + header + chunks + b"data" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", ["f4", "f8", "i8"])
def test_wide_samples_are_read(kind):
    wave_form = np.sin(np.arange(8000) / 10) * 0.5
    samples = (wave_form * (2.0**63 if kind == "i8" else 1)).astype(kind)
    torch.testing.assert_close(audio.decode(wav(samples), 10), torch.tensor(wave_form, dtype=torch.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 3e38, 1e30, 32_768.0])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_values_that_are_no_sound_are_refused(value, rate):
    samples = np.sin(np.arange(8000) / 10)
    samples[4000] = value
    with pytest.raises(ValueError, match=r"not finite|full scale is 1"):
        audio.decode(wav(np.stack([samples, samples / 2], 1), rate), 10)


def test_log_mels_of_the_loudest_clip_that_is_read_are_finite():
    loud = audio.decode(wav(np.float32(audio.MAX_AMPLITUDE * np.sign(np.sin(np.arange(8000) / 10)))), 10)
    for config in (AUDIO, dataclasses.replace(AUDIO, window="fixed")):
        assert audio.mels(loud, config)[0].isfinite().all()


def encode(codec: str, container: str, layout: str, sample_format: str, rate: int) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        t = np.arange(rate) / rate
        samples = np.tile((0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), (stream.layout.nb_channels, 1))
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in av.AudioResampler(sample_format, layout, rate).resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "form",
    [
        ("flac", "flac", "mono", "s16", 16_000),
        ("aac", "mp4", "stereo", "fltp", 44_100),
        ("ac3", "matroska", "5.1", "fltp", 48_000),
    ],
    ids=lambda form: form[1],
)
def test_containers_and_codecs_are_decoded(form):
    clip = audio.decode(encode(*form), 10)
    assert abs(len(clip) - RATE) < 0.2 * RATE
    assert abs(torch.fft.rfft(clip[: len(clip)]).abs().argmax().item() * RATE / len(clip) - 440) < 3


def pitch(clip: torch.Tensor) -> float:
    return torch.fft.rfft(clip * torch.hann_window(len(clip))).abs().argmax().item() * RATE / len(clip)


@pytest.mark.parametrize(
    "forms",
    [
        [("ac3", "ac3", "mono", "fltp", 48_000), ("ac3", "ac3", "mono", "fltp", 32_000)],
        [("aac", "adts", "mono", "fltp", 16_000), ("aac", "adts", "stereo", "fltp", 44_100)],
        [("mp2", "mp2", "stereo", "s16", 22_050), ("mp2", "mp2", "mono", "s16", 22_050)],
        [("mp2", "mp2", "mono", "s16", 16_000), ("mp2", "mp2", "mono", "s16", 48_000)],
    ],
)
def test_a_stream_that_changes_its_form_keeps_its_pitch_and_length(forms):
    clip = audio.decode(b"".join(encode(*form) for form in forms), 10)
    assert len(clip) == pytest.approx(2 * RATE, rel=0.1)
    assert pitch(clip[2000:14_000]) == pytest.approx(440, abs=4)
    assert pitch(clip[-14_000:-2000]) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 11_025, 8_000])
def test_a_clip_resampled_in_blocks_is_the_clip_resampled_whole(rate, monkeypatch):
    data = tone(2.0 + 1 / 7, rate=rate)
    whole = audio.decode(data, 10)
    expected = audio.Resample(rate, RATE)(torch.from_numpy(np.frombuffer(data[44:], "<i2") / np.float32(32768)))
    assert torch.equal(whole, expected)
    monkeypatch.setattr(audio, "BLOCK", 5000)
    torch.testing.assert_close(audio.decode(data, 10), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", ["before", "inside", "after"])
def test_junk_between_packets_is_left_out_and_said_once(place, capfd):
    data = encode("libmp3lame", "mp3", "mono", "fltp", 48_000)
    frame = data.index(b"\xff\xfb", len(data) // 2)
    at = {"before": 0, "inside": frame, "after": len(data)}[place]
    dirty = data[:at] + bytes(3000) + data[at:]
    for _ in range(2):
        assert len(audio.decode(dirty, 10, f"{place}.mp3")) == pytest.approx(RATE, rel=0.06)
    said = capfd.readouterr().err.splitlines()
    assert place == "before" or len(said) == 1, "what stands before the first frame is no packet"
    assert all(f"{place}.mp3: 1 of 4" in line and "cannot be decoded, left out" in line for line in said)


def test_a_file_that_cannot_be_read_to_its_end_says_from_where_on(capfd):
    block = encode("wavpack", "wv", "mono", "s16p", RATE)
    assert len(audio.decode(block + b"junk" * 99, 10, "torn.wv")) == RATE
    assert capfd.readouterr().err.startswith("torn.wv: cannot be read past 1.0 s: Invalid data found")
    mono, stereo = (encode("libopus", "ogg", layout, "flt", 48_000) for layout in ("mono", "stereo"))
    assert len(audio.decode(mono + mono, 10)) == pytest.approx(2 * RATE, rel=0.05), "a chain of one form"
    with pytest.raises(ValueError, match=r"file changes its form at 1\.0 s .* convert or split it"):
        audio.decode(mono + stereo, 10)


def test_names_in_a_file_need_not_be_utf_8():
    listed = b"INFOINAM\x04\0\0\0\xff\xfe\xe9\0"
    named = b"LIST" + struct.pack("<I", len(listed)) + listed
    assert len(audio.decode(wav(np.zeros(1600, np.int16), chunks=named), 10)) == 1600


def test_the_first_track_that_holds_anything_is_read():
    buffer = io.BytesIO()
    with av.open(buffer, "w", "matroska") as file:
        _, track = (file.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2))
        frame = av.AudioFrame.from_ndarray(np.full((1, 1600), 8192, np.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        file.mux(track.encode(frame))
        file.mux(track.encode(None))
    assert torch.equal(audio.decode(buffer.getvalue(), 10), torch.full((1600,), 0.25))


def test_eight_channels_work():
    assert len(audio.decode(tone(0.2, channels=8, rate=8000), 10)) == 3200


def test_what_holds_no_sound_is_refused():
    with pytest.raises(ValueError, match="audio is empty"):
        audio.decode(tone(0), 10)
    with pytest.raises(ValueError, match="no audio stream"):
        audio.decode(video_file(0.5), 10)
    with pytest.raises(ValueError, match="audio is empty"):
        audio.decode(video_file(0.5, sound=0.0), 10)
    for data in (b"", b"RIFF nonsense that no decoder takes", b"<html><body>404</body></html>"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            audio.decode(data, 10)
    unknown = wav(np.zeros(100, np.int16)).replace(b"WAVEfmt \x10\0\0\0\x01", b"WAVEfmt \x10\0\0\0\xad")
    with pytest.raises(ValueError, match="audio stream has a codec that FFmpeg does not know"):
        audio.decode(unknown, 10)


def test_a_clip_above_the_bound_is_refused_and_not_cut():
    with pytest.raises(ValueError, match=r"longer than data\.max_audio_seconds=1"):
        audio.decode(tone(1.5), 1)


def test_an_odd_rate_is_refused_before_it_costs_gigabytes(monkeypatch):
    with pytest.raises(ValueError, match="sample rate of 1000000000 Hz, not of 1 to 768000"):
        audio.decode(wav(np.zeros(10_000, np.uint8), 10**9), 10)
    assert len(audio.decode(wav(np.zeros((7680, 2), np.int16), 384_000), 10)) == 320
    with monkeypatch.context() as bounds:
        bounds.setattr(audio, "MAX_SAMPLES", 15_000)
        with pytest.raises(ValueError, match="samples in all of its channels"):
            audio.decode(wav(np.zeros((7680, 2), np.int16)), 10)
    with monkeypatch.context() as bounds:
        bounds.setattr(audio, "MAX_RESAMPLE_WORK", 441 * 160 + 7680 * 159)
        with pytest.raises(ValueError, match="44100 Hz takes too long to resample"):
            audio.decode(wav(np.zeros(7680, np.int16), 44_100), 10)
    with pytest.raises(ValueError, match="44101 Hz has no small ratio"):
        audio.decode(tone(0.1, rate=44_101), 10)


def test_a_playlist_opens_no_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.wav").write_bytes(tone(0.2))
    with pytest.raises(ValueError, match="cannot be decoded"):
        audio.decode(b"ffconcat version 1.0\nfile secret.wav\n", max_seconds=10)
