"""A duplex model row by row: it hears a window, and says a token in each of its rows of 80 ms.

F features of a window   D decoder width
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from avlm.data.features import of_windows
from avlm.data.media import audio
from avlm.data.sample import size_of
from avlm.evaluation.decoding import Slots, caches_for
from avlm.models.avlm import AVLM
from avlm.models.batch import media_of, text_positions
from avlm.models.log_mel import HOP
from kernels.segments import Segments


def windows_of(waveform: Tensor, network: AVLM) -> Iterable[Tensor]:
    """A recording as the windows that the tower reads, float32 (samples,) each; the last one may be shorter."""
    return waveform.split(network.config.audio.window_frames * HOP)


def walk(network: AVLM, windows: Iterable[Tensor], pad: int) -> Iterator[tuple[int, Tensor | None]]:
    """The likeliest token of each row, and its codes, int64 (K,), if the model has a codec, as soon as its window has
    come: ``windows`` may be those of a microphone. ValueError if there are more rows than the decoder has positions."""
    decoder, limit = network.decoder, network.config.decoder.max_position
    device = decoder.embedding.weight.device
    one = Segments.of([1], device)
    slots = Slots(*(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(3)), size=limit)
    caches = caches_for(network)
    for cache in caches:
        cache.slots = slots
    codec = network.codec
    token, row, code_1K = pad, 0, None
    if codec is not None:
        code_1K = torch.full((1, codec.config.num_codebooks), codec.config.codebook_size, device=device)
    for window in windows:
        for feature_D in features_of(network, window):
            if row == limit:
                raise ValueError(f"the recording has more rows than model.decoder.max_position={limit}: cut it")
            slots.index_T.fill_(row)
            slots.length_B.fill_(row + 1)
            slots.visible_B = (slots.length_B - (decoder.config.sliding_window or limit)).clamp(min=0)
            position = text_positions(1, decoder.config).to(device) + row
            with torch.no_grad():
                x_1D = decoder.embedding(torch.tensor([token], device=device)) + feature_D
                if codec is not None:
                    x_1D = x_1D + codec.embedded(code_1K).sum(1)
                hidden_1D = decoder.norm(decoder(x_1D, position, one, caches, one))
                token = int(decoder.head(hidden_1D, None).argmax())
                code_1K = codec.likeliest(hidden_1D) if codec is not None else None
            yield token, None if code_1K is None else code_1K[0].cpu()
            slots.is_prompt = False
            row += 1


@torch.no_grad()
def features_of(network: AVLM, window: Tensor) -> Tensor:
    """The audio features of the rows of a window, (F, D)."""
    config, weight = network.config, network.decoder.embedding.weight
    items = audio.mels(window, config.audio)
    sizes = [size_of("audio", item, config) for item in items]
    projector = network.audio_projector
    features = of_windows([config.audio.outputs_of(size) for size in sizes], projector.config.downsample)
    rows_F = torch.arange(len(features))
    media = media_of("audio", items, sizes, config, features, rows_F).to(weight.device)
    rows_PC = network.audio(media)
    if projector.resampler is not None:  # of Conformer blocks: as many rows come out
        rows_PC = projector.resampler(media, rows_PC)
    return projector(weight.new_zeros(len(rows_F), weight.shape[1]), media, rows_PC)[0]
