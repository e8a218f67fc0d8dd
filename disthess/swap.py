"""Call a module with other tensors in place of its own, which stay what and where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def call_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """``module(*args, **kwargs)`` with ``tensors`` in place of parameters and buffers, wherever these are used.

    As ``torch.func.functional_call``, but for a module that is reached by several paths: torch swaps its tensors once for every
    path, and puts back what the path before had swapped in, so that the module is left with the substitute.

    Args:
        module: Any module; unchanged afterwards.
        tensors: By any name of ``named_parameters`` or ``named_buffers``. One that is tied is replaced everywhere.
        args: Of the call.
        kwargs: Of the call.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> model, own = nn.Sequential(layer, layer), layer.weight
        >>> float(call_with(model, {"0.weight": torch.full((1, 1), 3.0)}, (torch.ones(1, 1),)).detach()), layer.weight is own
        (9.0, True)
    """
    names: dict[tuple[int, str], str] = {}
    held: dict[str, Tensor] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None:
                held[prefix + key] = value
                names.setdefault((id(child), key), prefix + key)
    places: dict[int, list[str]] = {}
    for name in names.values():
        places.setdefault(id(held[name]), []).append(name)
    swapped = {place: value for name, value in tensors.items() for place in places[id(held[name])]}
    return torch.func.functional_call(module, swapped, tuple(args), dict(kwargs or {}), tie_weights=False)
