"""Which entries of the flattened parameters a block has: by parameter, by module, by role, or by patterns with their own names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import nn

from disthess.errors import ConfigError
from disthess.linalg.block_map import Places
from disthess.problem import Parameter
from disthess.reduce.sections import Sections
from disthess.roles import ROLES, roles_of
from disthess.store.layout import ParameterSpec

Grouping = Literal["parameters", "modules", "roles"]
GROUPINGS: tuple[Grouping, ...] = ("parameters", "modules", "roles")

Blocks = Grouping | Mapping[str, str | Sequence[str]]

ROLE = "@"
"""Before the name of a role, where a pattern is expected."""

OWN = "(the model itself)"
"""Block of the parameters that are no submodule's."""

_RANGED = re.compile(r"^(?P<glob>.+)\[(?P<ranges>\s*(-?\d*:-?\d*|-?\d+)\s*(,\s*(-?\d*:-?\d*|-?\d+)\s*)*)\]$")


def find_blocks(model: nn.Module, chosen: Sequence[Parameter], blocks: Blocks) -> dict[str, Places]:
    """Places of every block among the entries of the chosen parameters, one after the other in the order given.

    Args:
        model: Whose parameters they are.
        chosen: The parameters.
        blocks: ``parameters``: each its own; ``modules``: those of one module together; ``roles``: by what they are for, see
            `disthess.roles`; or patterns by the block's name, one or a list: a glob of parameter names (``encoder.*.bias``), such a
            glob with ranges of rows and columns (``*.in_proj_weight[0:64]``), or a role (``@norms``).

    Returns:
        Places in ascending order; a slice where they lie together.

    Raises:
        ConfigError: The grouping is unknown, a pattern matches nothing, or a range is outside a parameter that it matches.

    Example:
        >>> from disthess.problem import Problem
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> parameters = Problem(model, loss="mse", batches=[(torch.ones(1, 2), torch.ones(1, 1))]).parameters()
        >>> find_blocks(model, parameters, {"first rows": "*.weight[0:1]", "biases": ["*.bias"]})["biases"].tolist()
        [6, 7, 8, 12]
    """
    specs = [
        ParameterSpec(entry.name, entry.aliases, tuple(entry.tensor.shape), rank, ())
        for rank, entry in enumerate(chosen)
    ]
    starts = dict(zip((spec.name for spec in specs), np.cumsum([0, *(spec.numel for spec in specs)]), strict=False))
    if isinstance(blocks, str):
        groups = _grouped(model, specs, blocks)
    else:
        groups = {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in blocks.items()}
    finder = Sections(specs, {})
    found = {}
    for name, patterns in groups.items():
        texts = [text for pattern in patterns for text in _expand(model, specs, name, pattern)]
        sections = [finder.find(text) for text in texts]
        # Marked, not sorted: numpy's unique takes seconds for ten million places.
        member = np.zeros(sum(spec.numel for spec in specs), dtype=bool)
        for section in sections:
            start = int(starts[section.parameter.name])
            member[start : start + section.parameter.numel][section.indices()] = True
        found[name] = _tidy(np.flatnonzero(member))
    return found


def _grouped(model: nn.Module, specs: Sequence[ParameterSpec], kind: str) -> dict[str, list[str]]:
    if kind not in GROUPINGS:
        raise ConfigError(
            f"blocks must be one of {', '.join(GROUPINGS)}, or patterns by name such as {{norms: ['*norm*']}}; got {kind!r}."
        )
    if kind == "parameters":
        return {spec.name: [spec.name] for spec in specs}
    groups: dict[str, list[str]] = {}
    if kind == "modules":
        for spec in specs:
            groups.setdefault(spec.name.rpartition(".")[0] or OWN, []).append(spec.name)
        return groups
    known = {name for spec in specs for name in (spec.name, *spec.aliases)}
    for role, texts in roles_of(model).items():
        chosen = [text for text in texts if text.partition("[")[0] in known]
        if chosen:
            groups[role] = chosen
    if not groups:
        raise ConfigError(
            f"no parameter has one of the roles {', '.join(ROLES)} by its name; name the blocks by patterns."
        )
    return groups


def _expand(model: nn.Module, specs: Sequence[ParameterSpec], name: str, pattern: str) -> list[str]:
    """Section texts that a pattern stands for."""
    known = [spec.name for spec in specs]
    every = {alias: spec.name for spec in specs for alias in (spec.name, *spec.aliases)}
    if pattern in every:
        return [every[pattern]]
    if pattern.startswith(ROLE):
        texts = [text for text in roles_of(model).get(pattern[1:], ()) if text.partition("[")[0] in every]
        if not texts:
            raise ConfigError(
                f"block {name!r} is the role {pattern!r}, which no parameter chosen has; roles are "
                f"{', '.join(ROLE + role for role in ROLES)}, and any other block can be named by patterns."
            )
        return texts
    form = _RANGED.match(pattern)
    glob, ranges = (form["glob"], f"[{form['ranges']}]") if form else (pattern, "")
    # One text for each parameter, whatever its other names.
    matched = dict.fromkeys(every[alias] for alias in every if fnmatch.fnmatchcase(alias, glob))
    if not matched:
        raise ConfigError(
            f"block {name!r} is {pattern!r}, which matches no trainable parameter; there are {', '.join(known[:6])}"
            f"{' ...' if len(known) > 6 else ''}."
        )
    return [f"{match}{ranges}" for match in matched]


def _tidy(places: np.ndarray) -> Places:
    if places[-1] - places[0] + 1 == len(places):
        return slice(int(places[0]), int(places[-1]) + 1)
    return places
