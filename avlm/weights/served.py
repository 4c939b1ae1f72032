"""The folder for transformers with code of its own (``avlm.families.served``): which base holds a model, and what goes
into the folder."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from avlm.config.model import ModelConfig
from avlm.config.run import DataConfig
from avlm.config.values import shown
from avlm.families import door, llama, served
from avlm.families.served import video_obstacle
from avlm.storage.model_folder import read_json

FORMAT = "transformers"
HEAD = served.HEAD
SIGHT = ("vision", "vision_projector")
CODE = ("modeling_avlm.py", "processing_avlm.py")
NO_TOKENIZER = [None, None]  # of auto_map; keeps transformers from building another one
Places = dict[str, tuple[ModuleType, str]]  # module -> the family that names its tensors, what stands before the names


class Served(NamedTuple):
    base: str  # a format of ``door.FORMATS``
    own_projector: bool  # in place of its own

    @property
    def family(self) -> ModuleType:
        return door.FORMATS[self.base]

    def places(self, config: ModelConfig) -> Places:
        found: Places = {}
        for module in config.modules:
            is_ours = module.startswith("audio") or (self.own_projector and module.startswith("vision"))
            family = served if is_ours else self.family
            found[module] = (family, family.LOADED[module])
        return found


def choose(config: ModelConfig, data: DataConfig | None) -> Served:
    """The base of a model. ValueError with what keeps it out of the nearest."""
    _require_norms(config, "audio_projector")
    if not config.modalities:
        raise ValueError("the model neither sees nor hears: --format decoder holds it without code of its own")
    if config.decoder.experts is not None:
        raise ValueError(
            "decoder.experts: transformers converts the tensors of experts for its own classes alone, and not for "
            "that of --format transformers: give --format avlm, or that of a family which holds the model"
        )
    for key, held in {"stem": "conv1d", "block": "whisper", "mel": "whisper", "scale_input": False}.items():
        if config.audio is not None and (value := getattr(config.audio, key)) != held:
            raise ValueError(
                f"audio.{key}={value} is not in the code that --format transformers brings along: give --format "
                f"{'avlm or qwen3_omni_moe' if value == 'conv2d' else 'avlm'}"
            )
    for kind, marked in data.markers.items() if data is not None else ():
        if "{n}" in "".join(marked):
            raise ValueError(f"data.markers.{kind}={marked} counts media, which no exported chat template does")
    if config.vision is None:
        return Served("voxtral", False)
    for chosen in _candidates():
        if _obstacle(chosen, config, data) is None:
            if chosen.own_projector:
                _require_norms(config, "vision_projector")
            return chosen
    nearest = _nearest(config, data)
    raise ValueError(
        f"transformers has no class that sees as this model does, the nearest being {nearest.family.CLASS}: "
        f"{_obstacle(nearest, config, data)}"
    )


def _require_norms(config: ModelConfig, name: str) -> None:
    """ValueError for a projector of ours with a norm that the code of the folder lacks."""
    projector = getattr(config, name)
    for key in ("norm", "feature_norm", "hidden_norm", "output_norm"):
        if projector is not None and getattr(projector, key) == "rms_offset":
            raise ValueError(f"the {FORMAT} format cannot hold {name}.{key}=rms_offset: train it with rms")


def _nearest(config: ModelConfig, data: DataConfig | None) -> Served:
    """By how images become features."""
    if config.decoder.bidirectional != "none":
        of_prefix = "paligemma2" if config.decoder.post_norms else "paligemma"
        return Served("gemma3" if config.decoder.bidirectional == "images" else of_prefix, False)
    if config.vision.any_grid:
        if config.decoder.mrope_interleaved:
            return Served("qwen3_vl", False)
        if config.decoder.mrope_sections is not None:
            return Served("qwen2_5_vl" if config.vision.window else "qwen2_vl", False)
        return Served("mistral3" if config.vision_projector.merge else "pixtral", False)
    tiles = data.image_layout.tiles if data is not None else "none"
    return {
        "none": Served("llava", True),
        "pinpoints": Served("llava_next", True),
        "aspect": Served("internvl", False),
        "long_edge": Served("smolvlm", False),
    }[tiles]


def places(keys: Mapping[str, Any], config: ModelConfig) -> Places:
    """Where the modules of an export lie, by its config.json; nowhere special if it is not of this format."""
    if "base" not in keys:
        return {}
    if str(keys["base"]) not in door.FORMATS:
        raise ValueError(f"base {shown(repr(keys['base']))} in config.json is not one of {', '.join(door.FORMATS)}")
    return Served(keys["base"], "vision_projector" in keys).places(config)


def _candidates() -> Iterator[Served]:
    """Those with videos first: SmolVLM holds what Idefics3 does."""
    bases = [name for name, family in door.FORMATS.items() if set(family.LOADED) == {"decoder", *SIGHT}]
    for name in sorted(bases, key=lambda name: "video" not in door.FORMATS[name].MEDIA):
        yield Served(name, False)
    for name in bases:
        if door.FORMATS[name] in served.LLAVAS:
            yield Served(name, True)


def _obstacle(chosen: Served, config: ModelConfig, data: DataConfig | None) -> str | None:
    if chosen.own_projector and chosen.base != "llava" and config.vision_projector.downsample != 1:
        return f"a LlavaNext with tiles has no vision_projector.downsample={config.vision_projector.downsample}"
    if chosen.family in door.WITH_IMAGES_ALONE:
        return f"its processor takes no prompt without an image, but --format {chosen.base} may hold what sees"
    seen = served.sight(config, chosen.own_projector)
    try:
        chosen.family.config_json(seen, dict.fromkeys(chosen.family.MEDIA_TOKENS, 0))
        chosen.family.processor_json(seen, data)
        door.prompt_keys(chosen.family, seen, data)
    except ValueError as error:
        return str(error)
    return None


def tokens(chosen: Served, config: ModelConfig, data: DataConfig | None) -> dict[str, str]:
    """Kind -> the token of a medium in a prompt."""
    media = {} if config.vision is None else dict(chosen.family.MEDIA)
    if chosen.base == "llava" and data is not None and video_obstacle(data) is None:
        media["video"] = served.VIDEO
    return media | ({"audio": served.AUDIO} if config.audio else {})


def notes(config: ModelConfig, data: DataConfig) -> list[str]:
    """What its user should know about the folder of a model."""
    chosen = choose(config, data)
    said = ["it brings code along, modeling_avlm.py and processing_avlm.py: read them before you trust them"]
    if config.audio is None and not chosen.own_projector:
        said.append(f"--format {chosen.base} holds this model without code of its own")
    obstacle = video_obstacle(data) if chosen.base == "llava" else None
    if obstacle is not None:
        said.append(f"it takes no videos, because of {obstacle}")
    return said


def config_json(chosen: Served, config: ModelConfig, data: DataConfig | None, ids: Mapping[str, int]) -> dict[str, Any]:
    """Keys of config.json: those of the base, and what our half adds. ``ids``: of the tokens of media."""
    if config.vision is None:
        keys: dict[str, Any] = {"text_config": llama.write(config.decoder)}
    else:
        seen = served.sight(config, chosen.own_projector)
        keys = {**chosen.family.config_json(seen, ids), **door.prompt_keys(chosen.family, seen, data)}
    keys |= served.audio_keys(config, ids)
    if chosen.own_projector:
        keys |= served.projector_keys(config)
    if served.VIDEO in ids and chosen.base == "llava":
        keys["frames_token_id"] = ids[served.VIDEO]
    own = {"architectures": [served.CLASS], "model_type": served.MODEL_TYPE, "auto_map": served.AUTO_MAP}
    return {**keys, **own, "base": chosen.base, "base_processor": _base_processor(chosen, config, data)}


def _base_processor(chosen: Served, config: ModelConfig, data: DataConfig | None) -> str:
    """The name of a class."""
    if config.vision is None:
        return "ProcessorMixin"
    files = chosen.family.processor_json(served.sight(config, chosen.own_projector), data)
    return files["preprocessor_config.json"]["processor_class"]


def processor_json(
    chosen: Served, config: ModelConfig, data: DataConfig | None, ids: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """File name -> keys: the base's processor, and what ours adds to processor_config.json."""
    files: dict[str, dict[str, Any]] = {}
    if config.vision is not None:
        files = chosen.family.processor_json(served.sight(config, chosen.own_projector), data)
    keys = files.get("processor_config.json", {})
    if chosen.own_projector and chosen.base == "llava":
        keys["patch_size"] = config.vision.patch_size * config.vision_projector.downsample
    keys |= {"processor_class": "AVLMProcessor", "auto_map": {"AutoProcessor": served.AUTO_MAP["AutoProcessor"]}}
    keys |= served.hearing(config, ids)
    if "video" in tokens(chosen, config, data) and chosen.base == "llava":
        keys |= served.watching(config, data, ids)
    named = {name: {**of_file, "processor_class": "AVLMProcessor"} for name, of_file in files.items()}
    return {**named, "processor_config.json": keys}


def code(base: str, processor: str) -> dict[str, str]:
    """The files of CODE, with the classes of a base and of its ``processor``."""
    stem = door.FORMATS[base].CLASS.removesuffix("ForConditionalGeneration")
    folder = Path(__file__).parent / "serving"
    found = {}
    for name in CODE:
        text = (folder / name).read_text(encoding="utf-8")
        text = text.replace("import LlavaProcessor as", f"import {processor} as")
        found[name] = re.sub(r"import Llava(Config|ForConditionalGeneration|Model) as", rf"import {stem}\1 as", text)
    return found


def check_code(folder: Path) -> bool:
    """Whether a folder brings code along. ValueError if transformers would run any other than what an export writes."""
    keys = read_json(folder / "config.json")
    if "auto_map" not in keys:
        return False
    known_values = [*served.AUTO_MAP.values(), NO_TOKENIZER]
    for path in sorted(folder.glob("*config.json")):
        for found in _maps(read_json(path)):
            if not isinstance(found, dict) or any(value not in known_values for value in found.values()):
                raise ValueError(f"auto_map in {path} is not that of an export, and its code is not run")
    base, processor = str(keys.get("base")), str(keys.get("base_processor"))
    known = code(base, processor) if base in door.FORMATS and processor.isidentifier() else {}
    for path in sorted(folder.rglob("*.py")):
        if path.read_text(encoding="utf-8") != known.get(str(path.relative_to(folder))):
            raise ValueError(f"{path} is not the code that an export writes, and is not run: export the model again")
    return True


def _maps(tree: Any) -> Iterator[Any]:
    """What stands under auto_map, at any depth: save_pretrained of transformers repeats it in parts of a file."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, part in parts:
        if key == "auto_map":
            yield part
        yield from _maps(part)
