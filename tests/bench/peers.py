"""What disthess is compared with: columns of the Hessian by torch.func and by curvlinops, dense and in memory.

Both take the same model, tensors and mean cross-entropy. Attention is computed by its plain formula for them: torch's fused
kernels cannot be differentiated twice.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import disthess

CHUNKS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to some columns of the Hessian.

    Attributes:
        tool: Its name.
        chunk: Columns at a time.
        product: From column numbers ``[K]`` to these columns, as rows: ``[K, P]``.
    """

    tool: str
    chunk: int
    product: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.tool}, chunk {self.chunk}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Columns by a peer.

    Attributes:
        seconds: Of the columns.
        scaled: The same for all columns: times ``P`` over their number.
        matrix: The columns as rows, ``[K, P]``.
    """

    seconds: float
    scaled: float
    matrix: Tensor


def peers_of(problem: disthess.Problem, dtype: str, chunks: Sequence[int] = CHUNKS) -> tuple[Peer, ...]:
    """All peers that are installed, with every chunk size; says which is left out."""
    moved = problem.to(getattr(torch, dtype))
    tools = {"torch.func": torch_func_columns(moved)}
    if importlib.util.find_spec("curvlinops") is None:
        print('curvlinops is left out: it is not installed (pip install -e ".[bench]")')
    else:
        tools["curvlinops"] = curvlinops_columns(moved)
    return tuple(Peer(tool, chunk, product) for tool, product in tools.items() for chunk in chunks)


def torch_func_columns(problem: disthess.Problem) -> Callable[[Tensor], Tensor]:
    """``vmap`` of ``jvp`` of ``grad`` over columns of the identity."""
    (inputs, targets), model = problem.batches[0], problem.model
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    sizes = [tensor.numel() for tensor in parameters.values()]

    def loss(values: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

    def product(vector: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        tangents = {name: part.reshape(tensor.shape) for (name, tensor), part in parts}
        _, change = jvp(grad(loss), (parameters,), (tangents,))
        return torch.cat([entry.reshape(-1) for entry in change.values()])

    def columns(numbers: Tensor) -> Tensor:
        basis = torch.zeros(len(numbers), sum(sizes), dtype=problem.dtype)
        basis[torch.arange(len(numbers)), numbers] = 1
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(product)(basis)

    return columns


def curvlinops_columns(problem: disthess.Problem) -> Callable[[Tensor], Tensor]:
    """``HessianLinearOperator @ columns``. Its own check of the data is done here, not on the clock."""
    from curvlinops import HessianLinearOperator

    model, parameters = problem.model, list(problem.model.parameters())
    numel = sum(parameter.numel() for parameter in parameters)
    with sdpa_kernel(SDPBackend.MATH):
        operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [problem.batches[0]])

    def columns(numbers: Tensor) -> Tensor:
        basis = torch.zeros(numel, len(numbers), dtype=problem.dtype)
        basis[numbers, torch.arange(len(numbers))] = 1
        with sdpa_kernel(SDPBackend.MATH):
            return (operator @ basis).detach().T

    return columns


def autograd_column(problem: disthess.Problem, number: int) -> Tensor:
    """One column of the Hessian, ``[P]``, by autograd twice over the eager model in float64: the arbiter where others differ."""
    moved = problem.to(torch.float64)
    (inputs, targets), parameters = moved.batches[0], list(moved.model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = nn.functional.cross_entropy(moved.model(inputs), targets)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        entry = torch.cat([part.reshape(-1) for part in gradient])[number]
        column = torch.autograd.grad(entry, parameters, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in column])


def spread_columns(numel: int, wanted: int | None) -> Tensor:
    """Numbers of so many columns at equal distances over all parameters; None for all.

    >>> spread_columns(10, 4).tolist()
    [0, 2, 5, 7]
    """
    count = numel if wanted is None else min(wanted, numel)
    return torch.arange(count) * numel // count


def time_peer(peer: Peer, columns: Tensor, numel: int, dtype: str, threads: int) -> Timing:
    """Time a peer on some columns, after one chunk off the clock, and scale up to all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peer.product(columns[: peer.chunk])
        begin = time.perf_counter()
        matrix = torch.empty(len(columns), numel, dtype=getattr(torch, dtype))
        for start in range(0, len(columns), peer.chunk):
            matrix[start : start + peer.chunk] = peer.product(columns[start : start + peer.chunk])
        seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(before)
    return Timing(seconds, seconds * numel / len(columns), matrix)
