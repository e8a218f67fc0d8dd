"""Bytes of the tensors that a piece of code makes and keeps: what a plan of memory is measured by."""

from __future__ import annotations

import weakref
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@final
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made while inside: those that live now, and the most that lived at once.

    What existed before is not counted, nor is what a kernel takes and gives back within one operation.

    Attributes:
        now: Bytes of what was made inside and lives.
        most: The most that ``now`` has been.

    Example:
        >>> with LiveBytes() as live:
        ...     one = torch.zeros(100, dtype=torch.float64)
        ...     two = one.view(10, 10) + 1
        ...     del one, two
        >>> live.now, live.most
        (0, 1600)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=False)
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=True)
        return result

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if counted else 0
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
