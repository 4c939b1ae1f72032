import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the Triton kernels that the interpreter ran, in order."""
    names, launch = [], interpreter.GridExecutor.__call__

    def counted(self, *arguments, **options):
        names.append(self.fn.__name__)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


@pytest.fixture
def poisoned():
    """torch fills memory that it hands out empty with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def descriptors_that_add(monkeypatch):
    """The interpreter of Triton 3.6 lacks ``descriptor.atomic_add``; its programs run one after the other."""

    def reduce(self, kind, descriptor, value, indices):
        pointers, mask = descriptor.materialize_pointers(indices)
        zero = interpreter.TensorHandle(value.data * 0, value.dtype)
        old = self.create_masked_load(pointers, mask, zero, None, None, False)
        new = interpreter.TensorHandle(old.data + value.data, value.dtype)
        self.create_masked_store(pointers, new, mask, None, None)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", reduce, raising=False)
