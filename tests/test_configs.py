"""The configs that we stand behind: sizes of the published models, and what their headers promise."""

import re
from pathlib import Path

import pytest

from avlm import config_file, memory, preflight

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if not path.stem.startswith("demo")]

# Parameters as the Hub counts them, less what we compute instead of storing it or never run.
LLAMA_3_8B, LLAMA_2_7B, LLAMA_2_13B = 8_030_261_248, 6_738_415_616, 13_015_864_320
TINY_LLAMA, QWEN_2_5_HALF = 1_100_048_384, 494_032_768
CLIP_LAYER = 4 * (1024**2 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 4 * 1024
CLIP_L_336 = 303_507_456 - 2 * 1024 - CLIP_LAYER  # its last norm and layer lie above feature layer -2
SIGLIP_POOL = 768 + 4 * (768**2 + 768) + 2 * 3072 * 768 + 3072 + 768 + 2 * 768  # its attention pooling
SIGLIP_B_16 = 92_884_224 - SIGLIP_POOL
WHISPER_LARGE, WHISPER_SMALL = 636_968_960 - 1500 * 1280, 88_154_112 - 1500 * 768  # sinusoids
SIZES = {
    "avlm_8b": {"decoder": LLAMA_3_8B, "vision": CLIP_L_336, "audio": WHISPER_LARGE},
    "llava_7b": {"decoder": LLAMA_2_7B, "vision": CLIP_L_336},
    "llava_13b": {"decoder": LLAMA_2_13B, "vision": CLIP_L_336},
    "salm_1b": {"decoder": TINY_LLAMA, "audio": WHISPER_LARGE},
    "qwen_omni_small": {"decoder": QWEN_2_5_HALF, "vision": SIGLIP_B_16, "audio": WHISPER_SMALL},
}


def header(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^#   (\w+) +(.+)$", path.read_text(), re.M))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_what_it_is_and_names_itself_in_its_command(path):
    said = header(path)
    assert {"command", "hardware", "tokens", "expected"} <= said.keys()
    assert f"configs/{path.name}" in said["command"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_model_has_the_parameters_that_were_published(path):
    shapes = memory.parameter_shapes(config_file.load(path).model)
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        if ".lora_" not in name:
            size = shape[0] * (shape[1] if len(shape) > 1 else 1) * (shape[2] if len(shape) > 2 else 1)
            counts[name.split(".")[0]] = counts.get(name.split(".")[0], 0) + size
    expected = next(sizes for stem, sizes in SIZES.items() if path.stem.startswith(stem))
    assert {module: counts[module] for module in expected} == expected
    assert counts.keys() == expected.keys() | {f"{tower}_projector" for tower in expected if tower != "decoder"}


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_it_fits_the_hardware_that_its_header_names_with_the_memory_that_it_says(path):
    said = header(path)
    world_size, device_gib = map(int, re.match(r"(\d+) GPUs? of (\d+) GB", said["hardware"]).groups())
    cfg = config_file.load(path)
    preflight.check_layout(cfg, world_size)
    shapes = memory.parameter_shapes(cfg.model)
    gib = max(memory.estimate(cfg, stage, world_size, shapes).total for stage in cfg.stages) / 2**30
    assert said["memory"].startswith(f"{gib:.1f} GiB a rank")
    assert gib < 0.8 * device_gib, "some room is left for what is not estimated"


def test_the_8b_stages_have_the_numbers_of_nemo():
    cfg = config_file.load(CONFIGS[0].parent / "avlm_8b.yaml")
    assert [stage.name for stage in cfg.stages] == ["vision_alignment", "audio_alignment", "finetune"]
    for stage, (lr, min_lr) in zip(cfg.stages, [(1e-3, 2e-5), (1e-3, 2e-5), (2e-5, 2e-7)]):
        o = stage.optimizer
        assert (o.lr, o.min_lr, o.warmup_steps, o.eps, o.weight_decay, o.clip_norm) == (lr, min_lr, 150, 1e-5, 0.1, 1.0)
        assert (o.betas, stage.steps, stage.data.seq_length) == ((0.9, 0.95), 5190, 8192)
    parts = ("avlm_8b_vision_alignment", "avlm_8b_audio_alignment", "avlm_8b_finetune")
    for stage, name in zip(cfg.stages, parts):
        [alone] = config_file.load(CONFIGS[0].parent / f"{name}.yaml").stages
        assert (alone.optimizer, alone.train, alone.data.train) == (stage.optimizer, stage.train, stage.data.train)
