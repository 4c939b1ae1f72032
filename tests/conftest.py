import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """Two ranks or two test processes share two cores; sums in one thread are the same everywhere."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
