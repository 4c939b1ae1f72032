"""Exports with a tokenizer: transformers' own processors make the prompts, and the answers are ours token for token."""

import dataclasses
import json

import jinja2
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.data.media import audio
from avlm.data.packing import pack
from avlm.data.sample import SampleEncoder
from avlm.data.text.chat import Chat
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.generation import generate
from avlm.families.llama import QWEN2_WORDS
from avlm.models.batch import AUDIO, IMAGE
from avlm.storage import model_folder
from avlm.weights.export import export
from avlm.weights.folder import model_and_data, read_config, stop_ids
from tests.data.small_files import CONTROL, CORPUS, image_file, photo, tone, write_tokenizer
from tests.models.handmade import build
from tests.models.test_avlm import VISION_ONLY
from tests.weights.test_export import VOXTRAL

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIGLIP = {"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh", "resize": "stretch"}
LLAVA = dataclasses.replace(
    VISION_ONLY, vision_projector=dataclasses.replace(VISION_ONLY.vision_projector, downsample=1)
)


def exported(config, folder, format, template="llava", control=CONTROL, system=None, **keys):
    """(model of random weights, its prompt encoder) of an export in ``folder``."""
    keys = {"eos_token": "</s>", "chat_template": CHATML, **keys}
    source = write_tokenizer(folder.with_name("tokenizer"), control, **keys)
    tokenizer = Tokenizer(source)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=tokenizer.size))
    data = DataConfig(train="x", tokenizer=str(source), template=template, system=system)
    model = build(config)
    export(config, model.state_dict(), folder, format, data=data)
    return model, SampleEncoder(config, data, tokenizer)


def assert_answers_alike(model, prompt, theirs, media_token, folder, **inputs):
    """The same ids go in; the same logits, and the same ids with the same probabilities come out."""
    ids = [media_token if token in (IMAGE, AUDIO) else token for token in prompt.token_T.tolist()]
    assert inputs["input_ids"].tolist() == [ids]
    batch = pack([prompt], len(prompt), model.config)
    with torch.no_grad():
        x_TD = model.hidden(batch)
        ours = model.decoder.head(model.decoder.norm(x_TD), None)
        expected = theirs(**inputs).logits[0, :, : ours.shape[1]]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    [answer] = generate(model, [prompt], stop_ids=stop_ids(folder), max_new_tokens=16)
    settings = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True, "output_logits": True}
    out = theirs.generate(**inputs, **settings)
    assert answer.token_ids == out.sequences[0, len(ids) :].tolist()
    logits = torch.stack(out.logits, 1)[0, :, : ours.shape[1]]  # without the media token's own row
    logprobs = logits.log_softmax(-1).gather(-1, out.sequences[0, len(ids) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("system", [None, 'Say "é" 👋 and\nTURN.'])
@pytest.mark.parametrize("template", ["llama3", "chatml", "llava", "mistral", "smolvlm", "plain", "tokenizer"])
def test_an_exported_chat_template_gives_the_ids_and_targets_of_training(template, system, tmp_path):
    out = tmp_path / "out"
    control = [*CONTROL, "<end_of_utterance>"]
    _, encoder = exported(LLAVA, out, "decoder", template, control, system=system)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    talk = [
        ("user", "<image> one\n" if template == "smolvlm" else " one <image>\n"),
        ("assistant", " two "),
        ("user", "three"),
        ("assistant", "four"),
    ]
    talk = [{"role": role, "content": content} for role, content in talk]
    for messages in (talk, [{"role": "system", "content": " hello "}, *talk]):
        for prompt in (False, True):
            messages = messages[:-1] if prompt else messages
            pieces = list(encoder.chat.encode(encoder.chat.pieces(messages, prompt=prompt)))
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert text == "".join(piece.text for piece, _ in pieces)
            before, after = text.split("<image>")  # theirs would read the tag as text, or as one token
            ids = [theirs(part, add_special_tokens=False).input_ids for part in (before, after)]
            assert ids[0] + ids[1] == [token for _, piece_ids in pieces for token in piece_ids]
    assert model_and_data(out)[1].template == "tokenizer"  # what generate.py takes
    again = Chat(Tokenizer(out), "tokenizer")
    learned = lambda chat: "".join(piece.text for piece in chat.pieces(talk) if piece.learned)
    assert learned(again) == learned(encoder.chat)


def test_parts_of_a_type_that_the_format_does_not_hold_are_refused(tmp_path):
    for format, held in (("llava", ["image"]), ("decoder", []), ("avlm", ["image", "audio", "video"])):
        exported(LLAVA, tmp_path / format, format)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / format)
        for kind in ("image", "audio", "video", "image_url"):
            part = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": "what?"}]}
            if kind in held:
                text = tokenizer.apply_chat_template([part], tokenize=False)
                assert text == f"<s>USER: <{kind}>\nwhat? "
            else:
                with pytest.raises(jinja2.TemplateError, match=f"this template knows no part of type {kind}"):
                    tokenizer.apply_chat_template([part], tokenize=False)


@pytest.mark.parametrize(
    ("family", "template"), [("clip", "llava"), ("clip", "llama3"), ("clip", "tokenizer"), ("siglip", "llava")]
)
@pytest.mark.parametrize("known", [False, True])
def test_a_llava_export_answers_prompts_of_its_processor_as_we_do(family, template, known, tmp_path):
    config, out = LLAVA, tmp_path / "out"
    if family == "siglip":
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, **SIGLIP))
    control = ["<image>", *CONTROL] if known else CONTROL
    model, encoder = exported(config, out, "llava", template, control)
    assert model_and_data(out)[1].template == "tokenizer"  # what generate.py takes
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(out)
    processor = transformers.AutoProcessor.from_pretrained(out)
    image_token = theirs.config.image_token_index
    assert (image_token < encoder.tokenizer.size) == known and processor.image_token_id == image_token
    pictures, question = [photo(40, 30), photo(16, 48, seed=1)], "what is this picture of?"
    messages = [{"role": "user", "content": f"<image><image>\n{question}"}]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]
    if template == "tokenizer":  # the processor has no template of its own then, and the tokenizer's wants a text
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        for_theirs = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(for_theirs, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=pictures, return_tensors="pt")
    prompt = encoder.prompt(messages, [image_file(each) for each in pictures])
    assert (prompt.token_T == IMAGE).sum() == 2 * 16
    assert_answers_alike(model, prompt, theirs, image_token, out, **inputs)


@pytest.mark.parametrize("known", [False, True])
def test_a_voxtral_export_answers_prompts_of_its_tokenizer_as_we_do(known, tmp_path):
    """VoxtralProcessor reads Mistral's own tokenizers only, so the windows' tokens are written out here."""
    out = tmp_path / "out"
    control = ["[AUDIO]", *CONTROL] if known else CONTROL
    model, encoder = exported(VOXTRAL, out, "voxtral", control=control)
    theirs = transformers.VoxtralForConditionalGeneration.from_pretrained(out)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    audio_token = theirs.config.audio_token_id
    assert (audio_token < encoder.tokenizer.size) == known
    assert tokenizer.convert_tokens_to_ids("[AUDIO]") == audio_token and "[AUDIO]" in tokenizer.get_added_vocab()
    clips = [tone(0.7), tone(2.0, frequency=880.0)]
    waves = [audio.decode(clip, 30.0).numpy() for clip in clips]
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(out)
    features = extractor(waves, sampling_rate=16_000, return_tensors="pt").input_features
    messages = [{"role": "user", "content": "one <audio> two <audio> which?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text.replace("[AUDIO]", "[AUDIO]" * 25), return_tensors="pt").input_ids
    prompt = encoder.prompt(messages, audios=clips)
    assert_answers_alike(model, prompt, theirs, audio_token, out, input_ids=ids, input_features=features)


def test_a_tokenizer_class_that_reads_its_config_alone_knows_the_media_token(tmp_path):
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = Tokenizer(write_tokenizer(tmp_path / "first")).size - len(CONTROL)
    listed = {str(first + i): {"content": word, **entry} for i, word in enumerate(CONTROL)}
    exported(LLAVA, tmp_path / "out", "llava", added_tokens_decoder=listed)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tmp_path / "out")
    image_token = json.loads((tmp_path / "out" / "config.json").read_text())["image_token_index"]
    assert tokenizer.encode("<s><image>") == [first + CONTROL.index("<s>"), image_token]
    assert read_config(tmp_path / "out").decoder.vocab_size == image_token + 1


def llama2():
    """Blanks are part of tokens, what is no token is its bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.train_from_iterator(CORPUS * 5, trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tree = json.loads(made.to_str())
    return tree | {"added_tokens": tree["added_tokens"][:3]}


def byte_level(regex=None, normalizer=None, more=()):
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if regex:
        split = pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 5, trainer)
    made.add_special_tokens([*CONTROL, "<unk>", *more])
    return json.loads(made.to_str())


def unigram():
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS * 5, trainer)
    return json.loads(made.to_str())


def word_piece():
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=False)
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(CORPUS * 5, trainer)
    return json.loads(made.to_str())


TOKENIZERS = {
    "Llama 2": llama2,
    "GPT-2": byte_level,
    "Qwen2": lambda: byte_level(QWEN2_WORDS, normalizers.NFC(), ["<|endoftext|>"]),
    "Qwen2 without its pad": lambda: byte_level(QWEN2_WORDS, normalizers.NFC()),
    "digits in threes": lambda: byte_level(r"\p{N}{1,3}|[^\p{N}]+"),
    "Unigram": unigram,
    "WordPiece": word_piece,
}
CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast", None)
TEXTS = [
    *(
        "hello world",
        "  two  blanks ",
        "a\n\nb\r\n\tc \n",
        "",
        " ",
        "über Größe",
        "e\u0301te",
        "你好\uff0c世界",
        "👋🏽 hi",
        "12345 67",
    ),
    *(
        "<s>hello</s> world",
        "a <s> b</s>",
        "<unk>",
        "a<|endoftext|>",
        "USER: what is this? ASSISTANT: one</s>USER: two",
        "\u00a0x\u200b",
    ),
]
KINDS = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}  # transformers' type of the decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", TOKENIZERS)
def test_an_exported_tokenizer_gives_the_trained_ids_whatever_class_its_folder_names(made, kind, tmp_path):
    tree = TOKENIZERS[made]()
    decoder = dataclasses.replace(LLAVA.decoder, vocab_size=400, **KINDS[kind])
    config = ModelConfig(decoder=decoder)
    state = build(config).state_dict()
    for name in CLASSES:
        source, out = tmp_path / f"{name}", tmp_path / f"{name}_out"
        source.mkdir()
        (source / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False))
        keys = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_prefix_space": True}
        keys |= {"tokenizer_class": name, "legacy": False, "auto_map": {"AutoTokenizer": [None, None]}} if name else {}
        listed = {str(each.pop("id")): each for each in json.loads(json.dumps(tree["added_tokens"]))}
        keys |= {"added_tokens_decoder": listed} if name == "Qwen2Tokenizer" else {}
        if name == "GPT2Tokenizer":
            (source / "special_tokens_map.json").write_text(json.dumps(keys | {"pad_token": {"content": "</s>"}}))
        (source / "tokenizer_config.json").write_text(json.dumps(keys))
        export(config, state, out, "decoder", data=DataConfig(train="x", tokenizer=str(source), template="plain"))
        ours, theirs = Tokenizer(source), transformers.AutoTokenizer.from_pretrained(out)
        found = [theirs(text, add_special_tokens=False).input_ids for text in TEXTS]
        assert found == [ours.encode(text, control=True) for text in TEXTS], name
        assert ours.names.items() <= theirs.special_tokens_map.items() and Tokenizer(out).names == ours.names


def test_an_exported_generation_prompt_holds_the_block_that_stood_before_answers(tmp_path):
    block = "<think>\n\n</think>\n\n"
    template = CHATML.replace(
        "\n{{ m.content }}", "\n{% if m.role == 'assistant' and loop.last %}BLOCK{% endif %}{{ m.content }}"
    )
    template = template.replace("BLOCK", block.replace("\n", "{{ '\\n' }}")) + "\n"
    _, encoder = exported(LLAVA, tmp_path / "out", "decoder", "tokenizer", chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    for messages in (talk[:1], [*talk, *talk[:1]]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "".join(piece.text for piece in encoder.chat.pieces(messages, prompt=True))
        assert text.endswith("assistant\n" + block)
        again = Chat(Tokenizer(tmp_path / "out"), "tokenizer")
        assert text == "".join(piece.text for piece in again.pieces(messages, prompt=True))
    assert [piece.text for piece in again.pieces(talk) if piece.learned] == ["two<|im_end|>"]
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert encoder.tokenizer.id_of("<|im_end|>") in stops


def test_a_tokenizer_may_be_larger_than_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder.read_json, "__defaults__", (5_000,))  # a tokenizer.json has 10,000 here
    exported(LLAVA, tmp_path / "folder", "llava")
    assert (tmp_path / "folder" / "tokenizer.json").stat().st_size > 5_000
