"""Names of every tensor, ours and Hugging Face's: one table per tower, read by import and export alike."""

import re

# Our module or parameter -> Hugging Face's, {i} the layer. Leaves (.weight, .bias) are the same on both sides.
NAMES = {
    "decoder": {
        "embedding": "embed_tokens",
        "blocks.{i}.attention_norm": "layers.{i}.input_layernorm",
        "blocks.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "layers.{i}.self_attn.o_proj",
        "blocks.{i}.attention.q_norm": "layers.{i}.self_attn.q_norm",
        "blocks.{i}.attention.k_norm": "layers.{i}.self_attn.k_norm",
        "blocks.{i}.ffn_norm": "layers.{i}.post_attention_layernorm",
        "blocks.{i}.ffn.gate": "layers.{i}.mlp.gate_proj",
        "blocks.{i}.ffn.up": "layers.{i}.mlp.up_proj",
        "blocks.{i}.ffn.down": "layers.{i}.mlp.down_proj",
        "norm": "norm",
        "head": "lm_head",  # stands outside the prefix of the others
    },
    "vision": {
        "patch": "embeddings.patch_embedding",  # a convolution there: (D, 3, P, P)
        "class_token": "embeddings.class_embedding",  # (D,) there
        "position": "embeddings.position_embedding.weight",
        "pre_norm": "pre_layrnorm",  # sic
        "blocks.{i}.attention_norm": "encoder.layers.{i}.layer_norm1",
        "blocks.{i}.attention.q": "encoder.layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "encoder.layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "encoder.layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "encoder.layers.{i}.self_attn.out_proj",
        "blocks.{i}.ffn_norm": "encoder.layers.{i}.layer_norm2",
        "blocks.{i}.up": "encoder.layers.{i}.mlp.fc1",
        "blocks.{i}.down": "encoder.layers.{i}.mlp.fc2",
        "post_norm": "post_layernorm",
    },
    "audio": {
        "conv1": "conv1",
        "conv2": "conv2",
        "blocks.{i}.attention_norm": "layers.{i}.self_attn_layer_norm",
        "blocks.{i}.attention.q": "layers.{i}.self_attn.q_proj",
        "blocks.{i}.attention.k": "layers.{i}.self_attn.k_proj",
        "blocks.{i}.attention.v": "layers.{i}.self_attn.v_proj",
        "blocks.{i}.attention.o": "layers.{i}.self_attn.out_proj",
        "blocks.{i}.ffn_norm": "layers.{i}.final_layer_norm",
        "blocks.{i}.up": "layers.{i}.fc1",
        "blocks.{i}.down": "layers.{i}.fc2",
        "norm": "layer_norm",
    },
    "vision_projector": {"up": "linear_1", "down": "linear_2"},
    "audio_projector": {"up": "linear_1", "down": "linear_2"},
}
RESHAPED = ("vision.patch.weight", "vision.class_token")

# Where a module stands in the files, by the tensor that every one of them has. The first layout that fits is taken:
# the Hub's LLaVA, transformers 4.52+'s, the bare model inside a head, the bare model. (What transformers 5.17 writes of
# a Voxtral has "model" twice.)
LAYOUTS = {
    "decoder": (
        "embed_tokens.weight",
        ["language_model.model.", "model.language_model.", "language_model.model.model.", "model.", ""],
    ),
    "vision": (
        "embeddings.patch_embedding.weight",
        ["vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower.", "vision_tower."]
        + ["vision_model.", ""],
    ),
    "audio": ("conv1.weight", ["audio_tower.", "model.audio_tower.", "model.encoder.", "encoder.", ""]),
    "vision_projector": ("linear_1.weight", ["multi_modal_projector.", "model.multi_modal_projector."]),
    "audio_projector": ("linear_1.weight", ["multi_modal_projector.", "model.multi_modal_projector."]),
}
# Names by which our own are known, and what wrappers (Lightning, DDP) may have put before them.
OWN_ANCHORS = ("decoder.embedding.weight", "vision.patch.weight", "audio.conv1.bias")
OWN_ANCHORS += tuple(f"{tower}_projector.{layer}.weight" for tower in ("vision", "audio") for layer in ("up", "linear"))
WRAPPERS = ("", "model.", "module.")

# What a folder may hold beside what we load, matched after the prefix of the module.
SKIPPED = {
    "decoder": [(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", "computed frequencies")],
    "vision": [
        (r"embeddings\.position_ids", "computed position ids"),
        (r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias", "text tower and its projections"),
        (r"head\.", "attention-pooling head"),
        (r"post_layernorm\.", "norm of the pooled output"),
    ],
    "audio": [
        (r"embed_positions\.weight", "fixed sinusoids, computed"),
        (r"(model\.)?decoder\.|proj_out\.", "Whisper's decoder"),
    ],
    "vision_projector": [],
    "audio_projector": [],
}


def hugging_face_name(module: str, name: str) -> str:
    """Hugging Face's name of our parameter, both without the prefix of the module."""
    layer = re.match(r"blocks\.(\d+)\.", name)
    pattern = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    leaf = ""
    if pattern not in NAMES[module]:
        pattern, _, leaf = pattern.rpartition(".")
        leaf = "." + leaf
    return NAMES[module][pattern].replace("{i}", layer[1] if layer else "") + leaf
