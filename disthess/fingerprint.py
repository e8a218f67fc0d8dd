"""What a store belongs to: enough to refuse another problem and to say what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from disthess.planning.plan import Plan
from disthess.problem import Problem


def fingerprint(problem: Problem, names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Names, shapes and hashes of everything the Hessian depends on, as JSON values.

    Args:
        problem: In the run's dtype.
        names: Selected parameters.
        plan: The plan; the parts of it that decide the store's bytes are included.
    """
    layout = plan.layout
    return {
        **problem_fingerprint(problem, names),
        "dtype": layout.dtype,
        "parts": list(layout.parts),
        "method": plan.method,
        "sharing": plan.sharing,
        "sweeps": [f"{s.source}: {s.basis}, stack {s.stack}, microbatch {s.samples}" for s in plan.sources],
        "activations": [entry.name for entry in layout.activations],
        "activations per sample": bool(layout.activation_samples),
        "tiles": len(layout.tiles),
    }


def problem_fingerprint(problem: Problem, names: Sequence[str]) -> dict[str, Any]:
    """The same without how it is computed.

    Args:
        problem: In the run's dtype.
        names: Selected parameters.
    """
    return {
        "model": type(problem.model).__qualname__,
        "training mode": bool(problem.model.training),
        "objective": problem.recipe.title,
        "output": problem.output or "",
        "parameters": {p.name: f"{list(p.tensor.shape)} {_digest(p.tensor)}" for p in problem.parameters()},
        "other tensors": {
            name: _digest(tensor)
            for name, tensor in (*problem.model.named_buffers(), *problem.model.named_parameters())
            if isinstance(tensor, Tensor) and not (isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad)
        },
        "selected parameters": list(names),
        "batches": [_batch(batch) for batch in problem.batches],
        "batch weights": [float(weight) for weight in problem.weights],
        "weight decay": {name: value for name, value in problem.weight_decay.items() if name in names},
    }


def _batch(batch: Any) -> dict[str, str]:
    return {
        pytree.keystr(path) or "tensor": f"{list(leaf.shape)} {_digest(leaf)}"
        if isinstance(leaf, Tensor)
        else repr(leaf)[:80]
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def data_hash(problem: Problem) -> str:
    """What the numbers of an audit depend on beside the weights: batches, their weights, objective and decay; hexadecimal.

    Args:
        problem: As its factory made it.
    """
    about = {
        "objective": problem.recipe.title,
        "reduction": problem.reduction,
        "batches": [_batch(batch) for batch in problem.batches],
        "weights": [float(weight) for weight in problem.weights],
        "decay": dict(problem.weight_decay),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def weights_hash(problem: Problem) -> str:
    """The model's parameters and buffers; hexadecimal."""
    entries = {
        name: _digest(tensor) for name, tensor in problem.model.state_dict().items() if isinstance(tensor, Tensor)
    }
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
