"""The problem: a model, an objective and batches, which together are the scalar L(theta) whose Hessian is wanted."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from disthess.errors import ConfigError, ProblemError
from disthess.swap import call_with

Reduction = Literal["mean", "sum"]
Loss = str | Callable[[Any, Any], Tensor]
Objective = Callable[[nn.Module, Any], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """Softmax cross-entropy of logits ``[N, C, ...]`` against class indices or probabilities, over all positions."""
    return nn.functional.cross_entropy(outputs, targets, reduction=reduction)


def mse(outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """Squared error ``(outputs - targets)**2``; ``mean`` divides by the number of entries, as torch does."""
    return nn.functional.mse_loss(outputs, targets, reduction=reduction)


def hinge(outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """``max(0, 1 - targets * outputs)`` for targets of -1 and +1; 0 on the kink's flat side, as ``relu``."""
    margins = torch.relu(1 - targets * outputs.reshape(targets.shape))
    return margins.mean() if reduction == "mean" else margins.sum()


NAMED_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Reduction], Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "hinge": hinge,
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter tensor under its first name, with the other names of the same object."""

    name: str
    aliases: tuple[str, ...]
    tensor: nn.Parameter


@final
class ObjectiveModule(nn.Module):
    """The scalar objective of one batch as a module, whose only child is the model: what is captured and differentiated."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        # Not by train(), which reaches into the model: its children keep the modes that the user gave them.
        self.training = model.training
        self.without_values = any(map(_is_meta, model.parameters()))

    def forward(self, batch: Any) -> Tensor:
        """The objective on one batch."""
        # What a model creates as it runs (states, masks) is then on the meta device as well.
        with torch.device("meta") if self.without_values else nullcontext():
            return self.recipe.evaluate(self.model, batch)


@final
class Recipe:
    """How a model and a batch give a scalar; holds no tensors."""

    def __init__(self, loss: Loss | None, objective: Objective | None, reduction: Reduction) -> None:
        self.loss = loss
        self.objective = objective
        self.reduction: Reduction = reduction

    def evaluate(self, model: nn.Module, batch: Any) -> Tensor:
        """The objective of ``model`` on ``batch``."""
        if self.objective is not None:
            return self.objective(model, batch)
        inputs, targets = batch
        return self.loss_of(call_model(model, inputs), targets)

    def loss_of(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a model's outputs; a named loss takes ``outputs.logits`` where there is such a thing."""
        if callable(self.loss):
            return self.loss(outputs, targets)
        return NAMED_LOSSES[str(self.loss)](getattr(outputs, "logits", outputs), targets, self.reduction)

    @property
    def title(self) -> str:
        """The objective in a word."""
        if self.objective is not None:
            return f"objective {_name(self.objective)}"
        return f"{_name(self.loss)} ({self.reduction})" if isinstance(self.loss, str) else f"loss {_name(self.loss)}"


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__qualname__)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model on a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


@final
class Problem:
    """A model, an objective and batches: the scalar ``L(theta) = sum_b weight_b * objective(model, batch_b)``.

    Args:
        model: Any ``torch.nn.Module``. It is never changed, nor are its buffers.
        loss: ``"cross_entropy"``, ``"mse"``, ``"hinge"``, or a callable ``(outputs, targets) -> scalar``. Batches are then
            ``(inputs, targets)``; inputs are a tensor, a tuple (positional) or a dict (keywords).
        objective: Instead of ``loss``: any callable ``(model, batch) -> scalar``; batches are whatever it takes
            (tensors in tuples, lists or dicts).
        batches: One or more batches. ``L`` is their weighted sum.
        reduction: ``"mean"`` or ``"sum"``. For a named loss it is the loss's own reduction over samples, ``1/N`` or 1. For
            several batches without ``weights`` it also says how they add up: ``mean`` weighs a batch by its share of all
            samples (``n_b / sum n``), ``sum`` by 1. A callable loss or objective does its own reduction inside a batch.
        weights: One number per batch, in place of the weights above.
        weight_decay: Adds ``sum_p lambda_p / 2 * |theta_p|^2`` to ``L``, as the ``weight_decay`` of optimisers does: one number
            for all trainable parameters, or a mapping from globs of names to numbers. It adds ``lambda_p`` to the diagonal of the
            hessian and ggn parts, outside the graph.
        output: With ``objective``: name of the module whose output is the model's output, so that the ``ggn`` and
            ``residual`` parts are defined. With ``loss`` it is known.

    Raises:
        ConfigError: Both or neither of ``loss`` and ``objective``, an unknown loss name, no batches, weights that do not match
            them, or a weight decay that is no number or matches no parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> problem = Problem(model, loss="mse", batches=[(torch.ones(3, 2), torch.zeros(3, 1))])
        >>> problem.numel
        3
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Loss | None = None,
        objective: Objective | None = None,
        batches: Sequence[Any],
        reduction: Reduction = "mean",
        weights: Sequence[float] | None = None,
        weight_decay: float | Mapping[str, float] = 0.0,
        output: str | None = None,
    ) -> None:
        _check_arguments(model, loss, objective, reduction)
        if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Sequence) or len(batches) == 0:
            raise ConfigError(
                f"batches must be a list of at least one batch, got {type(batches).__name__}"
                f"{' of length 0' if isinstance(batches, Sequence) else ''}. For a single batch write batches=[batch]."
            )
        self.model = model
        self.recipe = Recipe(loss, objective, reduction)
        self.batches = tuple(batches)
        if loss is not None:
            for position, batch in enumerate(self.batches):
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise ConfigError(
                        f"batch {position} must be a pair (inputs, targets) when loss= is given, got "
                        f"{type(batch).__name__}"
                        f"{f' of length {len(batch)}' if hasattr(batch, '__len__') else ''}. Write batches=[(x, y)], or pass "
                        "objective=callable(model, batch) for other shapes of batch."
                    )
        if weights is not None and len(weights) != len(self.batches):
            raise ConfigError(
                f"weights has {len(weights)} entries for {len(self.batches)} batches; give one number per batch, or leave it out."
            )
        self._weights = None if weights is None else tuple(float(weight) for weight in weights)
        self.output = output
        self.weight_decay = _decay(weight_decay, self.parameters())

    @property
    def reduction(self) -> Reduction:
        """``mean`` or ``sum``."""
        return self.recipe.reduction

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each batch in ``L``."""
        if self._weights is not None:
            return self._weights
        if self.reduction == "sum" or len(self.batches) == 1:
            return (1.0,) * len(self.batches)
        sizes = [sample_count(batch) for batch in self.batches]
        return tuple(size / sum(sizes) for size in sizes)

    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter tensor that requires a gradient, once, in ``named_parameters()`` order, with its aliases."""
        names: dict[int, list[str]] = {}
        tensors: dict[int, nn.Parameter] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if tensor.requires_grad:
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
        return tuple(Parameter(found[0], tuple(found[1:]), tensors[key]) for key, found in names.items())

    @property
    def numel(self) -> int:
        """``P``, the number of trainable parameters."""
        return sum(parameter.tensor.numel() for parameter in self.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' common floating dtype (the widest, where they differ)."""
        kinds = {parameter.tensor.dtype for parameter in self.parameters()}
        return torch.float64 if torch.float64 in kinds else next(iter(kinds), torch.float32)

    @property
    def without_values(self) -> str:
        """The first tensor that has a shape and no values (on torch's meta device), in words; empty where all have values.

        >>> with torch.device("meta"):
        ...     model = nn.Linear(2, 1)
        >>> Problem(model, loss="mse", batches=[(torch.ones(3, 2), torch.ones(3, 1))]).without_values
        'parameter weight'
        """
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        found = [f"parameter {name}" if isinstance(tensor, nn.Parameter) else f"buffer {name}"
                 for name, tensor in named if tensor.is_meta]  # fmt: skip
        found += [
            f"batch {place}" for place, batch in enumerate(self.batches) if any(map(_is_meta, batch_tensors(batch)))
        ]
        return found[0] if found else ""

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Problem:
        """A deep copy with floating tensors in ``dtype`` on ``device``; ties are kept, the original is not touched.

        Raises:
            ProblemError: The model cannot be copied; or the problem has no values, and the device is to have some.
        """
        lacking = self.without_values
        if lacking and torch.device(device).type != "meta":
            raise ProblemError(
                f"this problem has shapes and no values: {lacking} is on torch's meta device. That is enough for disthess.plan and "
                "'disthess plan', and for nothing else. To compute, build the model outside torch.device('meta'), load its "
                "weights, and give batches that hold data."
            )
        model = _copied(self.model).to(device)
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[key] = buffer.to(dtype)
        for tensor in model.parameters():
            tensor.grad = None
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        moved = object.__new__(Problem)
        moved.model = model
        moved.recipe = self.recipe
        moved.batches = tuple(pytree.tree_map(lambda leaf: _move(leaf, dtype, device), batch) for batch in self.batches)
        moved._weights = self.weights
        moved.output = self.output
        moved.weight_decay = self.weight_decay
        return moved

    def module(self) -> ObjectiveModule:
        """The objective of one batch as a module over this problem's own model."""
        return ObjectiveModule(self.model, self.recipe)

    def value(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The objective on one batch, differentiable twice, buffers untouched.

        Args:
            batch: One of ``batches``.
            parameters: Tensors to use in place of the model's, by name.

        Returns:
            Whatever the objective returns, a scalar for a well-formed problem.
        """
        module = self.module()
        swapped: dict[str, Tensor] = {f"model.{name}": value for name, value in (parameters or {}).items()}
        swapped.update({name: buffer.clone() for name, buffer in module.named_buffers()})
        with twice_differentiable():
            return call_with(module, swapped, (batch,))

    def outputs(self, inputs: Any, parameters: Mapping[str, Tensor]) -> Any:
        """The model's outputs with ``parameters`` in place of its own, buffers untouched."""
        swapped: dict[str, Tensor] = dict(parameters)
        swapped.update({name: buffer.clone() for name, buffer in self.model.named_buffers()})
        args = () if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        with twice_differentiable():
            return call_with(self.model, swapped, args, kwargs)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Choose kernels that have second derivatives: attention by plain products, recurrent nets without mkldnn."""
    with ExitStack() as stack:
        with warnings.catch_warnings():
            # Entering mkldnn.flags touches a TF32 switch that a CPU build warns about.
            warnings.simplefilter("ignore")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def batch_tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in the order of its tree."""
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _is_meta(tensor: Tensor) -> bool:
    return bool(tensor.is_meta)


def sample_count(batch: Any) -> int:
    """Number of samples of a batch: the size of the first axis of its first tensor that has one.

    Raises:
        ProblemError: The batch holds no such tensor, or no samples.
    """
    for tensor in batch_tensors(batch):
        if tensor.ndim > 0:
            if tensor.shape[0] == 0:
                raise ProblemError("a batch holds 0 samples; give batches with at least one sample each.")
            return int(tensor.shape[0])
    return 1


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as reason:
        raise ProblemError(
            f"the model cannot be copied ({' '.join(str(reason).split())[:160]}). A module holds a tensor that has a history, as "
            "the old torch.nn.utils.weight_norm does: use torch.nn.utils.parametrizations, or compute it inside forward()."
        ) from reason


def _decay(given: float | Mapping[str, float], parameters: Sequence[Parameter]) -> dict[str, float]:
    """Weight decay of each parameter that has one, by first name; of several globs that match, the last counts."""
    globs = dict(given) if isinstance(given, Mapping) else {"*": given}
    found: dict[str, float] = {}
    for glob, value in globs.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"weight_decay must be a finite number, or a mapping from names to such, got {value!r}.")
        names = [p.name for p in parameters if any(fnmatch.fnmatchcase(name, glob) for name in (p.name, *p.aliases))]
        if not names and value:
            known = ", ".join(p.name for p in parameters[:6])
            raise ConfigError(
                f"weight_decay names {glob!r}, which matches no trainable parameter; there are {known} ..."
            )
        found.update(dict.fromkeys(names, float(value)))
    return {name: value for name, value in found.items() if value}


def _move(leaf: Any, dtype: torch.dtype, device: str | torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(device=device, dtype=dtype if leaf.is_floating_point() else leaf.dtype)


def _check_arguments(model: Any, loss: Any, objective: Any, reduction: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if (loss is None) == (objective is None):
        raise ConfigError(
            "give exactly one of loss= (a name, or a callable on (outputs, targets)) and objective= (a callable on "
            f"(model, batch)); got {'both' if loss is not None else 'neither'}."
        )
    if isinstance(loss, str) and loss not in NAMED_LOSSES:
        raise ConfigError(
            f"loss {loss!r} is not known; known names are {', '.join(sorted(NAMED_LOSSES))}. Any other loss can be given as a "
            "callable on (outputs, targets)."
        )
    if loss is not None and not isinstance(loss, str) and not callable(loss):
        raise ConfigError(f"loss must be a name or a callable on (outputs, targets), got {type(loss).__name__}.")
    if inspect.isclass(loss):
        raise ConfigError(f"loss is the class {loss.__name__}; give an instance, {loss.__name__}().")
    if objective is not None and not callable(objective):
        raise ConfigError(f"objective must be callable on (model, batch), got {type(objective).__name__}.")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
