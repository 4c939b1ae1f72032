"""How much memory tensors hold at most while a piece of code runs, on any device, counted storage by storage."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``peak``: most bytes at one time in storages that operations inside the ``with`` took or gave. What an operation
    allocates for itself and frees again is not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note((args, kwargs))
        result = function(*args, **(kwargs or {}))
        self.note(result)
        return result

    def note(self, values) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.seen:
                storage = value.untyped_storage()
                self.seen[storage._cdata] = weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)

    def freed(self, key: int, count: int) -> None:
        del self.seen[key]
        self.live -= count
