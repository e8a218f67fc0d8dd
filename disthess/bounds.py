"""What is known of a Hessian's blocks before they are computed: bounds of their ranks."""

from __future__ import annotations

from collections.abc import Sequence

from disthess.graph.ranks import rank_bounds as bounds_of_graph
from disthess.prepare import Options, prepare
from disthess.problem import Problem, sample_count


def rank_bounds(problem: Problem, *, parameters: str | Sequence[str] | None = None) -> dict[tuple[str, str], int]:
    """``rank H_ab <= N min d`` for every pair of parameters: truncation at that rank loses nothing.

    ``d`` is the number of entries per sample of the narrowest node through which alone one parameter sees the other (in a chain,
    of the layers between them), and N the number of samples; the bounds of several uses and batches add up.

    Args:
        problem: One that can be captured.
        parameters: Globs; default all trainable ones.

    Returns:
        By pairs of first names, both orders, ``a`` not ``b``; no more than the block's smaller side. Pairs whose block is zero
        because the objective does not reach one are left out.

    Raises:
        GraphError: The model cannot be captured.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(9, 1), torch.nn.Tanh(), torch.nn.Linear(1, 9))
        >>> data = [(torch.randn(2, 9), torch.randn(2, 9))]
        >>> rank_bounds(Problem(model, loss="mse", batches=data))["0.weight", "2.weight"]  # 2 samples, one entry between
        2
    """
    prepared = prepare(problem, Options(parameters=parameters, method="graph"), checked=False)
    sizes = {p.name: p.tensor.numel() for p in prepared.problem.parameters() if p.name in prepared.names}
    found: dict[tuple[str, str], int] = {}
    for program, batch in zip(prepared.programs, prepared.problem.batches, strict=True):
        samples = sample_count(batch) if program.graph.independent else 1
        for (a, b), most in bounds_of_graph(program.graph, samples, sizes).items():
            found[a, b] = min(found.get((a, b), 0) + most, sizes[a], sizes[b])
    return found
