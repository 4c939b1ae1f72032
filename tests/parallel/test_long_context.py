"""configs/long_context.yaml, scaled down: a tiny model and a row of 4,096 tokens over four ranks, with its own layout,
recomputation, positions and features of media."""

from pathlib import Path

from avlm.config.run import Config
from avlm.data.loader import open_loader
from avlm.data.stream import Stream
from avlm.models import freezing
from avlm.models.avlm import AVLM
from avlm.models.batch import Batch
from avlm.models.initial import init
from avlm.parallel import mesh
from avlm.parallel.apply import own_part
from avlm.parallel.context_attention import UlyssesAttention
from avlm.weights.model_from import open_config
from tests.measurements.equivalence import TOLERANCE, distance, relative
from tests.parallel.small import Observer, build
from tests.parallel.spawn import run_ranks
from train import train_step

PATH = Path(__file__).parents[2] / "configs" / "long_context.yaml"
TOKENS = 4096
SMALLER = {
    "model.decoder": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 8}
    | {"num_kv_heads": 2, "head_dim": 8},
    "model.vision": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "image_size": 32}
    | {"patch_size": 8},
    "model.audio": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2, "num_mels": 16},
    "data": {"seq_length": TOKENS, "validation": "{}"},
    "parallel": {"context": 4},
}


def small_config(mix: str) -> Config:
    overrides = [f"{section}.{key}={value}" for section, sizes in SMALLER.items() for key, value in sizes.items()]
    parts = ("decoder", "vision", "audio")
    overrides += [f"init_from.{part}=null" for part in parts]
    config = open_config(PATH, [*overrides, f"data.train=synthetic:{mix}", "device=cpu"])
    assert config.model.decoder.max_position == 256 * TOKENS
    return config


def row_of(config: Config) -> Batch:
    stage = config.stages[-1]
    stream = Stream(stage.data.train, stage.data, config.model, rank=0, world=1, seed=1, train=True)
    return next(iter(open_loader(stream, None)))


def errors_on_a_rank(configs: list[Config]) -> list[tuple[float, float]]:
    """Of a step's loss and of its gradients, against one process; on the first rank."""
    found = []
    worlds: dict = {}
    for config in configs:
        world, model = build(config, worlds)
        core = model.decoder.blocks[0].attention.core
        assert isinstance(core, UlyssesAttention) and core.ring is not None
        freezing.freeze(model, config.stages[-1])
        row = row_of(config)
        assert len(row.token_T) == TOKENS and len(row.image.sizes) >= 300 and len(row.audio.sizes) >= 7
        num_targets = len(row.target_R)
        observer = Observer(model)
        values = train_step(model, [own_part(row, config.model, world)], num_targets, observer, None, world)
        if not world.is_first:
            continue
        alone = AVLM(config.model)
        init(alone, config.seed)
        freezing.freeze(alone, config.stages[-1])
        loss, _ = alone(row)
        (loss / num_targets).backward()
        expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
        of_loss = relative(abs(values[:-2].sum().item() - loss.item()), loss.item())
        found.append((of_loss, distance(observer.gradients, expected)))
    mesh.stop()
    return found


def test_a_long_row_of_images_and_audio_over_its_context_ranks_has_the_numbers_of_one_process():
    """One document of all tokens, which the ranks cut, and 32, which stay whole."""
    mixes = "documents=1,images=300,clips=7,seconds=30", "documents=32,images=320,clips=32,seconds=4"
    errors = run_ranks(errors_on_a_rank, 4, [small_config(mix) for mix in mixes])[0]
    assert len(errors) == 2 and max(map(max, errors)) < TOLERANCE, errors
