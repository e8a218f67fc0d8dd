"""One door to ``torch.export``: the objective of a batch as an exported, functional, lowered program."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from disthess.errors import DisthessError, GraphError
from disthess.graph.lower import lowerings
from disthess.graph.parts import part_linear_layers
from disthess.graph.splice import lower_in_place
from disthess.problem import ObjectiveModule, twice_differentiable


@final
class FlatObjective(nn.Module):
    """The objective as a function of the batch's tensors, so that export sees a flat list of inputs."""

    def __init__(self, objective: ObjectiveModule, batch: Any) -> None:
        super().__init__()
        self.objective = objective
        leaves, self.spec = pytree.tree_flatten(batch)
        self.fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        self.is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The objective of the batch that holds these tensors."""
        remaining = iter(tensors)
        leaves = [next(remaining) if given else value for given, value in zip(self.is_tensor, self.fixed, strict=True)]
        return self.objective(pytree.tree_unflatten(leaves, self.spec))


def batch_size(tensors: list[Tensor]) -> int:
    """Size of the first axis of the first tensor that has one."""
    sizes = [int(tensor.shape[0]) for tensor in tensors if tensor.ndim > 0]
    return sizes[0] if sizes else 1


def export_objective(module: nn.Module, tensors: list[Tensor], samples: int) -> tuple[ExportedProgram, str]:
    """Export with a dynamic batch dimension, else with the given shape; the note says why it is not dynamic."""
    if samples < 2:
        return _export_once(module, tensors, None), "there is one sample only"
    shapes = tuple({0: Dim.DYNAMIC} if tensor.ndim > 0 and tensor.shape[0] == samples else None for tensor in tensors)
    try:
        return _export_once(module, tensors, shapes), ""
    except DisthessError:
        raise
    except Exception as reason:
        first = _first_sentence(reason)
        return _export_once(module, tensors, None), f"the batch dimension cannot be made dynamic ({first})"


def _export_once(module: nn.Module, tensors: list[Tensor], shapes: Any) -> ExportedProgram:
    try:
        with warnings.catch_warnings(), _quiet(), twice_differentiable():
            warnings.simplefilter("ignore")
            exported = torch.export.export(
                module,
                tuple(tensor.clone() for tensor in tensors),
                dynamic_shapes=None if shapes is None else (shapes,),
            )
            part_linear_layers(exported)
            return exported if lower_in_place(exported, lowerings()) else exported.run_decompositions(lowerings())
    except DisthessError as refusal:
        raise _plain(refusal) from None
    except Exception as reason:
        if shapes is not None:
            raise
        ours = _cause(reason)
        if ours is not None:
            raise _plain(ours) from None
        raise GraphError(
            f"torch.export cannot capture this objective: {_first_sentence(reason)} Use method='autograd' (slower, without "
            "activation blocks), which needs no capture, or rewrite the part that depends on tensor values."
        ) from reason


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own log of a failed export, which we report in a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> DisthessError | None:
    """A refusal of ours that torch wrapped on its way."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, DisthessError):
            return current
        current = current.__cause__ or current.__context__
    return None


def _plain(refusal: DisthessError) -> DisthessError:
    """A refusal without what torch's tracer wrote under it."""
    return type(refusal)(str(refusal).split("\n\nWhile executing")[0])


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
