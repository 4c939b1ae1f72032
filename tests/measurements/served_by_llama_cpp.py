"""Our models in llama.cpp: logits, features, tokens and answers, compared with ours.

    python -m tests.measurements.served_by_llama_cpp [RUN] [--answers N]

needs gguf 0.19.0 and llama-cpp-python 0.3.36, which is built from source in some minutes. RUN is a run whose model
llama.cpp computes; without one a variant of the demo is trained in runs/served, 10 minutes on 2 cores. Answers are to
held-out photos and digit strings of data/demo, which `make demo` builds. All other models have random weights.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import yaml
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

import avlm
from avlm.config.decoder import DecoderConfig, RopeScaling, YarnScaling
from avlm.config.model import AudioConfig, ModelConfig, ProjectorConfig, VisionConfig
from avlm.config.run import DataConfig, InitFrom
from avlm.data.packing import pack
from avlm.data.sample import EncodedSample, Sample, SampleEncoder
from avlm.data.text.tokenizer import Tokenizer
from avlm.evaluation.answering import Model
from avlm.evaluation.engines import next_logprobs
from avlm.evaluation.llama_cpp_engine import Engine, library
from avlm.evaluation.sets import read_set, references
from avlm.families.gguf import TYPES
from avlm.models.avlm import AVLM
from avlm.storage.run_folder import read_run
from avlm.weights.export import export
from avlm.weights.gguf_tokenizer import WORDS
from avlm.weights.load import load_weights
from avlm.weights.sources import open_checkpoint
from tests.data.small_files import image_file, photo
from tests.models.handmade import build, make_batch

F32 = 0  # ggml's number of the type
TOKENS, CONTEXT = 200, 256
DECODER = DecoderConfig(
    **{"vocab_size": 640, "hidden_size": 128, "intermediate_size": 256, "num_layers": 3, "num_heads": 4},
    **{"num_kv_heads": 2, "max_position": 2048},
)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
YARN = YarnScaling(factor=4.0, original_max_position=32)
DECODERS = {
    "Llama": {},
    "Llama 3.1, tied": {"rope_scaling": LLAMA3, "tie_embedding": True},
    "Ministral 3": {"yarn": YARN, "query_growth": 0.1},
    "Qwen2": {"qkv_bias": True},
    "Qwen2, YaRN": {"qkv_bias": True, "yarn": dataclasses.replace(YARN, attention_factor=1.14)},
    "Qwen3": {"qk_norm": True},
}
VISION = VisionConfig(
    **{"hidden_size": 96, "intermediate_size": 192, "num_layers": 4, "num_heads": 3, "image_size": 56},
    **{"patch_size": 14, "class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"},
    **{"resize": "stretch", "norm_eps": 1e-6},
)
AUDIO = AudioConfig(hidden_size=128, intermediate_size=256, num_layers=3, num_heads=4, window="fixed")
ULTRAVOX = ProjectorConfig(type="swiglu", bias=False, feature_norm="rms", hidden_norm="rms", downsample=4)
MARKERS = {"audio": ["<|im_start|>", "<|im_end|>"]}
DEMO = Path("data/demo")
VARIANT = {  # of configs/demo.yaml: what llama.cpp computes
    "model.vision": {"class_token": False, "pre_norm": False, "patch_bias": True, "activation": "gelu_tanh"},
    "model.vision_projector": {"downsample": 1},
    "model.audio": {"hidden_size": 96, "num_heads": 3, "num_layers": 2, "max_positions": 1500, "window": "fixed"},
    "model.audio_projector": {"downsample": 12},
}
STAGES = {"language": 120, "vision_alignment": 150, "audio_alignment": 200, "finetune": 250}
NEW_TOKENS = 24
SETS = {"caption/test": "images", "transcribe/test_synthetic": "audio"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measurements.served_by_llama_cpp")
    parser.add_argument("run", nargs="?", help="a run (default: train a variant of the demo in runs/served)")
    parser.add_argument("--answers", type=int, default=20, help="samples of each set that all types answer")
    arguments = parser.parse_args()
    library()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        decoders(Path(folder))
        towers(Path(folder))
        texts(Path(folder))
        answers(Path(arguments.run or trained()), Path(folder), arguments.answers)


def decoders(folder: Path) -> None:
    """Logits of 200 tokens. As it comes, llama.cpp has a float16 cache and flash attention. Its own error is what its
    logits in a type differ from those that it has in f32."""
    head = (
        "standard deviation of logits | max error | mean error | as it comes: max error | its own max error, mean error"
    )
    print(f"\n| decoder, type | {head} |\n|---|---|---|---|---|---|")
    cases = [(name, "f32") for name in DECODERS] + [("Llama", kind) for kind in TYPES[1:]]
    read_back, in_f32 = [], torch.empty(0)
    for i, (name, kind) in enumerate(cases):
        config = ModelConfig(decoder=dataclasses.replace(DECODER, **DECODERS[name]))
        model = build(config)
        out = folder / f"decoder{i}"
        export(config, model.state_dict(), out, "gguf", data=prompts(), type=kind)
        ids = torch.randint(473, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
        ours, exact, default = logits(model, ids), logits_of(out, ids, exact=True), logits_of(out, ids, exact=False)
        if (name, kind) == ("Llama", "f32"):
            in_f32 = exact
        own = _errors(in_f32, exact).replace(" |", ",") if kind != "f32" else ""
        print(f"| {name}, {kind} | {ours.std():.2f} | {_errors(ours, exact)} | {_most(ours, default)} | {own} |")
        if name == "Llama":
            again = AVLM(config)
            load_weights(again, InitFrom(all=str(out)))
            read_back.append(f"{kind} {_most(logits(again, ids), exact)}")
    print(f"\nours on the weights of the file against llama.cpp, Llama, max error: {', '.join(read_back)}")


def logits(model: AVLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.decoder.head(model.decoder.norm(model.hidden(make_batch(model.config, [ids]))), None)


def logits_of(folder: Path, ids: list[int], exact: bool) -> Tensor:
    """llama.cpp's, float32 (T, V). ``exact``: all that it can compute in float32 is."""
    llama, _ = library()
    model = llama.llama_model_load_from_file(f"{folder}/model.gguf".encode(), llama.llama_model_default_params())
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
    if exact:
        options.flash_attn_type, options.type_k, options.type_v = 0, F32, F32
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(ids), size)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.from_numpy(found)


def _errors(ours: Tensor, theirs: Tensor) -> str:
    off = (ours - theirs).abs()
    return f"{off.max():.1e} | {off.mean():.1e}"


def _most(ours: Tensor, theirs: Tensor) -> str:
    return f"{(ours - theirs).abs().max():.1e}"


def prompts() -> DataConfig:
    return DataConfig(train="x", template="chatml", tokenizer=str(DEMO / "tokenizer"), markers=MARKERS)


def towers(folder: Path) -> None:
    """Projected features of one medium."""
    square, wide = image_file(photo(112, 112)), image_file(photo(112, 84))
    erf = dataclasses.replace(VISION, activation="gelu")
    cases = [("SigLIP and mlp, a square image", VISION, None, square, kind) for kind in ("f32", "f16")]
    cases += [("SigLIP with exact GELU, a square image", erf, None, square, "f32")]
    cases += [("SigLIP and mlp, 4:3 (llama.cpp pads it, here it is stretched)", VISION, None, wide, "f32")]
    stacked, clip = ProjectorConfig(downsample=4), dataclasses.replace(AUDIO, log_mel="clip")
    cases += [("Whisper and mlp (glma), 3 s", AUDIO, stacked, sweep(3), kind) for kind in ("f32", "f16")]
    cases += [("Whisper, norms and gate (ultravox), 3 s", AUDIO, ULTRAVOX, sweep(3), "f32")]
    cases += [("glma, 3 s at a thousandth of the loudness", AUDIO, stacked, sweep(3, 3e-4), "f32")]
    cases += [("glma, 30 s (llama.cpp encodes a second, silent window)", AUDIO, stacked, sweep(30), "f32")]
    cases += [("glma, 40 s, log_mel=window (llama.cpp: clip)", AUDIO, stacked, sweep(40), "f32")]
    cases += [("glma, 40 s, log_mel=clip", clip, stacked, sweep(40), "f32")]
    print("\n| tower, medium, type | features | standard deviation | max error | mean error |\n|---|---|---|---|---|")
    for i, (name, tower, projector, file, kind) in enumerate(cases):
        if isinstance(tower, VisionConfig):
            config = ModelConfig(decoder=DECODER, vision=tower, vision_projector=ProjectorConfig())
        else:
            config = ModelConfig(decoder=DECODER, audio=tower, audio_projector=projector)
        model = build(config)
        out = folder / f"tower{i}"
        export(config, model.state_dict(), out, "gguf", data=prompts(), type=kind)
        ours, theirs = features(model, file), features_of(Engine(out, prompts(), config), file, config)
        count = f"{len(ours)}" if len(ours) == len(theirs) else f"{len(ours)}, llama.cpp {len(theirs)}"
        print(f"| {name}, {kind} | {count} | {ours.std():.2f} | {_errors(ours, theirs[: len(ours)])} |")


def sweep(seconds: int, loudness: float = 0.3) -> bytes:
    """A tone that rises, with a little noise, as a WAV file."""
    time = np.arange(16_000 * seconds) / 16_000
    noise = np.random.default_rng(1).standard_normal(len(time))
    samples = loudness * (np.sin(2 * np.pi * (200 + 300 * time / seconds) * time) + noise / 15)
    head = b"RIFF" + (36 + 2 * len(time)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    head += np.array([1, 1], "<u2").tobytes() + np.array([16_000, 32_000], "<u4").tobytes()
    head += np.array([2, 16], "<u2").tobytes() + b"data" + (2 * len(time)).to_bytes(4, "little")
    return head + (samples * 32767).clip(-32768, 32767).astype("<i2").tobytes()


def features(model: AVLM, file: bytes) -> Tensor:
    encoder = SampleEncoder(model.config, prompts(), Tokenizer(prompts().tokenizer))
    kind, tower = ("image", "vision") if model.config.vision else ("audio", "audio")
    prompt = encoder.prompt([{"role": "user", "content": f"<{kind}>"}], **{f"{kind}s": [file]})
    media = getattr(pack([prompt], len(prompt), model.config), kind)
    into_TD = torch.zeros(len(prompt), model.config.decoder.hidden_size)
    with torch.no_grad():
        found_TD, _ = getattr(model, f"{tower}_projector")(into_TD, media, getattr(model, tower)(media))
    return found_TD[media.rows]


def features_of(engine: Engine, file: bytes, config: ModelConfig) -> Tensor:
    """llama.cpp's, without the rows of markers."""
    mtmd = engine.mtmd
    chunks = mtmd.mtmd_input_chunks_init()
    engine.cut([file], chunks)
    found = []
    for i in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, i)
        assert mtmd.mtmd_encode_chunk(engine.projectors, chunk) == 0
        shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), config.decoder.hidden_size)
        rows_RD = torch.from_numpy(np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(engine.projectors), shape).copy())
        found.append(rows_RD[1:-1] if config.audio_projector and config.audio_projector.type != "swiglu" else rows_RD)
    mtmd.mtmd_input_chunks_free(chunks)
    return torch.cat(found)


LANGUAGES = [
    "Hello world, it's a test! 12345 67.8",
    "  two  blanks\n\n\nthree lines\t tab",
    "Größe, façade, naïve café — “quotes” … 100€",
    "Привет, мир! Как дела в 2024 году?",
    "你好，世界。今天天气怎么样？",  # noqa: RUF001
    "こんにちは世界、カタカナとひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก",
    "emoji 😀👩‍👩‍👧 🇩🇪 flags",
    "def f(x):\n    return x**2 + 3*x - 1  # comment",
    "I'M SHOUTING, DON'T YOU'LL we've",
    "<|im_end|> and <|im_start|>user in a text",
    "ﬁ ligature ½ ² Ⅷ",
    "x\r\ny\r\n\r\n",
    "trailing   ",
]
RANGES = [(32, 127), (0xA1, 0x180), (0x400, 0x450), (0x4E00, 0x4E40), (0x3040, 0x3060), (9, 11), (0x1F600, 0x1F610)]


def texts(folder: Path) -> None:
    """Ids of texts in many languages and of random characters, control tokens read and not. Texts are in the form NFC,
    into which the tokenizer of Qwen brings them, and llama.cpp does not."""
    characters = [chr(code) for first, end in RANGES for code in range(first, end)]
    draw = np.random.default_rng(0)
    mixed = ["".join(draw.choice(characters, draw.integers(1, 60))) for _ in range(400)]
    given = [normalizers.NFC().normalize_str(text) for text in [*LANGUAGES, *mixed]]
    kinds = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    for name, words in WORDS.items():
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        kinds[name] = [pre_tokenizers.Split(Regex(words), "isolated", False), byte_level]
    folders = {name: byte_level_tokenizer(folder / name, name, parts, given) for name, parts in kinds.items()}
    folders |= {"the BPE of SentencePiece": blanks_tokenizer(folder / "llama", given), "the demo's": DEMO / "tokenizer"}
    print("\n| tokenizer | texts | that differ |\n|---|---|---|")
    for name, source in folders.items():
        tokenizer, data = Tokenizer(source), DataConfig(train="x", template="chatml", tokenizer=str(source))
        decoder = dataclasses.replace(DECODER, vocab_size=tokenizer.size, num_layers=1)
        config = ModelConfig(decoder=decoder)
        out = folder / f"{name} out"
        export(config, build(config).state_dict(), out, "gguf", data=data)
        engine = Engine(out, data, config)
        pairs = [(text, control) for text in given for control in (False, True)]
        differ = sum(tokenizer.encode(text, control=control) != engine.tokens(text, control) for text, control in pairs)
        print(f"| {name} | {len(pairs)} | {differ} |")


def byte_level_tokenizer(folder: Path, name: str, parts, corpus: list[str]) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if isinstance(parts, list) else parts
    control, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 3000, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(corpus * 3, trainers.BpeTrainer(special_tokens=control, **options))
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    return _saved(tokenizer.to_str(), folder, "<|im_end|>")


def blanks_tokenizer(folder: Path, corpus: list[str]) -> Path:
    """Of the kind of Llama 2's: blanks are a letter, and unknown letters become bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    blank = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(blank)
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    known = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *of_bytes]
    words = [word for text in corpus for word in text.split(" ")]
    options = {"vocab_size": 1500, "special_tokens": known, "limit_alphabet": 300, "show_progress": False}
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(**options))
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in of_bytes]
    return _saved(json.dumps(tree), folder, "</s>")


def _saved(content: str, folder: Path, eos: str) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder


def trained() -> Path:
    """The variant of the demo, trained unless it has been."""
    run = Path("runs/served")
    if (run / "config.yaml").is_file():
        return run
    changes = [f"{module}.{key}={json.dumps(value)}" for module, keys in VARIANT.items() for key, value in keys.items()]
    changes += [f"stages.{stage}.steps={steps}" for stage, steps in STAGES.items()]
    blend = {f"{DEMO}/caption/train": 1.5, f"{DEMO}/transcribe/train": 3, f"{DEMO}/text/train": 0.5}
    changes += [f"data.markers={yaml.safe_dump(MARKERS, default_flow_style=True)}"]
    changes += [f"stages.finetune.data.train={yaml.safe_dump(blend, default_flow_style=True)}"]
    changes += [f"stages.audio_alignment.data.train={DEMO}/transcribe/train", f"output_dir={run}"]
    subprocess.run([sys.executable, "train.py", "configs/demo.yaml", *changes], check=True)
    return run


def answers(run: Path, folder: Path, count: int) -> None:
    """Answers to held-out samples: llama.cpp's, and ours of the weights in the same files. ``apart``: where answers
    part, the difference of our log probabilities of the two tokens, at most."""
    config, checkpoint = read_run(run, None)
    data = config.stages[-1].data
    state = open_checkpoint(checkpoint)
    samples = {name: read_set(f"{DEMO}/{name}", data, [], count) for name in SETS}
    print("\n| type | size of both files | equal answers | apart, nats | right answers, ours | right, llama.cpp's |")
    print("|---|---|---|---|---|---|")
    shown = []
    for kind in TYPES:
        out = folder / kind
        export(config.model, state, out, "gguf", data=data, type=kind)
        model, engine = avlm.load(str(out), device="cpu", dtype="float32"), Engine(out, data, config.model)
        equal, right, right_theirs, apart = [], [], [], [0.0]
        for name, found in samples.items():
            of_media = SETS[name]
            ours, theirs = [answered(model, sample) for sample in found], engine.answer(found, NEW_TOKENS)
            apart += [gap(model, sample, *pair) for sample, *pair in zip(found, ours, theirs)]
            texts = [[model.text(ids) for ids in given] for given in (ours, theirs)]
            equal.append(f"{sum(map(list.__eq__, ours, theirs))} of {len(found)} {of_media}")
            for cells, given in zip((right, right_theirs), texts):
                hits = sum(text.strip() in references(sample) for text, sample in zip(given, found))
                cells.append(f"{hits} {of_media}")
            if kind == "f16":
                truths = [references(sample)[0] for sample in found]
                shown += list(zip([of_media] * 5, truths, *texts))
        size = sum(path.stat().st_size for path in out.glob("*.gguf")) / 1e6
        cells = [f"{size:.1f} MB", ", ".join(equal), f"{max(apart):.3f}", ", ".join(right), ", ".join(right_theirs)]
        print(f"| {kind} | {' | '.join(cells)} |")
    print("\n| medium | reference | ours, f16 | llama.cpp, f16 |\n|---|---|---|---|")
    for row in shown:
        print(f"| {' | '.join(row)} |")


def asked(model: Model, sample: Sample) -> EncodedSample:
    return model.encoder.prompt(sample.messages[:-1], sample.images, sample.audios, sample.videos)


def answered(model: Model, sample: Sample) -> list[int]:
    """Ids without the one that ends the answer."""
    [completion] = model.complete([asked(model, sample)], max_new_tokens=NEW_TOKENS)
    return [token for token in completion.token_ids if token not in model.stop_ids]


def gap(model: Model, sample: Sample, ours: list[int], theirs: list[int]) -> float:
    """By how much the first token of ours that is not theirs is likelier to us, nats; 0 for equal answers. An answer
    ends in its stop token."""
    ends = [[*answer, model.stop_ids[0]] for answer in (ours, theirs)]
    place, mine, other = next(((i, *pair) for i, pair in enumerate(zip(*ends)) if len({*pair}) > 1), (0, 0, 0))
    logprobs_V = next_logprobs(model.network, asked(model, sample), ours[:place])
    return float(logprobs_V[mine] - logprobs_V[other])


if __name__ == "__main__":
    main()
