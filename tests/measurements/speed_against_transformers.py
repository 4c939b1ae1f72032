"""A training step of the demo model on packed rows, against a padded batch through modules of transformers.

    python tests/measurements/speed_against_transformers.py [--seconds N]      (from the repository root)

Both sides have the same sizes, weights and samples, float32, one CPU thread. Ours takes a row as the loader packs it;
theirs takes the samples of that row as a batch, padded on the right to the longest, each clip to Whisper's full window.
To their favour: scaled_dot_product_attention, no tower without media, and features of padding are dropped behind the
audio tower, so that the decoder sees as few tokens of a clip as ours does. Making a batch is timed on neither side.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # before tests/, whose folders are named like ours

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from avlm.config.load import load_config
from avlm.config.model import ModelConfig
from avlm.data.loader import open_loader
from avlm.data.media.patches import frames_of
from avlm.data.stream import Stream
from avlm.demo.build import ensure
from avlm.families import clip, llama, whisper
from avlm.families.door import hugging_face_name
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE, IMAGE, Batch, media_of
from avlm.models.initial import init
from avlm.models.vit import normalise

ROWS = 8
UNUSED = {"vision": "post_layernorm", "audio": "embed_positions"}  # of a pooled output; fixed sinusoids


class PaddedModel(nn.Module):
    """The modules of transformers under our names, put together as LLaVA does it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        sdpa = {"attn_implementation": "sdpa"}
        d, v, a = config.decoder, config.vision, config.audio
        sizes = {"vocab_size": d.vocab_size, "num_key_value_heads": d.num_kv_heads, "rms_norm_eps": d.norm_eps}
        rope = {"rope_type": "default", "rope_theta": d.rope_theta}
        limits = {"max_position_embeddings": d.max_position, "rope_parameters": rope, "use_cache": False}
        self.decoder = LlamaForCausalLM(LlamaConfig(**sizes_of(d), **sizes, **limits, **sdpa))
        image = {"image_size": v.image_size, "patch_size": v.patch_size, "hidden_act": v.activation}
        self.vision = CLIPVisionModel(CLIPVisionConfig(**sizes_of(v), **image, **sdpa))
        layers = {"d_model": a.hidden_size, "encoder_layers": a.num_layers, "encoder_attention_heads": a.num_heads}
        window = {"num_mel_bins": a.num_mels, "max_source_positions": a.max_positions}
        self.audio = WhisperEncoder(WhisperConfig(**layers, encoder_ffn_dim=a.intermediate_size, **window, **sdpa))
        self.vision_projector = projector(v.hidden_size * config.vision_projector.downsample**2, d.hidden_size)
        self.audio_projector = projector(a.hidden_size * config.audio_projector.downsample, d.hidden_size)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(mean loss, logits (B, L, V)) of what ``pad`` made."""
        ids_BL = batch["ids"]
        x_BLD = self.decoder.get_input_embeddings()(ids_BL.clamp(min=0))
        if len(batch["pixels"]):
            features = self.vision(pixel_values=batch["pixels"]).last_hidden_state[:, 1:]
            features = self.vision_projector(shuffle_pixels(features, self.config.vision_projector.downsample))
            x_BLD = x_BLD.masked_scatter((ids_BL == IMAGE)[..., None], features)
        if len(batch["mel"]):
            features = self.audio(batch["mel"]).last_hidden_state.flatten(0, 1)[batch["mel_rows"]]
            features = self.audio_projector(stack_frames(features, batch["frame_rows"]))
            x_BLD = x_BLD.masked_scatter((ids_BL == AUDIO)[..., None], features)
        out = self.decoder(inputs_embeds=x_BLD, attention_mask=batch["mask"], labels=batch["labels"])
        return out.loss, out.logits


def shuffle_pixels(x_INC: Tensor, factor: int) -> Tensor:
    side = math.isqrt(x_INC.shape[1])
    pattern = "i (y fy x fx) c -> (i y x) (fy fx c)"
    return rearrange(x_INC, pattern, y=side // factor, fy=factor, x=side // factor, fx=factor)


def stack_frames(x_KC: Tensor, frame_rows_GS: Tensor) -> Tensor:
    padded = torch.cat([x_KC, x_KC.new_zeros(1, x_KC.shape[1])])  # row -1
    return padded[frame_rows_GS].flatten(1)


def sizes_of(config) -> dict[str, int]:
    names = {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads}
    return names | {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}


def projector(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(up=nn.Linear(inputs, outputs), gelu=nn.GELU(), down=nn.Linear(outputs, outputs)))


@torch.no_grad()
def copy_weights(ours: AVLM, theirs: PaddedModel) -> None:
    for name, parameter in ours.named_parameters():
        module, _, rest = name.partition(".")
        if not module.endswith("projector"):
            rest = hugging_face_name({"decoder": llama, "vision": clip, "audio": whisper}[module], module, rest)
        if module == "decoder" and not rest.startswith("lm_head"):
            rest = f"model.{rest}"
        copy = theirs.get_submodule(module).get_parameter(rest)
        copy.copy_(parameter.view_as(copy))


def pad(batch: Batch, config: ModelConfig) -> dict[str, Tensor]:
    """The samples of a packed row as a right-padded batch; a label stands at its token, not at the one before."""
    lengths = batch.segments.cu_seqlens.diff().tolist()[: len(batch.keys)]
    label_T = torch.full_like(batch.token_T, IGNORE)
    label_T[batch.target_rows_R + 1] = batch.target_R
    samples = lambda row_T: row_T[: sum(lengths)].split(lengths)
    window = config.audio.max_positions
    pixels = normalise(batch.image.values, config.vision)
    sound = batch.audio
    kept = sound.windows.kept
    rows_per_window = sound.values.shape[2] // 2
    clip_K, row_K = kept // rows_per_window, kept % rows_per_window
    return {
        "ids": pad_sequence(samples(batch.token_T), batch_first=True),
        "mask": pad_sequence(samples(torch.ones_like(batch.token_T)), batch_first=True),
        "labels": pad_sequence(samples(label_T), batch_first=True, padding_value=IGNORE),
        "pixels": torch.cat(frames_of(replace(batch.image, values=pixels), config.vision, 1)),
        "mel": F.pad(sound.values, (0, 2 * window - sound.values.shape[2])),
        "mel_rows": clip_K * window + row_K,
        "frame_rows": sound.sources,
    }


def in_full_windows(row: Batch, batch: dict[str, Tensor], config: ModelConfig) -> Batch:
    """The row with what WhisperEncoder sees: attention over whole windows, the padding behind the clips included."""
    sources = row.audio.sources
    num_windows, window = len(row.audio.values), config.audio.max_positions
    whole_sources = torch.where(sources < 0, -1, batch["mel_rows"][sources])
    whole = media_of("audio", list(batch["mel"]), [2 * window] * num_windows, config, whole_sources, row.audio.rows)
    return replace(row, audio=whole)


@torch.no_grad()
def check(ours: AVLM, theirs: PaddedModel, rows: list[Batch], padded: list[dict[str, Tensor]]) -> None:
    """Both are the same model: the parameters of every module, and the loss of every target."""
    for name, module in ours.named_children():
        used = sum(p.numel() for p in module.parameters())
        sizes = {key: p.numel() for key, p in theirs.get_submodule(name).named_parameters()}
        unused = sum(size for key, size in sizes.items() if name in UNUSED and UNUSED[name] in key)
        print(f"{name}: {used:,} parameters; transformers {sum(sizes.values()):,}, of which {unused:,} unused")
        assert used == sum(sizes.values()) - unused
    silent, heard, full = [], [], []
    for row, batch in zip(rows, padded):
        learned = batch["labels"][:, 1:] != IGNORE
        theirs_R = F.cross_entropy(theirs(batch)[1][:, :-1][learned], row.target_R, reduction="none")
        silent_R = (batch["ids"] != AUDIO).all(1, keepdim=True).expand_as(learned)[learned]
        error_R = (ours(row)[1] - theirs_R).abs()
        silent.append(error_R[silent_R])
        heard.append(error_R[~silent_R])
        full.append((ours(in_full_windows(row, batch, ours.config))[1] - theirs_R).abs())
    silent, heard, full = torch.cat(silent), torch.cat(heard), torch.cat(full)
    print(f"losses of {len(silent)} targets without sound differ by at most {silent.max():.1e}")
    print(f"losses of {len(heard)} targets with sound differ by up to {heard.max():.1e}: WhisperEncoder has no mask,")
    print(f"so its clips attend to their padding; where ours do as well all losses differ by at most {full.max():.1e}")
    assert max(silent.max(), full.max()) <= 1e-4


def step(loss: Callable[[], Tensor], model: nn.Module, adam: torch.optim.AdamW) -> float:
    """Seconds of forward, backward, clipping and AdamW."""
    started = time.perf_counter()
    loss().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    adam.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="how long to measure")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    config = load_config("configs/demo.yaml")
    ensure(config)
    data, model = config.stages[-1].data, config.model
    loader = open_loader(Stream(data.train, data, model, rank=0, world=1, seed=config.seed, train=True))
    rows = list(itertools.islice(loader, ROWS))
    padded = [pad(row, model) for row in rows]
    ours, theirs = AVLM(model), PaddedModel(model)
    init(ours)
    copy_weights(ours, theirs)
    check(ours, theirs, rows, padded)
    tokens = sum(batch["mask"].sum().item() for batch in padded)
    places = [sum(len(row.token_T) for row in rows), sum(batch["mask"].numel() for batch in padded)]
    samples = sum(len(row.keys) for row in rows) / ROWS
    print(f"{ROWS} rows of {samples:.0f} samples: {tokens / places[0]:.0%} and {tokens / places[1]:.0%} are no padding")

    adams = [torch.optim.AdamW(side.parameters(), lr=1e-4, fused=True) for side in (ours, theirs)]
    times, end = ([], []), None
    while end is None or not times[0] or time.perf_counter() < end:
        for row, batch in zip(rows, padded):
            # ``to`` gives the row new segments, as in training: nothing is known of them from the round before.
            packed = step(lambda: ours(row.to("cpu"))[0] / len(row.target_R), ours, adams[0])  # noqa: B023
            other = step(lambda: theirs(batch)[0], theirs, adams[1])  # noqa: B023
            if end is not None:  # the first round warms up
                times[0].append(packed)
                times[1].append(other)
        end = end or time.perf_counter() + seconds
    a, b = (statistics.median(side) for side in times)
    print(f"packed: {a:.3f} s, padded transformers: {b:.3f} s, ratio {b / a:.2f} (median of {len(times[0])}, 1 thread)")


if __name__ == "__main__":
    main()
