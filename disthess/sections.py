"""Names for what stands side by side in one matrix: the query, key and value projections of attention modules."""

from __future__ import annotations

from torch import nn

from disthess.errors import ConfigError

_STACKED = ("q", "k", "v")
_LAYERS = ("c_attn", "qkv", "Wqkv", "qkv_proj")


def attention_sections(model: nn.Module) -> dict[str, str]:
    """Sections for every projection of q, k and v that one matrix holds, in the order q, k, v, of equal size.

    It knows ``torch.nn.MultiheadAttention`` (``in_proj_weight``), and linear layers named ``c_attn``, ``qkv``, ``Wqkv`` or
    ``qkv_proj`` whose outputs are three times their inputs, with weights ``[out, in]`` or (GPT-2's) ``[in, out]``. That the thirds
    are q, k and v is a convention of those modules: where heads are interleaved, write the sections by hand.

    Args:
        model: Any model.

    Returns:
        Section text by name, for ``compute(..., sections=...)``; empty if there are no such modules.

    Raises:
        ConfigError: It is no module.

    Example:
        >>> layer = nn.MultiheadAttention(4, 2, bias=False)
        >>> attention_sections(layer)["v.weight"]
        'in_proj_weight[8:12]'
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.update(_thirds(prefix, f"{prefix}in_proj_weight", module.embed_dim, "weight", columns=False))
            if module.in_proj_bias is not None:
                found.update(_thirds(prefix, f"{prefix}in_proj_bias", module.embed_dim, "bias", columns=False))
            continue
        weight = getattr(module, "weight", None)
        parent, _, name = path.rpartition(".")
        prefix = f"{parent}." if parent else ""
        if name not in _LAYERS or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        rows, columns = weight.shape
        if rows != 3 * columns and columns != 3 * rows:
            continue
        found.update(_thirds(prefix, f"{path}.weight", max(rows, columns) // 3, "weight", columns=columns > rows))
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            found.update(_thirds(prefix, f"{path}.bias", max(rows, columns) // 3, "bias", columns=False))
    return found


def _thirds(prefix: str, parameter: str, size: int, kind: str, *, columns: bool) -> dict[str, str]:
    lead = ":, " if columns else ""
    return {
        f"{prefix}{letter}.{kind}": f"{parameter}[{lead}{size * place}:{size * (place + 1)}]"
        for place, letter in enumerate(_STACKED)
    }
