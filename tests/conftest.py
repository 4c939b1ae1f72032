import os
from pathlib import Path

# Before anything imports huggingface_hub: the small files of published models, in the form of the Hub's cache.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path(__file__).parent / "config" / "hub")}

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
SKIPPED = {  # marker -> why its tests cannot run here
    "gpu": None if torch.cuda.is_available() else "needs a GPU",
    "interpreter": None if INTERPRETED else "needs TRITON_INTERPRET=1, which make test sets for a second run",
    "compiler": "the interpreter compiles nothing" if INTERPRETED else None,
}


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, reason in SKIPPED.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """Two ranks or two test processes share two cores; sums in one thread are the same everywhere."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
