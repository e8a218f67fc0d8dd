"""Record a function of tensors as a flat list of torch operations, with all that does not depend on its inputs done once.

A sweep at a fixed primal point is linear in its tangents: most of what rules and autograd do around it (norms' statistics,
softmax's levels, slopes of activations) is the same for every vector. A dispatch mode sees every operation as it runs; those that
no input reaches run there and then and are constants of the recording, the others become its instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from disthess.errors import GraphError

Operation = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Var:
    """Stands for a value of the recording inside an instruction's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a value lies in memory: what decides whether it can be overwritten by another.

    Attributes:
        shape: Its shape.
        stride: Its strides, in entries.
        storage: A number that values share if they are views of one tensor.
        dtype: Its dtype.
        pure: Nothing is ever written into its storage.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int
    dtype: torch.dtype
    pure: bool = True

    @property
    def contiguous(self) -> bool:
        """Whether entries lie one after the other, rows first."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Instruction:
    """One operation.

    Attributes:
        op: An operation of ``torch.ops.aten``.
        args: Its arguments, values replaced by `Var`, inside lists too.
        kwargs: Its keyword arguments, likewise.
        outputs: Index of each value it returns; None for one that nobody can name.
        many: Whether it returns a sequence.
    """

    op: Operation
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[int | None, ...]
    many: bool = False

    @property
    def name(self) -> str:
        """``aten.add.Tensor`` and so on."""
        return str(self.op)

    def reads(self) -> tuple[int, ...]:
        """Values among its arguments."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return tuple(leaf.index for leaf in leaves if isinstance(leaf, Var))


@dataclass(frozen=True, slots=True)
class Recording:
    """A function of ``inputs`` tensors, flat.

    Attributes:
        inputs: Their number: values 0, 1, ... are the arguments.
        instructions: In order.
        results: What it returns: values, or constants where no input reaches.
        layouts: By value.
    """

    inputs: int
    instructions: tuple[Instruction, ...]
    results: tuple[Var | Tensor, ...]
    layouts: dict[int, Layout]


def record(function: Callable[..., Sequence[Tensor]], point: Sequence[Tensor]) -> Recording:
    """Run a function once and record it.

    Args:
        function: Of as many tensors as ``point`` has. Whatever it does must not depend on their entries.
        point: Any values of the shapes wanted.

    Returns:
        Its recording, with every tensor that it holds on to as a constant.

    Raises:
        GraphError: It writes an input's influence into a tensor that was there before, or reads an entry of one.
    """
    recorder = _Recorder(point)
    with recorder:
        results = function(*point)
    return recorder.recording(len(point), results)


@final
class _Recorder(TorchDispatchMode):
    """Tells operations that an input reaches from the others, by identity of tensors."""

    def __init__(self, point: Sequence[Tensor]) -> None:
        super().__init__()
        self._index: dict[int, int] = {}
        # Tensors are told apart by their addresses, which are theirs only as long as they live.
        self._alive: list[Tensor] = []
        self._layouts: dict[int, Layout] = {}
        self._written: set[int] = set()
        self._instructions: list[Instruction] = []
        for tensor in point:
            self._number(tensor)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reached = any(id(tensor) in self._index for tensor in tensors)
        result = func(*args, **kwargs)
        found = list(result) if isinstance(result, (tuple, list)) else [result]
        self._alive.extend(entry for entry in found if isinstance(entry, Tensor))
        if not reached:
            return result
        if not all(entry is None or isinstance(entry, Tensor) for entry in found):
            raise GraphError(f"{func} reads entries of a tensor: it cannot be recorded.")
        if func._schema.is_mutable:
            self._write(func, args, kwargs)
        replaced = pytree.tree_map(self._replaced, (tuple(args), dict(kwargs)))
        outputs = tuple(None if entry is None else self._number(entry) for entry in found)
        many = isinstance(result, (tuple, list))
        self._instructions.append(Instruction(func, replaced[0], tuple(replaced[1].items()), outputs, many))
        return result

    def recording(self, inputs: int, results: Sequence[Tensor]) -> Recording:
        """What was seen."""
        layouts = {
            index: Layout(it.shape, it.stride, it.storage, it.dtype, it.storage not in self._written)
            for index, it in self._layouts.items()
        }
        return Recording(inputs, tuple(self._instructions), tuple(self._replaced(entry) for entry in results), layouts)

    def _write(self, func: Any, args: Any, kwargs: Any) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[place] if place < len(args) else kwargs.get(argument.name)
            if not isinstance(target, Tensor):
                continue
            if id(target) not in self._index:
                raise GraphError(f"{func} writes into a tensor that is there for all vectors: it cannot be recorded.")
            self._written.add(self._layouts[self._index[id(target)]].storage)

    def _replaced(self, leaf: Any) -> Any:
        return Var(self._index[id(leaf)]) if isinstance(leaf, Tensor) and id(leaf) in self._index else leaf

    def _number(self, tensor: Tensor) -> int:
        found = self._index.get(id(tensor))
        if found is None:
            found = self._index[id(tensor)] = len(self._layouts)
            self._alive.append(tensor)
            storage = tensor.untyped_storage().data_ptr()
            self._layouts[found] = Layout(tuple(tensor.shape), tensor.stride(), storage, tensor.dtype)
        return found
