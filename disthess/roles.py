"""What parameters are for, by the usual names and modules: attention's q, k, v and o, gate, up, down, norms, embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from disthess.sections import attention_sections

_NAMES: Mapping[str, str] = {
    "q": r"q|q_proj|query|q_lin|wq|to_q|query_proj",
    "k": r"k|k_proj|key|k_lin|wk|to_k|key_proj",
    "v": r"v|v_proj|value|v_lin|wv|to_v|value_proj",
    "o": r"o_proj|out_proj|out_lin|wo|to_out(\.0)?|(attention|attn|self_attn)\.(output\.dense|c_proj|dense|proj|o)",
    "gate": r"gate_proj|wi_0",
    "up": r"up_proj|fc1|c_fc|lin1|linear1|intermediate\.dense|wi|wi_1|dense_h_to_4h",
    "down": r"down_proj|fc2|lin2|linear2|mlp\.c_proj|output\.dense|dense_4h_to_h",
}
"""Role to the last words of a module's path. The first that matches counts, so that ``attention.output.dense`` is no ``down``."""

ROLES = (*_NAMES, "norms", "embeddings")


def roles_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameters and ranges of parameters, as section texts, by role; roles that no parameter has are left out.

    Stacked projections are cut as `disthess.attention_sections` says. Norms and embeddings are known by the names of their
    modules' classes; what has none of these roles is in none.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 1, 8)
        >>> found = roles_of(layer)
        >>> found["q"], found["up"], sorted(found)
        (('self_attn.in_proj_weight[0:4]', 'self_attn.in_proj_bias[0:4]'), ('linear1.weight', 'linear1.bias'), \
['down', 'k', 'norms', 'o', 'q', 'up', 'v'])
    """
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    cut = attention_sections(model)
    for name, text in cut.items():
        found[name.split(".")[-2]].append(text)
    taken = {text.partition("[")[0] for text in cut.values()}
    for path, module in model.named_modules():
        role = _role(path, module)
        if role is not None:
            names = (f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))
            found[role].extend(name for name in names if name not in taken)
    return {role: tuple(texts) for role, texts in found.items() if texts}


def _role(path: str, module: nn.Module) -> str | None:
    kind = type(module).__name__.lower()
    if "norm" in kind:
        return "norms"
    if "embedding" in kind:
        return "embeddings"
    for role, words in _NAMES.items():
        if re.search(rf"(^|\.)({words})$", path):
            return role
    return None
