"""GGUF: what llama.cpp's files hold, what is refused, and that we read back what was written."""

import dataclasses
import json
import sys

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, normalizers, pre_tokenizers

import avlm
from avlm.config.decoder import DecoderConfig, ExpertsConfig, RopeScaling, YarnScaling
from avlm.config.media import ImageLayout
from avlm.config.model import AudioConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig
from avlm.data.text.tokenizer import Tokenizer
from avlm.models.whisper import sinusoids
from avlm.weights.__main__ import main
from avlm.weights.export import export
from avlm.weights.export_run import export_run
from avlm.weights.folder import read_config
from avlm.weights.gguf_tokenizer import LLAMA3_WORDS, pre_tokenizer, tokenizer_keys
from tests.data.small_files import CONTROL, write_tokenizer
from tests.models.handmade import adapted, build, loaded
from tests.weights.test_sources import write_run

DECODER = DecoderConfig(
    **{"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4},
    **{"num_kv_heads": 2, "max_position": 2048},
)
VISION = VisionConfig(
    **{"hidden_size": 24, "intermediate_size": 48, "num_layers": 3, "num_heads": 2, "image_size": 16, "patch_size": 4},
    **{"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"},
)
AUDIO = AudioConfig(
    **{"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_mels": 8, "window": "fixed"}
)
WHOLE = ModelConfig(
    decoder=DECODER,
    vision=VISION,
    audio=AUDIO,
    vision_projector=ProjectorConfig(),
    audio_projector=ProjectorConfig(downsample=4),
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
ULTRAVOX = ProjectorConfig(
    **{"type": "swiglu", "bias": False, "feature_norm": "rms", "hidden_norm": "rms", "downsample": 4}
)
MARKERS = {"audio": ["<|start_header_id|>", "<|end_header_id|>"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("gguf") / "tokenizer", [*CONTROL, "<pad>"], pad_token="<pad>")
    return DataConfig(train="x", tokenizer=str(folder), template="chatml", seq_length=1024, markers=MARKERS)


def tensors_of(path):
    """Name -> (type, value of torch's shape) of a file."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = tensor.tensor_type.name, torch.from_numpy(np.array(value)).view(shape)
    return found


def keys_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_names_shapes_and_values_are_those_that_llama_cpp_reads(tmp_path, data):
    model = build(WHOLE)
    export(WHOLE, model.state_dict(), tmp_path / "out", "gguf", data=data, type="f32")
    ours = model.state_dict()
    held, towers = tensors_of(tmp_path / "out" / "model.gguf"), tensors_of(tmp_path / "out" / "mmproj.gguf")
    assert {kind for kind, _ in [*held.values(), *towers.values()]} == {"F32"}
    assert held.keys() >= {"token_embd.weight", "output_norm.weight", "output.weight", "blk.1.ffn_gate.weight"}
    # The two dimensions that turn together stand half a head apart here, and are neighbours there.
    of_heads = ours["decoder.blocks.1.attention.k.weight"].view(2, 16, 64)
    pairs = torch.stack([of_heads[:, :8], of_heads[:, 8:]], 2).reshape(32, 64)
    assert held["blk.1.attn_k.weight"][1].equal(pairs)
    assert held["blk.0.attn_v.weight"][1].equal(ours["decoder.blocks.0.attention.v.weight"])
    assert towers["v.patch_embd.weight"][1].equal(ours["vision.patch.weight"].view(24, 3, 4, 4))
    assert towers["v.blk.1.attn_out.bias"][1].equal(ours["vision.blocks.1.attention.o.bias"])
    assert "v.blk.2.ln1.weight" not in towers  # the layer above the features
    assert towers["mm.2.weight"][1].equal(ours["vision_projector.down.weight"])
    assert towers["a.conv1d.2.bias"][1].equal(ours["audio.conv2.bias"][:, None])
    assert towers["a.position_embd.weight"][1].equal(sinusoids(torch.arange(1500), 32))
    assert towers["mm.a.norm_pre.weight"][1].equal(ours["audio.norm.weight"]) and "a.post_ln.weight" not in towers
    tokenizer = Tokenizer(data.tokenizer)
    for name, marker in zip(["v.boi", "v.eoi"], MARKERS["audio"]):
        assert towers[name][1].equal(ours["decoder.embedding.weight"][tokenizer.find(marker)])
    keys, of_towers = keys_of(tmp_path / "out" / "model.gguf"), keys_of(tmp_path / "out" / "mmproj.gguf")
    assert keys["general.architecture"] == "llama" and keys["llama.attention.head_count_kv"] == 2
    assert [held["general.type"] for held in (keys, of_towers)] == ["model", "mmproj"]
    assert of_towers["clip.vision.projector_type"] == "mlp" and of_towers["clip.audio.projector_type"] == "glma"
    assert of_towers["clip.vision.feature_layer"] == [2] and of_towers["clip.vision.block_count"] == 2
    assert of_towers["clip.use_gelu"] and of_towers["clip.audio.projector.stack_factor"] == 4


@pytest.mark.parametrize(
    "changes, architecture",
    [
        ({"tie_embedding": True, "head_dim": 32}, "llama"),
        ({"rope_scaling": LLAMA3}, "llama"),
        ({"yarn": YarnScaling(factor=4.0, original_max_position=64), "query_growth": 0.1}, "mistral3"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_decoder_is_one_of_llama_cpps_and_reads_back_exactly(changes, architecture, tmp_path, data):
    config = ModelConfig(decoder=dataclasses.replace(DECODER, **changes))
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "gguf", data=data, type="f32")
    keys = keys_of(tmp_path / "out" / "model.gguf")
    assert keys["general.architecture"] == architecture and not (tmp_path / "out" / "mmproj.gguf").exists()
    if config.decoder.rope_scaling:
        factors = tensors_of(tmp_path / "out" / "model.gguf")["rope_freqs.weight"][1]
        assert factors[0] == 1 and factors[-1] == 8
    if config.decoder.yarn:  # llama.cpp multiplies it by 1 + ln(4) / 10
        assert keys["mistral3.rope.scaling.attn_factor"] == pytest.approx(1 / (1 + np.log(4) / 10))
    again = loaded(config, all=tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.parametrize("projector", [ProjectorConfig(downsample=4, bias=False), ULTRAVOX], ids=["glma", "ultravox"])
def test_towers_read_back_exactly(projector, tmp_path, data):
    config = dataclasses.replace(WHOLE, audio_projector=projector)
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "gguf", data=data, type="f32")
    again = loaded(config, all=tmp_path / "out")
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters()))
    towers = tensors_of(tmp_path / "out" / "mmproj.gguf")
    if projector is ULTRAVOX:  # llama.cpp gates by the second half
        assert towers["mm.a.mlp.1.weight"][1][64:].equal(model.audio_projector.gate.weight)
        assert "v.boi" not in towers and towers["a.post_ln.bias"][1].equal(model.audio.norm.bias)
    else:
        assert not towers["mm.a.mlp.1.bias"][1].any()  # llama.cpp asks for one


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_a_stored_type_reads_back_as_the_library_reads_it(kind, tmp_path, data):
    decoder = dataclasses.replace(DECODER, intermediate_size=80)  # no multiple of a block of 32
    config = dataclasses.replace(WHOLE, decoder=decoder)
    model = build(config)
    export(config, model.state_dict(), tmp_path / "out", "gguf", data=data, type=kind)
    held, towers = tensors_of(tmp_path / "out" / "model.gguf"), tensors_of(tmp_path / "out" / "mmproj.gguf")
    types = {name: found for name, (found, _) in {**held, **towers}.items()}
    matrix, of_towers = kind.upper(), "BF16" if kind == "bf16" else "F16"
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == matrix
    assert types["blk.0.ffn_down.weight"] == (matrix if kind == "bf16" else "F16")  # rows of 80
    assert types["mm.0.weight"] == types["a.blk.0.attn_q.weight"] == of_towers and types["v.patch_embd.weight"] == "F16"
    assert {types[name] for name in ("output_norm.weight", "v.position_embd.weight", "a.conv1d.1.bias")} == {"F32"}
    again = loaded(config, all=tmp_path / "out").state_dict()
    assert again["decoder.blocks.0.ffn.up.weight"].equal(held["blk.0.ffn_up.weight"][1])
    assert again["vision.patch.weight"].equal(towers["v.patch_embd.weight"][1].flatten(1))
    off = (again["decoder.embedding.weight"] - model.decoder.embedding.weight).abs().max()
    assert 0 < off < 0.2 * model.decoder.embedding.weight.abs().max()


def test_an_export_answers_when_it_is_loaded_and_its_adapters_are_merged(tmp_path, data):
    export(WHOLE, build(WHOLE).state_dict(), tmp_path / "base", data=data)
    model = adapted(WHOLE, tmp_path / "base", ["decoder.*.q", "decoder.*.down"])
    export(model.config, model.state_dict(), tmp_path / "out", "gguf", data=data, type="f32")
    opened = avlm.load(str(tmp_path / "out"), device="cpu", dtype="float32")
    assert opened.network.config.lora is None
    base = build(WHOLE).decoder.blocks[0].attention.q.weight
    assert not opened.network.decoder.blocks[0].attention.q.weight.equal(base)
    assert isinstance(opened.answer("hello", max_new_tokens=3), str)


EXPERTS = ExpertsConfig(num=4, per_token=2, intermediate_size=16)
REFUSED = [
    ("decoder", {"sliding_window": 64}, "decoder.sliding_window=64: it attends to all tokens"),
    ("decoder", {"qk_norm": True, "rope_scaling": LLAMA3}, "decoder.rope_scaling"),
    ("decoder", {"norm_offset": True}, "decoder.norm_offset=True: the export writes Llama's"),
    ("decoder", {"experts": EXPERTS}, "cannot hold decoder.experts: our files for llama.cpp hold no experts"),
    ("decoder", {"rope_stretch": 2.0}, "decoder.rope_stretch=2.0"),
    ("decoder", {"bidirectional": "images"}, "decoder.bidirectional=images"),
    ("vision", {"class_token": True}, "vision.class_token=True: llama.cpp puts the class token behind the patches"),
    ("vision", {"resample": "bilinear"}, "vision.resample"),
    ("vision", {"layer_scale": True}, "vision.layer_scale"),
    ("vision", {"intermediate_size": 24}, "vision.intermediate_size=24: llama.cpp tells the two linears"),
    ("vision", {"resize": "area", "image_size": None}, "vision.resize=area: its mlp projector takes squares"),
    ("audio", {"window": "true"}, "audio.window=true: it encodes 30 s always"),
    ("audio", {"max_positions": 100}, "audio.max_positions=100"),
    ("audio", {"key_bias": True}, "audio.key_bias"),
    ("vision_projector", {"downsample": 2}, "vision_projector.downsample=2: llama.cpp computes 1 here"),
    ("vision_projector", {"type": "linear"}, "vision_projector.type=linear"),
    ("vision_projector", {"bias": False}, "vision_projector.bias"),
    ("audio_projector", {"norm": "layer"}, "audio_projector.norm=layer"),
    ("audio_projector", {"type": "swiglu"}, "audio_projector.bias=True: llama.cpp computes False here"),
    ("audio_projector", {"downsample": 8}, "audio_projector.downsample=8: llama.cpp cannot stack the 1500 rows"),
    ("audio_projector", {"downsample": 6}, "audio_projector.downsample=6: llama.cpp cannot stack the 1500 rows"),
]


@pytest.mark.parametrize("module, changes, message", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_llama_cpp_does_not_compute_is_refused_by_name(module, changes, message, tmp_path, data):
    config = dataclasses.replace(WHOLE, **{module: dataclasses.replace(getattr(WHOLE, module), **changes)})
    with pytest.raises(ValueError) as error:
        export(config, build(config).state_dict(), tmp_path / "out", "gguf", data=data)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_prompts_that_llama_cpp_does_not_make_are_refused(tmp_path, data):
    state = build(WHOLE).state_dict()
    wrong = {
        "train with markers of one control token each": {"markers": {}},
        "'<s></s>', which is 2 tokens": {"markers": {"audio": ["<s></s>", "<s>"]}},
        "data.image_layout": {"image_layout": ImageLayout(whole_markers=["<s>", "</s>"])},
        "data.tokenizer": {"tokenizer": ""},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError) as error:
            export(WHOLE, state, tmp_path / "out", "gguf", data=dataclasses.replace(data, **changes))
        assert message in str(error.value)


def test_the_tokenizer_is_written_with_its_types_ends_and_template(tmp_path, data):
    tokenizer = Tokenizer(data.tokenizer)
    keys = tokenizer_keys(tokenizer, data, 400, "TEMPLATE")
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert [tokens[tokenizer.find(token)] for token in CONTROL] == CONTROL and len(tokens) == len(types) == 400
    assert types[tokenizer.find("<s>")] == 3 and types[tokenizer.find("a")] == 1 and types[399] == 5
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.id_of("</s>")
    assert keys["tokenizer.ggml.eot_token_id"] == tokenizer.id_of("<|im_end|>")  # of chatml's turns
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.chat_template"] == "TEMPLATE"
    without = dataclasses.replace(data, tokenizer=str(write_tokenizer(tmp_path / "without", bos_token=None)))
    config = ModelConfig(decoder=DECODER)
    export(config, build(config).state_dict(), tmp_path / "out", "gguf", data=without)
    template = keys_of(tmp_path / "out" / "model.gguf")["tokenizer.chat_template"]
    assert template.startswith("{%- set bos_token = '' -%}")  # llama.cpp would write the text of token 11


def split(words):
    cut = pre_tokenizers.Split(Regex(words), "isolated", False)
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def rewritten(folder, source, change):
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer.from_file(f"{source}/tokenizer.json")
    change(tokenizer)
    tree = json.loads(tokenizer.to_str())
    if tokenizer.pre_tokenizer and "Split" in repr(tokenizer.pre_tokenizer):
        tree["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder)


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(tmp_path, data):
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    known = {
        "llama-bpe": lambda each: setattr(each, "pre_tokenizer", split(LLAMA3_WORDS)),
        "smollm": lambda each: setattr(each, "pre_tokenizer", pre_tokenizers.Sequence(digits)),
    }
    for name, change in known.items():
        tokenizer = rewritten(tmp_path / name, data.tokenizer, change)
        assert pre_tokenizer(json.loads(tokenizer.file.read_text())) == name
        assert tokenizer_keys(tokenizer, data, 400, "")["tokenizer.ggml.pre"] == name
    unknown = {
        "the pre_tokenizer": lambda each: setattr(each, "pre_tokenizer", split(r"\p{N}{1,2}|\s+")),
        "the normalizer Lowercase": lambda each: setattr(each, "normalizer", normalizers.Lowercase()),
        "with rstrip": lambda each: each.add_special_tokens([tokenizers.AddedToken("<x>", rstrip=True)]),
    }
    for i, (message, change) in enumerate(unknown.items()):
        with pytest.raises(ValueError, match=message):
            tokenizer_keys(rewritten(tmp_path / str(i), data.tokenizer, change), data, 400, "")


def test_a_sentencepiece_vocabulary_gets_scores_that_merge_in_its_order(tmp_path, data):
    tree = json.loads((Tokenizer(data.tokenizer).file).read_text())
    words = ["<unk>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    tree["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "vocab": {word: i for i, word in enumerate(words)}}
    tree["model"]["merges"] = [["a", "b"], ["▁", "ab"]]
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tree["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
    tree |= {"pre_tokenizer": None, "decoder": None}
    control = ["</s>", "<|im_start|>", "<|im_end|>"]
    flags = tree["added_tokens"][0]
    tree["added_tokens"] = [{**flags, "id": 7 + i, "content": token} for i, token in enumerate(control)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    keys = tokenizer_keys(Tokenizer(tmp_path), data, 12, "")
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"]
    scores, types = keys["tokenizer.ggml.scores"], keys["tokenizer.ggml.token_type"]
    assert scores[words.index("ab")] > scores[words.index("▁ab")] > scores[words.index("a")]
    assert types == [2, 6, 1, 1, 1, 1, 1, 3, 3, 3, 5, 5]


def test_the_command_writes_a_run_and_names_its_types(tmp_path, data, monkeypatch, capsys):
    lora, decoder = LoraConfig(rank=2, targets=["decoder.*.q"]), dataclasses.replace(DECODER, intermediate_size=80)
    config = dataclasses.replace(WHOLE, lora=lora, decoder=decoder)
    write_run(tmp_path / "run", build(config), data=data)
    monkeypatch.setattr("avlm.weights.__main__.run", export_run)
    arguments = ["avlm.weights", "export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "gguf"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--type", "q8_0"])
    main()
    said = capsys.readouterr().out
    assert "Q8_0" in said and "no multiple of q8_0's blocks: blk.*.ffn_down.weight\n" in said
    assert f"-m {tmp_path / 'out'}/model.gguf --mmproj {tmp_path / 'out'}/mmproj.gguf" in said
    for wrong in (["--dtype", "float16"], ["--format", "avlm", "--type", "q8_0"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *wrong])
        with pytest.raises(ValueError, match="--type"):
            main()


def test_files_that_are_damaged_or_not_ours_are_told(tmp_path, data):
    folder = tmp_path / "out"
    config = ModelConfig(decoder=DECODER)
    export(config, build(config).state_dict(), folder, "gguf", data=data)
    content = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.gguf cannot be read"):
        loaded(config, all=folder)
    (folder / "model.gguf").write_bytes(content)
    theirs = {"model_type": "llama", "vocab_size": 400, "hidden_size": 64, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="GGUF files that we did not write"):
        loaded(config, decoder=folder)
