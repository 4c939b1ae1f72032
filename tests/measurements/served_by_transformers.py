"""How near an exported folder comes in transformers to the model that it was made of: prompts, logits and greedy
answers of small models with random weights, for the towers, projectors, decoders and bases that the format holds.

    python -m tests.measurements.served_by_transformers
"""

import tempfile
from pathlib import Path

import torch

from tests.weights.served_models import FAMILIES, MODELS, compared, of_family, of_model, served

HEAD = ["model", "class that sees", "prompts", "equal ids", "equal answers", "max error of logits", "largest logit"]


def main() -> None:
    print(f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    cases = [(name, of_model(name)) for name in MODELS] + [(f"{name}, audio", of_family(name)) for name in FAMILIES]
    for name, (config, options, asked) in cases:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            model, encoder, engine = served(config, Path(folder), **options)
            found = compared(model, encoder, engine, asked)
        classes = type(engine.network).__mro__
        base = next(each.__name__ for each in classes if each.__module__.startswith("transformers.models."))
        cells = [name, base, len(asked), found.ids, found.answers, f"{found.error:.1e}", f"{found.largest:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
