"""Contrastive alignment against transformers' CLIPModel and SiglipModel: the loss of a batch of pairs, and all
gradients."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from avlm.config.contrastive import ContrastiveConfig, PoolConfig, TextConfig
from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.data.captions import EncodedPair, pack_pairs
from avlm.data.media.patches import cut_into_patches
from avlm.models.avlm import AVLM
from avlm.models.batch import empty_pairs
from avlm.parallel.pairs import joined
from tests.models.handmade import assert_gradients_close, build, normalised, pixels_of, shake

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 24, "patch_size": 8}
END = 49  # ends a caption of CLIP
CAPTIONS = [[48, 3, 4, END], [48, 7, END], [48, 9, 1, 2, 5, END]]
DECODER = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
OURS = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}
BLOCKS = {
    **{"layer_norm1": "attention_norm", "layer_norm2": "ffn_norm", "mlp.fc1": "up", "mlp.fc2": "down"},
    **{"self_attn.q_proj": "attention.q", "self_attn.k_proj": "attention.k"},
    **{"self_attn.v_proj": "attention.v", "self_attn.out_proj": "attention.o"},
}
NAMES = {
    **{"vision_model.embeddings.patch_embedding": "vision.patch", "vision_model.pre_layrnorm": "vision.pre_norm"},
    **{
        "vision_model.embeddings.class_embedding": "vision.class_token",
        "vision_model.post_layernorm": "vision.post_norm",
    },
    "vision_model.embeddings.position_embedding.weight": "vision.position",
    **{"text_model.embeddings.token_embedding": "text.embedding", "text_model.final_layer_norm": "text.norm"},
    "text_model.embeddings.position_embedding.weight": "text.position",
    **{"visual_projection": "contrastive.vision.projection", "text_projection": "contrastive.text.projection"},
    **{"logit_scale": "contrastive.logit_scale", "logit_bias": "contrastive.logit_bias"},
    "text_model.head": "contrastive.text.projection",
    **{
        "vision_model.head.probe": "contrastive.vision.pool.probe",
        "vision_model.head.layernorm": "contrastive.vision.pool.norm",
    },
    "vision_model.head.attention.out_proj": "contrastive.vision.pool.o",
    **{
        "vision_model.head.mlp.fc1": "contrastive.vision.pool.up",
        "vision_model.head.mlp.fc2": "contrastive.vision.pool.down",
    },
}


def our_names(theirs: str) -> list[str]:
    """Ours for one of theirs; several are its rows, one after the other."""
    for tower in ("vision", "text"):
        layer = theirs.removeprefix(f"{tower}_model.encoder.layers.")
        if layer != theirs:
            number, _, rest = layer.partition(".")
            rest, _, leaf = rest.rpartition(".")
            return [f"{tower}.blocks.{number}.{BLOCKS[rest]}.{leaf}"]
    joint, _, leaf = theirs.rpartition("in_proj_")
    if joint:
        return [f"contrastive.vision.pool.{part}.{leaf}" for part in "qkv"]
    if theirs in NAMES:
        return [NAMES[theirs]]
    module, _, leaf = theirs.rpartition(".")
    return [f"{NAMES[module]}.{leaf}"]


def ours_of(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in theirs.items():
        names = our_names(name)
        found |= zip(names, tensor.chunk(len(names)) if tensor.ndim else [tensor])
    return found


def clip_pair() -> tuple[nn.Module, ModelConfig]:
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": END},
            vision_config={**SIZES, **IMAGE},
            projection_dim=20,
        )
    )
    return theirs, ModelConfig(
        decoder=DECODER,
        vision=VisionConfig(**OURS, **IMAGE, feature_layer=-1, post_norm=True),
        vision_projector=ProjectorConfig(),
        text=TextConfig(vocab_size=50, **OURS, max_position=8),
        contrastive=ContrastiveConfig(size=20),
    )


def siglip_pair() -> tuple[nn.Module, ModelConfig]:
    theirs = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={**SIZES, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32},
            vision_config={**SIZES, **IMAGE},
        )
    )
    kind = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    return theirs, ModelConfig(
        decoder=DECODER,
        vision=VisionConfig(
            **{**OURS, **IMAGE, **kind, "class_token": False, "pre_norm": False, "patch_bias": True},
            feature_layer=-1,
            post_norm=True,
        ),
        vision_projector=ProjectorConfig(),
        text=TextConfig(vocab_size=50, **OURS, **kind, max_position=8, causal=False),
        contrastive=ContrastiveConfig(
            size=32, loss="sigmoid", vision=PoolConfig(pool="attention", projection="none"), text_bias=True
        ),
    )


def sample_of(caption: list[int], modality: str, items: list[Tensor]) -> EncodedPair:
    token_T = torch.tensor(caption)
    return EncodedPair("", modality, token_T, token_T, {modality: items})


def rows_of(captions: list[list[int]], pixels: Tensor, config: ModelConfig):
    pairs = zip(captions, pixels, strict=True)
    samples = [sample_of(caption, "image", [cut_into_patches(image[None], config.vision)]) for caption, image in pairs]
    return pack_pairs(samples, config)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("make", [clip_pair, siglip_pair])
def test_the_loss_and_all_gradients_are_those_of_transformers(make):
    torch.manual_seed(0)
    theirs, config = make()
    shake(theirs.eval())
    model = AVLM(config)
    weights = ours_of(dict(theirs.named_parameters()))
    own = {
        name: parameter for name, parameter in model.named_parameters() if name.startswith(("vision.", "text.", "con"))
    }
    assert weights.keys() == own.keys(), "a parameter has no counterpart"
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name].reshape(parameter.shape))
    captions = CAPTIONS
    longest = max(map(len, captions))
    ids = torch.tensor([caption + [END] * (longest - len(caption)) for caption in captions])
    if make is siglip_pair:  # it reads what fills a caption
        ids = F.pad(ids, (0, 8 - longest), value=1)
        captions = ids.tolist()
    pixels = pixels_of(3, 24)
    expected = theirs(input_ids=ids, pixel_values=normalised(pixels, config.vision), return_loss=True).loss
    expected.backward()

    batch = rows_of(captions, pixels, config)
    loss, loss_N = model(batch)
    (loss / 3).backward()

    assert loss.item() / 3 == pytest.approx(expected.item(), rel=1e-6)
    assert loss_N.sum().item() == pytest.approx(loss.item())
    worst = assert_gradients_close(gradients(model), ours_of(gradients(theirs)), 1e-5)
    print(f"{make.__name__}: loss {loss.item() / 3:.6f}, gradients within {worst:.1e}")

    first, second = rows_of(captions[:2], pixels[:2], config), rows_of(captions[2:], pixels[2:], config)
    again, _ = model(joined([first, empty_pairs(config), second], config))
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)


AUDIO = AudioConfig(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_mels=8, max_positions=6)


def test_clips_are_averaged_over_all_their_windows_beside_images_that_attend():
    """Symmetric cross-entropy of CLAP's paper. The ``ClapModel`` of transformers 5.17 takes that of captions twice."""
    _, config = siglip_pair()
    contrastive = ContrastiveConfig(size=12, vision=PoolConfig(pool="attention"))
    config = dataclasses.replace(
        config, audio=AUDIO, audio_projector=ProjectorConfig(downsample=2), contrastive=contrastive
    )
    model = build(config)
    pixels = pixels_of(1, 24)
    long = [torch.randn(8, 12), torch.randn(8, 4)]
    samples = [
        sample_of(CAPTIONS[0], "audio", long),
        sample_of(CAPTIONS[1], "image", [cut_into_patches(pixels, config.vision)]),
        sample_of(CAPTIONS[2], "audio", [torch.randn(8, 6)]),
    ]
    batch = pack_pairs(samples, config)
    loss, _ = model(batch)

    heard_KD = model.audio(batch.audio).split([6 + 2, 3])
    media = [model.contrastive.audio.projection(rows.mean(0)) for rows in heard_KD]
    alone = pack_pairs(samples[1:2], config)
    media.insert(1, model(alone, predict=True)[0][0])
    texts = [model(pack_pairs([sample], config), predict=True)[1][0] for sample in samples]
    scale = model.contrastive.logit_scale.exp()
    logit_NN = scale * F.normalize(torch.stack(media), dim=1) @ F.normalize(torch.stack(texts), dim=1).T
    own_N = torch.arange(3)
    expected = (F.cross_entropy(logit_NN, own_N) + F.cross_entropy(logit_NN.T, own_N)) / 2
    assert loss.item() / 3 == pytest.approx(expected.item(), rel=1e-5)
    assert math.exp(model.contrastive.init_stats()["logit_scale"][0]) == pytest.approx(1 / 0.07)


def test_a_row_without_pairs_has_gradients_of_zero():
    _, config = clip_pair()
    model = build(config)
    loss, loss_N = model(empty_pairs(config))
    loss.backward()
    found = gradients(model)
    assert loss.item() == 0 and len(loss_N) == 0
    assert not any(gradient.any() for gradient in found.values())
    assert {name.split(".")[0] for name in found} == {"vision", "text", "contrastive"}
