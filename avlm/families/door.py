"""Which family a model_type, a file or an export format belongs to. Each family is a module of this folder.

    MODEL_TYPES, read    config.json -> our config
    PROCESSOR_FILES      files besides config.json that ``read`` needs
    NAMES                our module -> {a part or parameter of it: its name in files, {i} the layer}
    PREFIXES             our module -> what may stand before those names, an export's first; a name that begins with
                         "../" stands outside the module: the last part of a prefix is left out
    SKIPPED              our module -> tensors that files may hold and we do not load

Parameters of ours with one name in NAMES are that tensor's rows one after the other, in the order of the table: a fused
query, key and value, for example.

A name with EXPERT is that of an expert: files have a tensor for each, or one of all experts (``avlm.weights.experts``).

Those of CHANNEL_MAJOR (mistral3 alone has any) take rows side by side, whose numbers stand channel by channel in files
and row by row in ours. Those of TRANSPOSED have their last two dims the other way round in files.

A family that is an export format, FORMATS, also has ``config_json`` and ``processor_json``, our config -> their files,
HEAD (the name of the decoder's head), TIES_HEAD (whether a tied head may be left out), ``constants`` (our config -> the
tensors that only files have, by name: their shape, and the value that fills them), SINUSOIDS (our module -> its table
of positions in files, which we compute), MEDIA (kind -> the token of a medium in a prompt), MEDIA_TOKENS (those that a
tokenizer needs), CLASS (the class of transformers that loads it, None if there is none), LOADED (our module -> where it
lies in that class, which names PEFT's tensors) and PROJECTORS (our module -> what PEFT calls the modules of a
projector).
"""

import re
from collections.abc import Collection, Mapping
from types import ModuleType
from typing import Any

from avlm.config.decoder import DecoderConfig
from avlm.config.model import AudioConfig, ModelConfig, VisionConfig, VisionParts
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import (
    audioflamingo3,
    blip_2,
    clip,
    gemma,
    gemma2,
    gemma3,
    idefics3,
    internvl,
    llama,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    mistral3,
    paligemma,
    paligemma2,
    parakeet,
    pixtral,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_audio,
    qwen2_vl,
    qwen3_omni_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
    ultravox,
    voxtral,
    whisper,
)
from avlm.families.keys import check_types

AnyConfig = DecoderConfig | VisionConfig | AudioConfig | ModelConfig | VisionParts

# Whole models first: a file of tensors belongs to the first family that fits it, so those with more parts stand before
# those whose names they share.
FAMILIES = (
    gemma2,  # the only one that names the norm by which it is found
    *(
        gemma3,
        paligemma2,
        mistral3,
        internvl,
        llava,
        llava_next,
        llava_next_video,
        llava_onevision,
        pixtral,
        qwen3_omni_moe,
        qwen2_5_omni,
        ultravox,
        voxtral,
        qwen2_audio,
        audioflamingo3,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        qwen3_vl_moe,
        idefics3,
        smolvlm,
        paligemma,
    ),
    *(blip_2, llama, gemma, clip, whisper, parakeet),
)
FORMATS: dict[str, ModuleType] = {
    "decoder": llama,
    "gemma": gemma,
    "gemma2": gemma2,
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "internvl": internvl,
    "voxtral": voxtral,
    "qwen2_audio": qwen2_audio,
    "audioflamingo3": audioflamingo3,
    "ultravox": ultravox,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen3_omni_moe": qwen3_omni_moe,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "paligemma2": paligemma2,
}
TOWER_FORMATS: dict[str, ModuleType] = {"parakeet": parakeet}  # of an audio tower alone
TEXT_FORMATS = tuple(name for name, family in FORMATS.items() if set(family.LOADED) == {"decoder"})  # without towers
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.MODEL_TYPES}

HEADS = (*dict.fromkeys(family.HEAD for family in FORMATS.values()), qwen2_5_omni.WHOLE_HEAD)
EXPERT = "{e}"  # in the name of a tensor: the number of an expert
OUTSIDE = "../"  # begins the name of a tensor that is not in its module
RESHAPED = (*clip.RESHAPED, blip_2.QUERIES)
SINUSOIDS = {"audio": whisper.SINUSOIDS}  # module -> its table of positions, which we compute
TEXT_TEMPLATES = {  # family -> our template for one of parts
    llava: llava.text_template,
    llava_next: llava_next.text_template,
    llava_next_video: llava_next.text_template,
    llava_onevision: llava.text_template,
    idefics3: idefics3.text_template,
    smolvlm: idefics3.text_template,
    paligemma: paligemma.text_template,
    paligemma2: paligemma.text_template,
}
CHAT_TEMPLATES: dict[ModuleType | None, str] = {
    # family -> its own in Jinja, of processors that write what stands around a text themselves
    paligemma: paligemma.CHAT_TEMPLATE,
    paligemma2: paligemma.CHAT_TEMPLATE,
}
# Format -> family, of parts of a larger model.
WITHIN = {"qwen2_5_omni": qwen2_5_omni, "qwen3_omni_moe": qwen3_omni_moe}
TOKEN_NAMES = {  # format -> {name that its processor asks for: token}
    "qwen2_5_omni": qwen2_5_omni.TOKEN_NAMES,
    "qwen3_omni_moe": qwen3_omni_moe.TOKEN_NAMES,
    "internvl": internvl.TOKEN_NAMES,
    "gemma3": gemma3.TOKEN_NAMES,
}
WITH_PROMPTS = (
    llava_next,
    llava_next_video,
    llava_onevision,
    qwen2_audio,
    qwen2_5_omni,
    qwen3_omni_moe,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    qwen3_vl_moe,
    pixtral,
    mistral3,
    internvl,
    idefics3,
    smolvlm,
    gemma3,
)  # whose folders say how media stand in prompts
# In their config.json.
WITH_PROMPT_KEYS = (
    *(llava, llava_next, llava_next_video, llava_onevision, qwen2_5_omni, qwen3_omni_moe, paligemma, paligemma2),
)
# Whose processors put what stands around media into prompts themselves.
WITH_MARKERS = (pixtral, mistral3, internvl, idefics3, smolvlm, gemma3)
WITH_IMAGES_ALONE = (paligemma, paligemma2)  # whose processors take no other prompts
TRANSPOSED = {gemma3: gemma3.TRANSPOSED}  # family -> parameters, their names with our module
JOINS_EXPERTS = (qwen3_vl_moe,)
rebuilds_tokenizer = llama.rebuilds_tokenizer


def family_of(keys: Mapping[str, Any]) -> ModuleType:
    """The family of a config.json. ValueError for one that we do not support."""
    check_types(keys)
    model_type = keys.get("model_type")
    if model_type not in BY_MODEL_TYPE:
        raise ValueError(
            f"model_type {shown(repr(model_type), 60)} is not supported (supported: {', '.join(BY_MODEL_TYPE)})"
        )
    family = BY_MODEL_TYPE[model_type]
    if family is paligemma and paligemma.is_second(keys):
        return paligemma2
    return pixtral if family is llava and pixtral.is_meant(keys) else family


def prompts(family: ModuleType, config: AnyConfig, files: Mapping[str, dict]) -> dict[str, Any]:
    """Keys of ``data``, besides the template, with which we make the prompts that a folder's processor makes.
    ``files``: those of PROCESSOR_FILES that the folder has, by their names."""
    return family.prompts(config, files) if family in WITH_PROMPTS else {}


def media_in_prompts(family: ModuleType, markers: Mapping[str, list[str]]) -> dict[str, str]:
    """Kind -> what stands for a medium in the prompts that a format's processor takes. ``markers``: ``data``'s."""
    found = {}
    for kind, token in family.MEDIA.items():
        marks_itself = family in WITH_MARKERS or (
            family in (qwen3_vl, qwen3_vl_moe) and kind == "video"
        )  # of each patch of frames
        found[kind] = token if marks_itself else token.join(markers.get(kind, ["", ""]))
    return found


def prompt_keys(family: ModuleType, config: ModelConfig, data: DataConfig | None) -> dict[str, Any]:
    """What the config.json of an export says about prompts. ValueError for what the format cannot hold."""
    return family.prompt_keys(config, data) if family in WITH_PROMPT_KEYS and data is not None else {}


def elsewhere(family: ModuleType, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Our module -> the key of a config.json that names its folder, and that name, of the modules that a folder leaves
    to others."""
    return ultravox.elsewhere(keys) if family is ultravox else {}


def starts_at_random(
    family: ModuleType, name: str, shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, Any]
) -> bool:
    """Whether a folder has no value for a parameter of a module that it has, its name with our module."""
    return family is blip_2 and blip_2.starts_at_random(name, shapes, held)


def stop_ids(keys: Mapping[str, Any]) -> list[int] | None:
    """The ids that end an answer, from a config.json or generation_config.json; None if it has none."""
    keys = keys.get("thinker_config") or keys
    inner = keys.get("text_config")
    ids = keys.get("eos_token_id")
    if ids is None and isinstance(inner, dict):
        ids = inner.get("eos_token_id")
    if ids is None:
        return None
    ids = ids if isinstance(ids, list) else [ids]
    if any(type(each) is not int for each in ids):
        raise ValueError(f"eos_token_id must be a number or a list of numbers, not {shown(repr(ids))}")
    return ids


def hugging_face_name(family: ModuleType, module: str, name: str) -> str:
    """Hugging Face's name of our parameter, both without the prefix of the module."""
    number = re.search(r"\.(\d+)\.", name)
    pattern = _pattern(name)
    leaf = ""
    if pattern not in family.NAMES[module]:
        pattern, _, leaf = pattern.rpartition(".")
        leaf = "." + leaf
    if pattern not in family.NAMES[module]:
        raise ValueError(f"the tensors of {family.__name__.rpartition('.')[2]} have no name for {module}.{name}")
    theirs = family.NAMES[module][pattern]
    if number:
        theirs = theirs.replace("{i}", number[1])
    return theirs + leaf


def full_name(family: ModuleType, module: str, name: str, prefix: str) -> str:
    """Hugging Face's name of our parameter in a file where the module has a prefix."""
    return _placed(hugging_face_name(family, module, name), prefix)


def is_outside(family: ModuleType, module: str, name: str) -> bool:
    """Whether Hugging Face has a parameter of our module outside of its module."""
    return hugging_face_name(family, module, name).startswith(OUTSIDE)


def _placed(name: str, prefix: str) -> str:
    if not name.startswith(OUTSIDE):
        return prefix + name
    outer, dot, _ = prefix.removesuffix(".").rpartition(".")
    return outer + dot + name.removeprefix(OUTSIDE)


def has_name(family: ModuleType, module: str, name: str) -> bool:
    """Whether a family has a name for our parameter or part of a module."""
    table = family.NAMES.get(module, {})
    pattern = _pattern(name)
    return pattern in table or pattern.rpartition(".")[0] in table


def shares_tensor(family: ModuleType, module: str, name: str) -> bool:
    """Whether a part of ours is some rows of a larger tensor in a family."""
    names = family.NAMES[module]
    return list(names.values()).count(names.get(_pattern(name))) > 1


def of_all_experts(name: str) -> str:
    """The tensor of all experts that holds a linear which has a name with EXPERT: gate and up lie in one."""
    stem, _, leaf = name.partition(f".{EXPERT}.")
    return f"{stem}.{'down_proj' if leaf.startswith('down_proj') else 'gate_up_proj'}"


def joins_experts(family: ModuleType) -> bool:
    """Whether a family's files have one tensor of all experts of a layer, turned."""
    return family in JOINS_EXPERTS


def is_channel_major(family: ModuleType, name: str) -> bool:
    """Whether a parameter, its name with our module, is a matrix of CHANNEL_MAJOR in a family."""
    return family is mistral3 and name in mistral3.CHANNEL_MAJOR


def is_transposed(family: ModuleType, name: str) -> bool:
    """Whether a parameter, its name with our module, is one of TRANSPOSED in a family."""
    return name in TRANSPOSED.get(family, ())


def row_order(family: ModuleType, module: str, name: str) -> int:
    """By which the parts of a tensor stand in it."""
    names = family.NAMES[module]
    pattern = _pattern(name)
    return list(names).index(pattern if pattern in names else pattern.rpartition(".")[0])


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{i}.", name)


def anchor(family: ModuleType, module: str) -> str:
    """The tensor by which a module is found in a file: the first of its table, which every variant has."""
    first = next(iter(family.NAMES[module].values()))
    return f"{first.replace('{i}', '0')}.weight"


def find(module: str, held: Collection[str], family: ModuleType | None) -> tuple[ModuleType, str] | None:
    """Where a module lies among the tensors ``held`` of a file: the family that names it (``family``, if that is
    known) and the prefix of its names. None if the file lacks it."""
    for each in [family] if family else FAMILIES:
        for prefix in each.PREFIXES.get(module, []):
            if prefix + anchor(each, module) in held:
                return each, prefix
    return None


def is_part(family: ModuleType, module: str, name: str, prefix: str) -> bool:
    """Whether a tensor is one of the module's, which has a prefix, or of those that we skip."""
    names = [_placed(each, prefix) for each in family.NAMES[module].values()]
    names += [of_all_experts(each) for each in names if EXPERT in each]
    known = "|".join(re.escape(each).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+") for each in names)
    if re.fullmatch(rf"({known})(\.\w+)?", name):
        return True
    return name.startswith(prefix) and _skipped(family, module, name.removeprefix(prefix)) is not None


def skip_reason(family: ModuleType, module: str, name: str, unused: range) -> str | None:
    """Why a folder may hold a tensor that has no parameter here, or None if there is no good reason.

    ``name`` is without the prefix of the module, whose ``unused`` layers we do not build.
    """
    names = family.NAMES[module].items()
    before = next((theirs.partition("{i}")[0] for ours, theirs in names if ours.startswith("blocks.")), None)
    layer = re.match(rf"{re.escape(before)}(\d+)\.", name) if before else None
    if layer and int(layer[1]) in unused:
        return "layers above feature_layer"
    return _skipped(family, module, name)


def _skipped(family: ModuleType, module: str, name: str) -> str | None:
    return next((reason for pattern, reason in family.SKIPPED[module] if re.match(pattern, name)), None)


def stored_shapes(family: ModuleType, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter -> its shape in a file of a family, if the two differ."""
    if config.vision is None:
        return {}
    return internvl.stored_shapes(config.vision) if family is internvl else clip.stored_shapes(config.vision)
