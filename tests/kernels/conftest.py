import pytest
from triton.runtime.interpreter import GridExecutor


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Names of the Triton kernels that the interpreter ran, in order."""
    names, launch = [], GridExecutor.__call__

    def counted(self, *arguments, **options):
        names.append(self.fn.__name__)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names
