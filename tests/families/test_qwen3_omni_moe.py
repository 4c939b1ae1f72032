"""Qwen3-Omni's thinker against transformers: keys, features, logits, gradients, answers, and exports.

Clips are log-mel windows of ours: their feature extractor drops a last frame that is not whole. One of them is longer
than the frames that are convolved together, or their encoder would fill the pieces of a call up to the longest alone.
"""

import dataclasses
import json
import math
import re

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig
from avlm.config.run import DataConfig, InitFrom
from avlm.data.packing import pack
from avlm.data.positions import Placed, of_grid, of_text, positions
from avlm.data.sample import EncodedSample
from avlm.evaluation.generation import generate
from avlm.families import qwen3_omni_moe as family
from avlm.models.avlm import AVLM
from avlm.models.batch import AUDIO, IGNORE, IMAGE, Batch
from avlm.models.costs import item_costs, steps
from avlm.models.log_mel import windows
from avlm.models.shapes import parameter_shapes
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.folder import read_config
from avlm.weights.load import load_weights
from tests.families.measured import all_gradients_close, close, note
from tests.families.test_qwen_vl import SIZES, frames, logits_of, pixel_values
from tests.families.test_qwen_vl_keys import EXPERTS, ROPE, TEXT, VISION
from tests.models.handmade import adapted, build, loaded, save
from tests.weights.test_sources import write_run

NAME = "qwen3_omni_moe"
CLASS = transformers.Qwen3OmniMoeThinkerForConditionalGeneration
SEE, SEEN, HEAR, HEARD, OF_IMAGE, OF_VIDEO, OF_AUDIO = 91, 97, 94, 96, 92, 93, 95
IDS = dict(zip(family.MEDIA_TOKENS, (SEE, OF_IMAGE, OF_VIDEO, SEEN, HEAR, OF_AUDIO, HEARD)))
OF_THE_CLASS = {"audio_token_id": OF_AUDIO, "image_token_id": OF_IMAGE, "video_token_id": OF_VIDEO}
OF_THE_CLASS |= {"audio_start_token_id": HEAR, "vision_start_token_id": SEE}
VIDEO, EACH = (3, 4, 5), 0.83  # temporal patches, lines and columns of features; seconds between patches
SECONDS = [0.37, 2.25, 1.0]  # of the clips: windows of attention have 2 s
AUDIO_KEYS = {"num_mel_bins": 16, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2}
AUDIO_KEYS |= {"encoder_ffn_dim": 40, "n_window_infer": 200, "downsample_hidden_size": 6, "output_dim": 32}


def config_of(tied: bool = False) -> transformers.PretrainedConfig:
    rope = {**ROPE, "mrope_interleaved": True}
    text = {key: value for key, value in TEXT.items() if key != "bos_token_id"}
    return Qwen3OmniMoeThinkerConfig(
        audio_config=dict(AUDIO_KEYS),
        vision_config=dict(VISION["qwen3_vl"]),
        text_config={**text, **EXPERTS, "head_dim": 8, "rope_parameters": rope},
        tie_word_embeddings=tied,
        position_id_per_seconds=13,
        **OF_THE_CLASS,
    )


def keys_of(tied: bool = False) -> dict:
    return json.loads(config_of(tied).to_json_string(use_diff=False))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(transformers' model, folder, our config)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    theirs = CLASS(config_of())
    save(theirs, folder)
    return theirs, folder, read_config(folder)


@dataclasses.dataclass
class Prompt:
    inputs: dict[str, Tensor]  # of transformers' forward
    sample: EncodedSample
    batch: Batch


def rows_of(frames: int) -> int:
    """Each convolution leaves half, rounded up; a whole piece has 13."""
    return frames // 100 * 13 + math.ceil(math.ceil(math.ceil(frames % 100 / 2) / 2) / 2)


def prompt(theirs, config: ModelConfig, is_merged: bool) -> Prompt:
    """Text, two images, clips, and a video with or without its sound, of the length of the last clip."""
    torch.manual_seed(1)
    clips = [windows(torch.randn(round(16_000 * seconds)) * 0.1, config.audio) for seconds in SECONDS]
    lengths = [sum(window.shape[1] for window in clip) for clip in clips]
    images = [frames(*size, config) for size in SIZES]
    video = [frames(*VIDEO[1:], config) for _ in range(VIDEO[0])]
    ids = [5, 6]
    for lines, columns in SIZES:
        ids += [SEE, *[OF_IMAGE] * (lines * columns), SEEN, 7]
    for length in lengths[:-1]:
        ids += [8, HEAR, *[OF_AUDIO] * rows_of(length), HEARD]
    of_patch, heard = [OF_VIDEO] * (VIDEO[1] * VIDEO[2]), rows_of(lengths[-1])
    if is_merged:
        ids += [9, SEE, HEAR, *merged(of_patch, heard), HEARD, SEEN]
    else:
        ids += [8, HEAR, *[OF_AUDIO] * heard, HEARD, SEE, *of_patch * VIDEO[0], SEEN]
    ids += [7, 8, 9, 10, 11]
    ids_T = torch.tensor(ids)
    features = torch.zeros(len(clips), config.audio.num_mels, max(lengths))
    mask = torch.zeros(len(clips), max(lengths), dtype=torch.long)
    for i, clip in enumerate(clips):
        features[i, :, : lengths[i]] = torch.cat(clip, 1)
        mask[i, : lengths[i]] = 1
    inputs = {
        "input_ids": ids_T[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "input_features": features,
        "feature_attention_mask": mask,
        "pixel_values": pixel_values(images, config),
        "image_grid_thw": torch.tensor([(1, 2 * lines, 2 * columns) for lines, columns in SIZES]),
        "pixel_values_videos": pixel_values(video, config),
        "video_grid_thw": torch.tensor([(VIDEO[0], 2 * VIDEO[1], 2 * VIDEO[2])]),
        "video_second_per_grid": torch.tensor([EACH]),
        "use_audio_in_video": is_merged,
    }
    token_T = torch.where(ids_T == OF_AUDIO, AUDIO, ids_T)
    token_T = torch.where((ids_T == OF_IMAGE) | (ids_T == OF_VIDEO), IMAGE, token_T)
    target_T = torch.cat([ids_T[1:], torch.tensor([IGNORE])])
    target_T[torch.cat([token_T[1:] < 0, torch.tensor([False])])] = IGNORE
    media = {"audio": [window for clip in clips for window in clip], "image": [*images, *video]}
    position_3T = their_positions(theirs, inputs).double()
    sample = EncodedSample("a", "mixed", token_T, target_T, media, position_3T)
    return Prompt(inputs, sample, pack([sample], len(ids), config))


def merged(of_patch: list[int], heard: int) -> list[int]:
    found = []
    times = [i * EACH * 13 for i in range(VIDEO[0])]
    for feature in range(heard):
        while times and times[0] <= feature:
            found += of_patch
            times = times[1:]
        found.append(OF_AUDIO)
    return found + of_patch * len(times)


def their_positions(theirs, inputs: dict) -> Tensor:
    return theirs.get_rope_index(
        inputs["input_ids"],
        inputs["image_grid_thw"],
        inputs["video_grid_thw"],
        inputs["attention_mask"],
        inputs["use_audio_in_video"],
        inputs["feature_attention_mask"].sum(-1),
        inputs["video_second_per_grid"],
    )[0][:, 0]


# 1. Keys


def test_our_config_comes_back_from_their_keys_in_both_dialects():
    config = family.read(keys_of(), {})
    audio = config.audio
    assert (audio.stem, audio.window_frames, audio.max_positions) == ("conv2d", 200, 26)
    keys, files = family.config_json(config, IDS), family.processor_json(config, None)
    assert family.read(keys, files) == config and keys["text_config"]["num_experts"] == 6
    theirs = Qwen3OmniMoeThinkerConfig(**keys)
    assert {key: getattr(theirs, key) for key in OF_THE_CLASS} == OF_THE_CLASS
    assert family.read(json.loads(theirs.to_json_string(use_diff=False)), files) == config
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": keys_of(), "talker_config": {"hidden_size": 8}}
    assert family.read(whole, {}) == config


def test_absent_keys_have_the_defaults_of_their_classes():
    theirs = Qwen3OmniMoeThinkerConfig(text_config={"num_attention_heads": 32, "head_dim": 128, "hidden_size": 3584})
    keys = json.loads(theirs.to_json_string(use_diff=False))
    del keys["text_config"]["rope_parameters"]
    given = {"model_type": theirs.model_type, "text_config": {"num_attention_heads": 32, "head_dim": 128}}
    given["text_config"]["hidden_size"] = 3584
    assert family.read(given, {}) == family.read(keys, {})


def test_what_is_not_implemented_is_refused_by_name():
    for change, said in (
        ({"n_window": 10}, "n_window=10 is not implemented"),
        ({"n_window_infer": 250}, "n_window_infer=250 is no multiple of the 100 frames"),
        ({"output_dim": 40}, "features of 40 numbers, and the decoder 32"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
    ):
        keys = keys_of()
        keys["audio_config"] |= change
        with pytest.raises(ValueError, match=said):
            family.read(keys, {})
    config = family.read(keys_of(), {})
    whisper = dataclasses.replace(config.audio, stem="conv1d", stem_width=0)
    with pytest.raises(ValueError, match=r"needs vision\.tokens_per_second and audio\.stem=conv2d"):
        family.config_json(dataclasses.replace(config, audio=whisper), IDS)
    rounded = dataclasses.replace(config.vision, fractional_time=False)
    with pytest.raises(ValueError, match=r"cannot hold vision\.fractional_time=False"):
        family.config_json(dataclasses.replace(config, vision=rounded), IDS)


# 2. Numbers


@torch.no_grad()
def test_features_and_logits_equal_those_of_transformers(case):
    theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(theirs, config, is_merged=False)
    media = ask.batch.audio
    assert media.lengths == [5, 26, 4, 13]
    into = torch.zeros(len(ask.batch.token_T), config.decoder.hidden_size)
    features, _ = ours.audio_projector(into, media, ours.audio(media))
    expected = theirs.get_audio_features(ask.inputs["input_features"], ask.inputs["feature_attention_mask"])
    close(features[media.rows], expected.last_hidden_state, f"{NAME} features")
    for is_merged in (False, True):
        ask = prompt(theirs, config, is_merged)
        close(logits_of(ours, ask.batch), theirs(**ask.inputs).logits[0], f"{NAME} logits")


def test_gradients_of_the_loss_equal_those_of_transformers(case):
    theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(theirs, config, is_merged=True)
    ours(ask.batch)[0].backward()
    logits = theirs(**ask.inputs).logits[0]
    cross_entropy(logits[ask.batch.target_rows_R], ask.batch.target_R, reduction="sum").backward()
    all_gradients_close(ours, theirs, NAME)
    theirs.zero_grad()


@pytest.mark.parametrize("is_merged", [False, True], ids=["sound apart", "sound in the video"])
def test_greedy_answers_equal_those_of_transformers_token_for_token(case, is_merged):
    """A new token's position is no whole number after such a video."""
    theirs, folder, config = case
    ours = loaded(config, all=folder)
    ask = prompt(theirs, config, is_merged)
    text_T = torch.tensor([5, 6, 7, 8])
    text = EncodedSample("b", "text", text_T, torch.full_like(text_T, IGNORE))
    [answer, of_text_alone] = generate(ours, [ask.sample, text], stop_ids=[], max_new_tokens=12)
    out = theirs.generate(**ask.inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert answer.token_ids == out[0, ask.inputs["input_ids"].shape[1] :].tolist()
    inputs = {"input_ids": text_T[None], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    out = theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert of_text_alone.token_ids == out[0, 4:].tolist()
    note(f"{NAME} answers")


@torch.no_grad()
def test_a_clip_has_the_same_features_next_to_any_other(case):
    _, folder, config = case
    tower = loaded(config, all=folder).audio
    clip = windows(torch.randn(5_000) * 0.1, config.audio)
    alone, together = (pack_of(items, config) for items in (clip, [*clip, torch.randn(16, 180)]))
    assert alone.values.shape[2] == 100 and together.values.shape[2] == 200
    torch.testing.assert_close(tower(together)[: alone.lengths[0]], tower(alone), atol=1e-6, rtol=1e-6)


def pack_of(items: list[Tensor], config: ModelConfig):
    count = sum(config.audio.num_features(item.shape[1], 1) for item in items)
    token_T = torch.cat([torch.full((count,), AUDIO), torch.tensor([5])])
    sample = EncodedSample("a", "audio", token_T, torch.full_like(token_T, IGNORE), {"audio": items})
    return pack([sample], count + 1, config).audio


def test_every_part_of_the_stem_is_counted():
    config = family.read(keys_of(), {})
    covered = {path for _, paths in steps("audio", config) for path in paths}
    shapes = parameter_shapes(config)
    assert {name.rpartition(".")[0] for name in shapes if name.startswith("audio.")} <= covered
    items = [torch.randn(16, 150), torch.randn(16, 30)]
    counted = pack_of(items, config).windows.counts  # both windows have 200 frames
    pieces = 2 * 2
    expected = {"halved_1": pieces * 8 * 50, "halved_2": pieces * 4 * 25, "halved_3": pieces * 2 * 13}
    assert counted == {**expected, "stem_rows": pieces * 13}
    product = {name: 2 * math.prod(shapes[f"audio.{name}.weight"]) for name in ("conv1", "conv2", "conv3", "stem_out")}
    stem = sum(number // 2 * cost for number, cost in zip(counted.values(), product.values(), strict=True))
    [of_item, of_half] = item_costs("audio", [200, 100], config)
    blocks = 2 * (2 * (4 * 24 * 24 + 2 * 24 * 40) * 26 + 4 * 24 * 26**2)
    assert of_item == stem + blocks and of_half < of_item / 2


# 3. Positions


def test_positions_of_a_video_are_those_of_transformers_without_rounding(case):
    theirs, _, config = case
    ask = prompt(theirs, config, is_merged=True)
    ids = ask.inputs["input_ids"][0]
    placed, at = [], 0
    for lines, columns in SIZES:
        at = int((ids[at:] == OF_IMAGE).nonzero()[0]) + at
        placed.append(Placed(at, of_grid([0], lines, columns)))
        at += lines * columns
    at = int((ids == HEAR).nonzero()[-1]) + 1
    is_first, patch, heard = True, 0, 0
    while ids[at] in (OF_VIDEO, OF_AUDIO):
        if ids[at] == OF_VIDEO:
            offsets = of_grid([patch], *VIDEO[1:], EACH * 13, is_fractional=True)
            patch += 1
        else:
            offsets = of_text(heard, 1)
            heard += 1
        placed.append(Placed(at, offsets, continues=not is_first))
        is_first = False
        at += offsets.shape[1]
    ours = positions(len(ids), placed)
    assert ours.dtype == torch.float64 and not ours[0, -1].item().is_integer()
    torch.testing.assert_close(ours.float(), their_positions(theirs, ask.inputs), atol=1e-5, rtol=1e-6)


# 4. Tensors in and out


@pytest.mark.parametrize("targets", [[], ["decoder.*.attention.*", "audio.blocks.*"]], ids=["plain", "with adapters"])
@torch.no_grad()
def test_an_export_is_read_back_by_transformers_with_equal_logits(case, targets, tmp_path):
    before, folder, config = case
    ours = adapted(config, folder, targets)
    export(ours.config, ours.state_dict(), tmp_path / "out", NAME)
    theirs, report = CLASS.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ask = prompt(before, config, is_merged=True)
    theirs.config.update(OF_THE_CLASS)  # without a tokenizer placeholders get the first free ids
    logits = theirs(**ask.inputs).logits[0]
    assert logits.shape[1] == config.decoder.vocab_size + len(family.MEDIA_TOKENS)
    close(logits_of(ours, ask.batch), logits[:, : config.decoder.vocab_size], f"{NAME} export")
    assert dataclasses.replace(read_config(tmp_path / "out"), decoder=config.decoder) == config
    names = [load_file(path / "model.safetensors").keys() for path in (folder, tmp_path / "out")]
    assert names[0] == names[1] and any(".experts.5.up_proj" in name for name in names[1])


def test_the_names_of_tensors_in_files_and_in_memory_load_alike(case, tmp_path):
    theirs, folder, config = case
    one = loaded(config, all=folder)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "weights.pt")  # without a config the names tell the family
    for other in (loaded(config, all=tmp_path), loaded(config, all=tmp_path / "weights.pt")):
        assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters()))


def test_of_a_whole_model_what_speaks_is_left_out_by_name_and_kept_in_an_export_of_the_whole(
    case, tmp_path, monkeypatch, capsys
):
    _, folder, config = case
    state = {f"thinker.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    more = ("talker.model.codec_embedding.weight", "talker.codec_head.weight", "code2wav.decoder.0.conv.weight")
    (tmp_path / "whole").mkdir()
    save_file({**state, **{key: torch.rand(2) for key in more}}, tmp_path / "whole" / "model.safetensors")
    keys = {"model_type": "qwen3_omni_moe", "thinker_config": json.loads((folder / "config.json").read_text())}
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**keys, "enable_audio_output": True}))
    assert read_config(tmp_path / "whole") == config
    model = AVLM(config)
    [report] = load_weights(model, InitFrom(all=str(tmp_path / "whole")))
    for reason, count in {"talker, which speaks": 2, "codec of the talker": 1}.items():
        assert re.search(rf"{count} \([^)]*{reason}", str(report))
    assert report.loaded + 3 == report.total
    with torch.no_grad():
        model.decoder.blocks[0].ffn.experts.up.weight.add_(1.0)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(89)}, unk_token="w0"))
    placeholders = {number: token for token, number in IDS.items()}
    words.add_special_tokens(["<|im_start|>", "<|im_end|>", *(placeholders[number] for number in sorted(placeholders))])
    (tmp_path / "tokenizer").mkdir()
    words.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    data = DataConfig(train="x", template="chatml", tokenizer=str(tmp_path / "tokenizer"), seq_length=64)
    write_run(tmp_path / "run", model, data=data)
    out = (tmp_path / "run", tmp_path / "out", "--format", NAME, "--dtype", "float32", "--whole", tmp_path / "whole")
    monkeypatch.setattr("sys.argv", ["weights", "export", *map(str, out)])
    main()
    assert "load it: transformers.Qwen3OmniMoeForConditionalGeneration.from_pretrained" in capsys.readouterr().out
    before, after = (load_file(tmp_path / path / "model.safetensors") for path in ("whole", "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"thinker.model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(6)}


def test_our_stem_trains_in_a_model_of_our_own():
    """With zero windows, too: gradients of exactly zero."""
    decoder = family.read(keys_of(), {}).decoder
    audio = AudioConfig(
        **{"hidden_size": 24, "intermediate_size": 40, "num_layers": 1, "num_heads": 2, "num_mels": 16},
        **{"stem": "conv2d", "stem_width": 4, "stem_frames": 16, "max_positions": 4, "log_mel": "clip"},
    )
    config = ModelConfig(decoder=decoder, audio=audio, audio_projector=ProjectorConfig())
    model = build(config)
    for items in ([torch.randn(16, 32), torch.randn(16, 9)], []):
        tower = pack_of(items, config)
        model.zero_grad()
        model.audio(tower).square().sum().backward()
        gradients = [parameter.grad for parameter in model.audio.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients) == bool(items)
