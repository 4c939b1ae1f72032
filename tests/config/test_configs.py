"""The configs that we stand behind: sizes of the published models, and what their headers promise."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from avlm.config.load import dump_config
from avlm.config.run import InitFrom
from avlm.models.shapes import parameter_shapes
from avlm.preflight import memory
from avlm.preflight.check import check_layout
from avlm.preflight.layout import layout_of
from avlm.storage.checkpoint_files import MARKER
from avlm.weights.model_from import open_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if not path.stem.startswith("demo")]

# Parameters as the Hub counts them, less what we compute instead of storing it or never run.
LLAMA_3_8B, LLAMA_2_7B, LLAMA_2_13B = 8_030_261_248, 6_738_415_616, 13_015_864_320
TINY_LLAMA, QWEN_2_5_HALF = 1_100_048_384, 494_032_768
QWEN_3_30B = 30_532_122_624
CLIP_LAYER = 4 * (1024**2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
CLIP_L_336 = 303_507_456 - 2 * 1024 - CLIP_LAYER  # its last norm and layer lie above feature layer -2
SIGLIP_POOL = 768 + 4 * (768**2 + 768) + 2 * 3072 * 768 + 3072 + 768 + 2 * 768  # its attention pooling
SIGLIP_B_16 = 92_884_224 - SIGLIP_POOL
QWEN_2_5_VL_7B, QWEN_2_5_VL_3B, QWEN_3_VL_2B = 8_292_166_656, 3_754_622_976, 2_127_532_032  # with their towers
QWEN_2_AUDIO_7B = 8_397_094_912
LLAVA_ONEVISION_HALF = 893_673_248  # whole; tests/families/test_llava_next_keys.py counts those of its class
INTERNVL3_1B = 938_193_024  # whole, counted of its class in tests/families/test_internvl_keys.py
SMOLVLM_2_256M = 256_484_928  # whole; tests/families/test_idefics3_keys.py counts those of its class
GEMMA3_4B = 4_300_079_472  # whole; tests/families/test_gemma_vision_keys.py counts those of its class
WHISPER_LARGE, WHISPER_SMALL = 636_968_960 - 1500 * 1280, 88_154_112 - 1500 * 768  # sinusoids
FASTCONFORMER_XL = 607_749_120  # of the class; with its head of 1,025 tokens 608,799,745
SIZES = {
    "avlm_8b": {"decoder": LLAMA_3_8B, "vision": CLIP_L_336, "audio": WHISPER_LARGE},
    "long_context": {"decoder": LLAMA_3_8B, "vision": CLIP_L_336, "audio": WHISPER_LARGE},
    "llava_7b": {"decoder": LLAMA_2_7B, "vision": CLIP_L_336},
    "llava_13b": {"decoder": LLAMA_2_13B, "vision": CLIP_L_336},
    "salm_1b": {"decoder": TINY_LLAMA, "audio": WHISPER_LARGE},
    "salm_fastconformer": {"decoder": TINY_LLAMA, "audio": FASTCONFORMER_XL},
    "salm_30b": {"decoder": QWEN_3_30B, "audio": WHISPER_LARGE},
    "qwen_omni_small": {"decoder": QWEN_2_5_HALF, "vision": SIGLIP_B_16, "audio": WHISPER_SMALL},
    "qwen2_5_vl_7b": {"decoder+vision+vision_projector": QWEN_2_5_VL_7B},
    "qwen2_5_vl_3b": {"decoder+vision+vision_projector": QWEN_2_5_VL_3B, "audio": WHISPER_LARGE},
    "qwen2_audio_7b": {"decoder+audio+audio_projector": QWEN_2_AUDIO_7B - 1500 * 1280},
    # The parts of a Qwen2.5-VL 3B, whose head is apart here, and Whisper's encoder.
    "qwen2_5_omni_3b": {
        "decoder+vision+vision_projector": QWEN_2_5_VL_3B + 151_936 * 2048,
        "audio": WHISPER_LARGE,
        "audio_projector": 1280 * 2048 + 2048,
    },
    # Projectors of 0.5 differ in the width of the language model alone; that of Llama 3.2 1B takes, with the encoder,
    # 683,118,592 numbers, which are the 1,366,275,264 bytes of its file in bfloat16, but for the header.
    "ultravox_8b": {
        "decoder": LLAMA_3_8B,
        "audio": WHISPER_LARGE,
        "audio_projector": 683_118_592 - 1500 * 1280 - WHISPER_LARGE + 2048 * (4096 - 2048),
    },
    # Its report says 650 M for hearing and 540 M for seeing; the vocabulary is a little larger than that of Qwen3.
    "qwen3_omni_30b": {
        "decoder": QWEN_3_30B + 2 * 128 * 2048,
        "vision+vision_projector": 538_631_408,
        "audio+audio_projector": 647_927_168,
    },
    "llava_onevision_0_5b": {"decoder+vision+vision_projector": LLAVA_ONEVISION_HALF},
    "internvl3_1b": {"decoder+vision+vision_projector": INTERNVL3_1B},
    "smolvlm2_256m": {"decoder+vision+vision_projector": SMOLVLM_2_256M},
    "gemma3_4b": {"decoder+vision+vision_projector": GEMMA3_4B},
    "qwen3_vl_2b": {"decoder+vision+vision_projector": QWEN_3_VL_2B},
}


@pytest.fixture(autouse=True, scope="module")
def runs_of_earlier_stages(tmp_path_factory):
    """Configs that continue from another's run find one; tests/config/hub has the sizes of the published models."""
    here = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for stage in ("vision_alignment", "audio_alignment"):
            config = open_config(CONFIGS[0].parent / f"avlm_8b_{stage}.yaml")
            run = here / config.output_dir
            (run / "checkpoints" / "step_00005190").mkdir(parents=True)
            (run / "checkpoints" / "step_00005190" / MARKER).touch()
            (run / "config.yaml").write_text(dump_config(config))
        yield


def header(path: Path) -> dict[str, str]:
    """Its entries, those of several lines as one."""
    text = re.sub(r"\n# {7,}", " ", path.read_text())
    return dict(re.findall(r"^#   (\w+) +(.+)$", text, re.M))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_is_and_names_itself_in_its_command(path):
    said = header(path)
    assert {"command", "hardware", "tokens", "expected"} <= said.keys()
    assert f"configs/{path.name}" in said["command"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_model_has_the_parameters_that_were_published(path):
    shapes = parameter_shapes(open_config(path).model)
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        if ".lora_" not in name:
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + math.prod(shape)
    expected = next(sizes for stem, sizes in SIZES.items() if path.stem.startswith(stem))
    for modules, size in expected.items():
        assert sum(counts[module] for module in modules.split("+")) == size, modules
    modules = {module for each in expected for module in each.split("+")}
    assert counts.keys() == modules | {f"{tower}_projector" for tower in ("vision", "audio") if tower in modules}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_it_fits_the_hardware_that_its_header_names_with_the_memory_that_it_says(path):
    said = header(path)
    hardware = re.findall(r"(\d+) GPUs? of (\d+) GB(?: with (\S+))?", said["hardware"])
    estimates = re.findall(r"([\d.]+) GiB (?:a rank|on one GPU)", said["memory"])
    [rows] = set(re.findall(r"of (\d+) rows", said["tokens"]))
    assert hardware and said["hardware"].count("GPU") == len(hardware) == len(estimates)
    for (ranks, device_gib, override), estimate in zip(hardware, estimates):
        cfg, world_size = open_config(path, [override] if override else []), int(ranks)
        check_layout(cfg, world_size)
        shapes = parameter_shapes(cfg.model)
        gib = max(memory.estimate(cfg, stage, world_size, shapes).total for stage in cfg.stages) / 2**30
        assert estimate == f"{gib:.1f}"
        assert gib < 0.8 * int(device_gib), "some room is left for what is not estimated"
        layout = layout_of(cfg, world_size)
        assert layout.rows_per_step(cfg.train) == int(rows), "the same step on any of them"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_whoever_validates_has_something_to_validate_on_at_every_stage(path):
    cfg = open_config(path)
    assert [bool(stage.data.validation) for stage in cfg.stages] == [cfg.train.validate_every > 0] * len(cfg.stages)


def test_the_8b_stages_have_the_numbers_of_nemo():
    cfg = open_config(CONFIGS[0].parent / "avlm_8b.yaml")
    assert [stage.name for stage in cfg.stages] == ["vision_alignment", "audio_alignment", "finetune"]
    for stage, (lr, min_lr) in zip(cfg.stages, [(1e-3, 2e-5), (1e-3, 2e-5), (2e-5, 2e-7)]):
        o = stage.optimizer
        assert (o.lr, o.min_lr, o.warmup_steps, o.eps, o.weight_decay, o.clip_norm) == (lr, min_lr, 150, 1e-5, 0.1, 1.0)
        assert (o.betas, stage.steps, stage.data.seq_length) == ((0.9, 0.95), 5190, 8192)


def test_the_8b_stages_one_by_one_are_those_of_the_one_run():
    """But for where they start; a run draws the data of its stages with its seed and the next ones."""
    whole = open_config(CONFIGS[0].parent / "avlm_8b.yaml")
    start = whole.init_from
    for i, stage in enumerate(whole.stages):
        path = CONFIGS[0].parent / f"avlm_8b_{stage.name}.yaml"
        alone = open_config(path)
        own = {"output_dir": f"runs/{path.stem}", "seed": whole.seed + i, "init_from": start, "stages": [stage]}
        assert alone == replace(whole, **own)
        assert i == 0 or f"configs/{Path(start.all).name}.yaml" in header(path)["needs"]
        start = InitFrom(all=alone.output_dir)
    lora = open_config(CONFIGS[0].parent / "avlm_8b_lora.yaml")
    assert (lora.seed, lora.init_from, lora.stages[0].data) == (alone.seed, alone.init_from, alone.stages[0].data)
