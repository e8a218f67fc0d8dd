"""Checks of a problem before anything is planned: what cannot have a Hessian is refused by name, with what to do."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from disthess.errors import ConfigError, DisthessError, ProblemError
from disthess.problem import Problem, sample_count


def check_problem(problem: Problem, selected: tuple[str, ...]) -> None:
    """Refuse a problem whose Hessian is undefined or would be wrong.

    Args:
        problem: In the dtype and on the device that will be used.
        selected: First names of the parameters wanted.

    A problem without values (on the meta device) is checked for what shapes and types tell.

    Raises:
        ProblemError: Integer, complex or half precision parameters; NaN or infinity in a weight, a buffer or a batch (named);
            an empty batch; an objective that fails, is no scalar, is NaN, does not depend on the parameters, or answers
            differently twice.
    """
    if not problem.without_values:
        check_tensors(problem)
    for index in range(len(problem.batches)):
        check_batch(problem, index, selected)


def check_given(problem: Any) -> None:
    """Refuse what is no problem.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"expected a disthess.Problem, got {type(problem).__name__}. Make one as "
            "disthess.Problem(model, loss='cross_entropy', batches=[(x, y)])."
        )


def check_parameters(problem: Problem) -> None:
    """Refuse a model without usable parameters.

    Raises:
        ConfigError: It is no problem.
        ProblemError: No parameter requires a gradient, or one of those has no entries, or one is integer or complex.
    """
    check_given(problem)
    trainable = problem.parameters()
    if not trainable:
        raise ProblemError(
            "the model has no parameter that requires a gradient; set requires_grad on those whose Hessian is wanted."
        )
    for parameter in trainable:
        if not parameter.tensor.numel():
            raise ProblemError(
                f"parameter {parameter.name} has no entries (its shape is {tuple(parameter.tensor.shape)}), so no block of a "
                "Hessian; give its layer a width, or call requires_grad_(False) on it."
            )
    for name, tensor in problem.model.named_parameters():
        if tensor.dtype.is_complex:
            raise ProblemError(
                f"parameter {name} is complex ({tensor.dtype}); disthess works on real parameters. Store real and imaginary parts "
                "as two real parameters."
            )
        if not tensor.dtype.is_floating_point:
            raise ProblemError(
                f"parameter {name} is {tensor.dtype}; only floating parameters have derivatives. Make it a buffer."
            )


def check_dtype(problem: Problem, dtype: str | None) -> None:
    """Half precision is computed only where the user asks for a wider dtype.

    Raises:
        ProblemError: A parameter is half precision and no dtype was given.
    """
    for parameter in problem.parameters():
        if parameter.tensor.dtype not in (torch.float32, torch.float64) and dtype is None:
            raise ProblemError(
                f"parameter {parameter.name} is {parameter.tensor.dtype}; second derivatives in half precision are mostly "
                "rounding. Pass dtype='float32' or dtype='float64' to compute the Hessian of the same weights in that precision."
            )


def select_parameters(problem: Problem, wanted: str | Sequence[str] | None, cut: Sequence[str] = ()) -> tuple[str, ...]:
    """First names of the trainable parameters that match any of the globs, in user order, and of those ``cut`` out as ranges.

    Raises:
        ConfigError: A glob matches no trainable parameter; near names are offered.
    """
    trainable = problem.parameters()
    if wanted is None:
        return tuple(parameter.name for parameter in trainable)
    chosen: set[str] = set(cut)
    for pattern in (wanted,) if isinstance(wanted, str) else tuple(wanted):
        if any(pattern in (p.name, *p.aliases) for p in trainable if p.name in cut):
            continue
        found = {p.name for p in trainable if any(fnmatch.fnmatchcase(name, pattern) for name in (p.name, *p.aliases))}
        if not found:
            names = [parameter.name for parameter in trainable]
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
            raise ConfigError(
                f"parameters={pattern!r} matches no trainable parameter of the model; near names: {', '.join(near)}."
            )
        chosen |= found
    return tuple(parameter.name for parameter in trainable if parameter.name in chosen)


def check_tensors(problem: Problem) -> None:
    """Refuse values that are no numbers, by name.

    Raises:
        ProblemError: NaN or infinity in a weight, a buffer or a batch; or a complex batch.
    """
    for name, tensor in problem.model.named_parameters():
        _check_finite(f"parameter {name}", tensor)
    for name, buffer in problem.model.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            _check_finite(f"buffer {name}", buffer)
    for index, batch in enumerate(problem.batches):
        for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                _check_finite(f"batch {index}, tensor {pytree.keystr(path) or 'itself'}", leaf)
            if isinstance(leaf, Tensor) and leaf.dtype.is_complex:
                raise ProblemError(f"batch {index}, tensor {pytree.keystr(path)} is complex; give real inputs.")


def _check_finite(what: str, tensor: Tensor) -> None:
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        raise ProblemError(
            f"{what} holds {int(bad.sum())} NaN or infinite value{'s' if int(bad.sum()) > 1 else ''} (the first at index "
            f"{list(place)}); a Hessian there means nothing. Mend the data or the checkpoint."
        )


def check_batch(problem: Problem, index: int, selected: Sequence[str]) -> None:
    """Refuse an objective that has no Hessian on one batch; `check_problem` does it for all.

    Raises:
        ProblemError: As `check_problem`, of that batch alone.
    """
    sample_count(problem.batches[index])
    first = _evaluate(problem, index)
    if not isinstance(first, Tensor):
        raise ProblemError(f"the objective returns {type(first).__name__}; it must return a scalar tensor.")
    if first.numel() != 1 or first.ndim > 0:
        raise ProblemError(
            f"the objective must be a scalar, it has shape {list(first.shape)} on batch {index}. Reduce it with .mean() or .sum()."
        )
    if not first.dtype.is_floating_point:
        raise ProblemError(f"the objective is {first.dtype}; it must be a real floating scalar.")
    values = not problem.without_values
    if values and not bool(torch.isfinite(first)):
        raise ProblemError(
            f"the objective is {first.item()} on batch {index}; check the data and the weights for overflow."
        )
    first, value = first.detach(), first
    second = _evaluate(problem, index).detach() if values else first
    if values and not torch.equal(first, second):
        raise ProblemError(
            f"the objective answers differently from call to call on batch {index} ({first.item():.9g}, then {second.item():.9g}): "
            "dropout, sampling or state that changes. Call model.eval(), set dropout to 0, or draw the noise once and pass "
            "it in the batch."
        )
    by_name = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    try:
        depends = value.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad(value, [by_name[name] for name in selected], allow_unused=True)
        )
    except RuntimeError as reason:
        text = " ".join(str(reason).split())
        raise ProblemError(
            f"the objective has no gradient on batch {index}: {text[:300]} Make it differentiable: no in-place "
            "writes to values that are needed later, use_reentrant=False for checkpoints."
        ) from reason
    if not depends:
        shown = ", ".join(selected[:5]) + (", ..." if len(selected) > 5 else "")
        raise ProblemError(
            f"the objective does not depend on any of the parameters asked for ({shown}) on batch {index}; look for detach(), "
            "no_grad() or a loss of the data alone."
        )


def _evaluate(problem: Problem, index: int) -> Any:
    try:
        with torch.enable_grad():
            return problem.value(problem.batches[index])
    except DisthessError:
        raise
    except Exception as reason:
        text = " ".join(str(reason).split())
        raise ProblemError(
            f"the objective failed on batch {index}: {type(reason).__name__}: {text[:300]}. It must run on the batch as "
            f"given, in {problem.dtype}; where an operation has no such kernel, choose another implementation or dtype."
        ) from reason


def casts_down(problem: Problem) -> str:
    """Where a float64 model itself casts values to float32, in a word, or empty; for models that were not captured."""
    with _CastWatch() as watch, torch.no_grad():
        problem.value(problem.batches[0])
    return watch.found


@final
class _CastWatch(TorchDispatchMode):
    """Remembers the first operation that makes float32 out of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = any(isinstance(entry, Tensor) and entry.dtype == torch.float64 for entry in args)
        if not self.found and wide and isinstance(result, Tensor) and result.dtype == torch.float32:
            self.found = str(func)
        return result
