"""A range of a parameter as a parameter of its own, all else of it a constant: so that it alone is differentiated.

``parameters=["attn.in_proj_weight[0:64]"]`` selects such ranges. The problem's copy is changed, not the user's model: the module
gets a parameter of that name and the rest as a buffer, and puts the whole together whenever it is read.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disthess.errors import ConfigError
from disthess.problem import Parameter, Problem
from disthess.reduce.sections import Section, Sections
from disthess.store.layout import ParameterSpec

Ranges = tuple[tuple[int, int], ...]


def cut_parameters(problem: Problem, patterns: Sequence[str]) -> tuple[str, ...]:
    """Cut the ranges that patterns name out of their parameters, in place; a no-op where none does.

    Args:
        problem: A copy that nobody else holds.
        patterns: Globs, and ranges of parameters.

    Returns:
        Names of the new parameters.

    Raises:
        ConfigError: Ranges overlap, are outside the parameter, or a glob asks for the whole of it as well; or the model reads the
            parameter in a way that would not see the change.
    """
    trainable = problem.parameters()
    names = {name: parameter for parameter in trainable for name in (parameter.name, *parameter.aliases)}
    asked = {text: text.rpartition("[")[0] for text in patterns if text.endswith("]") and text not in names}
    texts = {text: names[name] for text, name in asked.items() if name in names}
    if not texts:
        return ()
    others = [text for text in patterns if text not in texts]
    specs = [ParameterSpec(p.name, p.aliases, tuple(p.tensor.shape), rank, ()) for rank, p in enumerate(trainable)]
    finder = Sections(specs, {})
    found: dict[str, dict[str, Section]] = {}
    for text, parameter in texts.items():
        if any(fnmatch.fnmatchcase(name, other) for other in others for name in (parameter.name, *parameter.aliases)):
            raise ConfigError(
                f"parameters names the range {text!r} and, by another pattern, all of {parameter.name}; leave one of them out."
            )
        found.setdefault(parameter.name, {})[text.rpartition(".")[2]] = finder.find(text)
    lacking = bool(problem.without_values)
    slopes = {} if lacking else _slopes(problem, list(found))
    cut = []
    for parameter in trainable:
        sections = found.get(parameter.name, {})
        new = _cut(problem, parameter, sections) if sections else []
        cut += new
        seen = _slopes(problem, new) if new and not lacking else {}
        for name, section in zip(new, sections.values(), strict=True):
            wanted = slopes[parameter.name][tuple(slice(*ends) for ends in section.ranges)] if seen else None
            if wanted is not None and not torch.allclose(
                seen[name], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())
            ):
                raise ConfigError(
                    f"the range {name} cannot be cut out: the model does not read {parameter.name} as an attribute of its module. "
                    f"Select the whole parameter."
                )
    return tuple(cut)


def _slopes(problem: Problem, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the objective of all batches: what tells whether the model sees a parameter."""
    tensors = {parameter.name: parameter.tensor for parameter in problem.parameters()}
    total = {name: torch.zeros_like(tensors[name]).detach() for name in names}
    for batch in problem.batches:
        value = problem.value(batch)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            continue  # the checks that follow say so
        found = torch.autograd.grad(value, [tensors[name] for name in names], allow_unused=True, materialize_grads=True)
        total = {name: total[name] + gradient for name, gradient in zip(names, found, strict=True)}
    return total


def _cut(problem: Problem, parameter: Parameter, sections: dict[str, Section]) -> list[str]:
    _check_apart(parameter.name, sections)
    leaves = {
        text: nn.Parameter(
            parameter.tensor.detach()[tuple(slice(*ends) for ends in section.ranges)].clone(
                memory_format=torch.contiguous_format
            )
        )
        for text, section in sections.items()
    }
    rest = parameter.tensor.detach().clone()
    ranges = {text: section.ranges for text, section in sections.items()}
    modules = dict(problem.model.named_modules(remove_duplicate=False))
    done: set[tuple[int, str]] = set()
    for name in (parameter.name, *parameter.aliases):
        path, _, key = name.rpartition(".")
        module = modules[path]
        if (id(module), key) in done:
            continue
        done.add((id(module), key))
        if isinstance(module, nn.RNNBase):
            raise ConfigError(
                f"no range of {name} can be cut out: recurrent layers of torch keep a list of their own of their parameters. "
                f"Select the whole parameter."
            )
        # Names of one module's ranges are told by the name that the module knows the parameter by.
        own = {f"{key}[{text.partition('[')[2]}": text for text in leaves}
        _replace(
            module, key, {new: leaves[text] for new, text in own.items()}, rest, {n: ranges[t] for n, t in own.items()}
        )
    path = parameter.name.rpartition(".")[0]
    prefix = f"{path}." if path else ""
    key = parameter.name.rpartition(".")[2]
    names = [f"{prefix}{key}[{text.partition('[')[2]}" for text in leaves]
    decay = problem.weight_decay.get(parameter.name, 0.0)
    if decay:
        problem.weight_decay = {**problem.weight_decay, **dict.fromkeys(names, decay)}
    return names


def _replace(
    module: nn.Module, key: str, leaves: dict[str, nn.Parameter], rest: Tensor, ranges: dict[str, Ranges]
) -> None:
    old = dict(module._parameters)
    module._parameters.clear()
    for name, value in old.items():
        module._parameters.update(leaves if name == key else {name: value})
    buffer = f"{key}[rest]"
    module.register_buffer(buffer, rest, persistent=False)

    def whole(self: Any) -> Tensor:
        return _placed(self._buffers[buffer], [(self._parameters[name], ends) for name, ends in ranges.items()])

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {key: property(whole), "__qualname__": kind.__qualname__})


def _placed(base: Tensor, leaves: Sequence[tuple[Tensor, Ranges]]) -> Tensor:
    """``base`` with each leaf at its ranges, joined by ``cat`` from slabs, so that each leaf stays whole wherever that can be."""
    if not leaves:
        return base
    for axis, size in enumerate(base.shape):
        slabs = _slabs([ends[axis] for _, ends in leaves])
        if slabs == [(0, size)]:
            continue
        parts, last = [], 0
        for start, stop in slabs:
            inside = [
                (
                    leaf,
                    tuple(
                        (low - start, high - start) if at == axis else (low, high)
                        for at, (low, high) in enumerate(ends)
                    ),
                )
                for leaf, ends in leaves
                if start <= ends[axis][0] < stop
            ]
            parts += [base.narrow(axis, last, start - last), _placed(base.narrow(axis, start, stop - start), inside)]
            last = stop
        parts.append(base.narrow(axis, last, size - last))
        return torch.cat([part for part in parts if part.shape[axis]], dim=axis)
    if len(leaves) == 1:
        return leaves[0][0]
    return _placed(_placed(base, leaves[1:]), leaves[:1])


def _slabs(ends: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals, those that overlap as one, sorted.

    >>> _slabs([(4, 6), (0, 2), (1, 3)])
    [(0, 3), (4, 6)]
    """
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ends):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def _check_apart(name: str, sections: dict[str, Section]) -> None:
    texts = list(sections)
    for place, first in enumerate(texts):
        for second in texts[place + 1 :]:
            pairs = zip(sections[first].ranges, sections[second].ranges, strict=True)
            if all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs):
                raise ConfigError(f"the ranges {first!r} and {second!r} of {name} overlap; give ranges that do not.")
