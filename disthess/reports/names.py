"""Long dotted names, shortened for pictures and tables so that they still differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 26
"""Letters of a short name."""


def short_names(names: Sequence[str], longest: int = LONGEST) -> tuple[str, ...]:
    """Each name without the modules that all share, and without its middle where it is still long; all different.

    >>> short_names(["encoder.layer.0.attention.self.query.weight", "encoder.layer.11.output.LayerNorm.bias"])
    ('0.attention…query.weight', '11.output.LayerNorm.bias')
    >>> short_names(["0.weight"])
    ('0.weight',)
    """
    drop = _shared(names)
    bare = [".".join(name.split(".")[drop:]) for name in names]
    short = [_cut(name, longest) for name in bare]
    taken: dict[str, int] = {}
    for name in short:
        taken[name] = taken.get(name, 0) + 1
    # Two that look the same in short are written out.
    return tuple(
        brief if taken[brief] == 1 else whole if bare.count(whole) == 1 else name
        for brief, whole, name in zip(short, bare, names, strict=True)
    )


def anchor(text: str) -> str:
    """Letters, digits and dashes.

    >>> anchor("lambda_max"), anchor("<script>")
    ('lambda-max', 'script')
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _shared(names: Sequence[str]) -> int:
    """Leading modules that all names share; the last piece of a name is never one."""
    if len(names) < 2:
        return 0
    split = [name.split(".") for name in names]
    most = min(len(pieces) for pieces in split) - 1
    return next((at for at in range(most) if len({pieces[at] for pieces in split}) > 1), max(0, most))


def _cut(name: str, longest: int) -> str:
    if len(name) <= longest:
        return name
    pieces = name.split(".")
    for tail in (2, 1):
        for head in range(len(pieces) - tail - 1, 0, -1):
            brief = f"{'.'.join(pieces[:head])}…{'.'.join(pieces[-tail:])}"
            if len(brief) <= longest:
                return brief
    keep = (longest - 1) // 2
    return f"{name[:keep]}…{name[-keep:]}"
