"""The whole model: LLaVA-1.5 against transformers, and what each modality promises."""

import dataclasses

import pytest
import torch
import transformers

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.models.batch import AUDIO, IMAGE
from avlm.weights.folder import read_config
from tests.families.measured import close, gradients_close
from tests.models.handmade import build, loaded, make_batch, normalised, pixels_of, save

DECODER = DecoderConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_position=256
)
VISION = VisionConfig(hidden_size=24, intermediate_size=48, num_layers=2, num_heads=2, image_size=16, patch_size=4)
AUDIO_TOWER = AudioConfig(hidden_size=24, intermediate_size=48, num_layers=2, num_heads=2, num_mels=8, max_positions=50)
WHOLE = ModelConfig(
    decoder=DECODER,
    vision=VISION,
    audio=AUDIO_TOWER,
    vision_projector=ProjectorConfig(downsample=2),
    audio_projector=ProjectorConfig(downsample=4, type="linear"),
)
TEXT_ONLY = ModelConfig(decoder=DECODER)
VISION_ONLY = dataclasses.replace(WHOLE, audio=None, audio_projector=None)
AUDIO_ONLY = dataclasses.replace(WHOLE, vision=None, vision_projector=None)
PICTURE = [IMAGE] * 4  # (16 / 4 / 2)^2 features


def sound(clip: torch.Tensor) -> list[int]:
    return [AUDIO] * -(-(clip.shape[1] // 2) // 4)


def clips_of(*frames: int) -> list[torch.Tensor]:
    return [torch.randn(8, length) for length in frames]


def llava(tie: bool = False) -> transformers.LlavaForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**sizes, image_size=24, patch_size=8),
            text_config=transformers.LlamaConfig(**sizes, vocab_size=64, tie_word_embeddings=tie),
            image_token_index=60,
            image_seq_length=9,
        )
    )


@pytest.mark.parametrize("tie", [False, True])
def test_llava_logits_of_two_images_and_gradients_equal_those_of_transformers(tie, tmp_path):
    theirs = llava(tie)
    save(theirs, tmp_path)
    config = read_config(tmp_path)
    ours = loaded(config, all=tmp_path)
    document = [1, *[IMAGE] * 9, 5, 6, 7, *[IMAGE] * 9, 8, 9, 10, 2]
    pixels = pixels_of(2, 24)
    batch = make_batch(config, [document], pixels)
    everything = dataclasses.replace(
        batch,
        target_rows_R=torch.arange(len(document)),
        target_R=torch.zeros(len(document), dtype=torch.int64),
        kind_R=torch.zeros(len(document), dtype=torch.int64),
    )
    input_ids = torch.tensor([[60 if token == IMAGE else token for token in document]])
    expected = theirs(input_ids=input_ids, pixel_values=normalised(pixels, config.vision)).logits[0]
    x_TD = ours.hidden(everything)
    logits = ours.decoder.head(ours.decoder.norm(x_TD), None)
    close(logits, expected, "llava logits")
    ours(batch)[0].backward()
    rows = batch.target_rows_R
    torch.nn.functional.cross_entropy(expected[rows], batch.target_R, reduction="sum").backward()
    theirs_by_name = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = {
        "vision.patch.weight": "model.vision_tower.embeddings.patch_embedding.weight",
        "vision.class_token": "model.vision_tower.embeddings.class_embedding",
        "vision.blocks.0.attention.k.bias": "model.vision_tower.encoder.layers.0.self_attn.k_proj.bias",
        "vision.blocks.1.up.weight": "model.vision_tower.encoder.layers.1.mlp.fc1.weight",
        "vision_projector.up.weight": "model.multi_modal_projector.linear_1.weight",
        "vision_projector.down.bias": "model.multi_modal_projector.linear_2.bias",
        "decoder.embedding.weight": "model.language_model.embed_tokens.weight",
        "decoder.blocks.0.attention.q.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
        "decoder.norm.weight": "model.language_model.norm.weight",
    }
    gradients = {theirs_name: ours.get_parameter(name).grad for name, theirs_name in pairs.items()}
    gradients_close(gradients, {name: theirs_by_name[name] for name in gradients}, "llava")


@pytest.mark.parametrize(
    ("config", "document", "num_images", "frames"),
    [
        (TEXT_ONLY, [1, 2, 3, 4], 0, ()),
        (VISION_ONLY, [1, *PICTURE, 2, 3], 1, ()),
        (AUDIO_ONLY, [1, *[AUDIO] * 3, 2, 3], 0, (20,)),
        (WHOLE, [1, *PICTURE, *[AUDIO] * 3, 2, 3], 1, (20,)),
    ],
    ids=["text", "vision", "audio", "both"],
)
def test_models_of_any_modalities_build_and_train(config, document, num_images, frames):
    model = build(config)
    batch = make_batch(config, [document], pixels_of(num_images, 16), clips_of(*frames))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(batch)[0] / len(batch.target_R)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("present", ["nothing", "image", "clip"])
def test_modalities_that_a_batch_lacks_get_exactly_zero_gradients(present):
    model = build(WHOLE)
    clips = clips_of(20) if present == "clip" else []
    images = pixels_of(int(present == "image"), 16)
    document = {"nothing": [], "image": PICTURE, "clip": [AUDIO] * 3}[present]
    model(make_batch(WHOLE, [[1, *document, 2, 3]], images, clips))[0].backward()
    for name, parameter in model.named_parameters():
        module = name.partition(".")[0]
        absent = {"image": module.startswith("audio"), "clip": module.startswith("vision")}
        assert parameter.grad is not None, name
        if absent.get(present, module != "decoder"):
            assert not parameter.grad.any(), name
    assert model.decoder.norm.weight.grad.any()


def test_placeholders_leave_the_embedding_of_the_first_token_alone():
    model = build(WHOLE)
    model(make_batch(WHOLE, [[1, *PICTURE, 2, 3]], pixels_of(1, 16)))[0].backward()
    assert not model.decoder.embedding.weight.grad[0].any()


def test_packed_samples_with_media_equal_separate_ones():
    model = build(WHOLE)
    images, clips = pixels_of(3, 16), clips_of(20, 46, 2)
    samples = [
        ([1, *PICTURE, 5, *PICTURE, 6, 7], images[:2], []),
        ([2, *sound(clips[0]), 8, *sound(clips[1]), 9], None, clips[:2]),
        ([3, *PICTURE, *sound(clips[2]), 4, 4], images[2:], clips[2:]),
        ([5, 6, 7], None, []),
    ]
    _, packed = model(make_batch(WHOLE, [document for document, _, _ in samples], images, clips))
    separate = torch.cat([model(make_batch(WHOLE, [document], image, clip))[1] for document, image, clip in samples])
    assert packed.shape == separate.shape and (packed - separate).abs().max() <= 1e-5


def test_every_clip_and_image_lands_on_its_own_rows():
    """NeMo interleaves the features of several clips of a sample when their lengths differ."""
    model = build(WHOLE)
    images, clips = pixels_of(2, 16), clips_of(20, 46, 6)
    document = [1, *sound(clips[0]), *PICTURE, 2, *sound(clips[1]), *sound(clips[2]), *PICTURE, 3]
    with torch.no_grad():
        x_TD, *_ = model.embed(make_batch(WHOLE, [document], images, clips))
        row = 1
        for medium in (clips[0], images[0], None, clips[1], clips[2], images[1]):
            if medium is None:
                row += 1
                continue
            kwargs = {"clips": [medium]} if medium.ndim == 2 else {"images": medium[None]}
            tokens = sound(medium) if medium.ndim == 2 else PICTURE
            alone, *_ = model.embed(make_batch(WHOLE, [tokens], **kwargs))
            assert (x_TD[row : row + len(tokens)] - alone).abs().max() <= 1e-5
            row += len(tokens)
    assert row == len(document) - 1


@pytest.mark.parametrize("tower", ["vision", "audio"])
def test_a_frozen_tower_builds_no_graph_and_its_projector_still_trains(tower):
    model = build(WHOLE)
    model.requires_grad_(False)
    getattr(model, f"{tower}_projector").requires_grad_(True)
    seen = []
    getattr(model, tower).register_forward_hook(lambda module, inputs, output: seen.append(output))
    clips = clips_of(20)
    batch = make_batch(WHOLE, [[1, *PICTURE, *sound(clips[0]), 2, 3]], pixels_of(1, 16), clips)
    model(batch)[0].backward()
    assert seen[0].grad_fn is None and not seen[0].requires_grad
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(f"{tower}_projector"), name
    assert all(p.grad.any() for p in getattr(model, f"{tower}_projector").parameters())


def test_a_decoder_under_a_frozen_start_still_passes_gradients_to_a_trained_tower():
    model = build(WHOLE)
    model.requires_grad_(False)
    model.vision.requires_grad_(True)
    model(make_batch(WHOLE, [[1, *PICTURE, 2, 3]], pixels_of(1, 16)))[0].backward()
    assert model.vision.patch.weight.grad.any() and model.decoder.norm.weight.grad is None
