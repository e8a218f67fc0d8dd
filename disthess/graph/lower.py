"""Operations rewritten by elementary ones at capture.

They are those whose fused kernels have no (or a wrong) double backward, and those that hide a reduction over samples. Each entry
is a function traced in place of the operation; the rewritten graph computes the same value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from disthess.errors import RuleError
from disthess.graph.losses import lowered_losses


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(q k^T scale + mask) v`` by plain products."""
    if dropout_p > 0:
        raise RuleError(
            f"attention drops out with p={dropout_p}: the objective is random. Call model.eval() or set p=0."
        )
    if enable_gqa and query.shape[-3] != key.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(repeats, -3)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        length, width = query.shape[-2], key.shape[-2]
        keep = torch.ones(length, width, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~keep, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Batch normalisation whose statistics are functions of the batch in training, and constants in evaluation."""
    shape = [1, -1] + [1] * (input.ndim - 2)
    if training:
        axes = [axis for axis in range(input.ndim) if axis != 1]
        centred = input - input.mean(axes, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    else:
        if running_mean is None or running_var is None:
            raise RuleError("batch norm in evaluation has no running statistics; track them or use training mode.")
        centred = input - running_mean.reshape(shape)
        scale = torch.rsqrt(running_var + eps).reshape(shape)
    normal = centred * scale
    if weight is not None:
        normal = normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def batch_norm_functional(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`batch_norm` in the form export gives it; the new running statistics are not needed and returned unchanged."""
    output = batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, False)
    return output, running_mean.clone(), running_var.clone(), running_mean.clone(), running_var.clone()


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Normalisation over the positions of each sample and channel."""
    if not use_input_stats:
        return batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)
    axes = list(range(2, input.ndim))
    centred = input - input.mean(axes, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    shape = [1, -1] + [1] * (input.ndim - 2)
    if weight is not None:
        normal = normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalisation over groups of channels of each sample."""
    channels = input.shape[1]
    apart = input.unflatten(1, (num_groups, channels // num_groups))
    axes = list(range(2, apart.ndim))
    centred = apart - apart.mean(axes, keepdim=True)
    normal = (centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)).flatten(1, 2)
    shape = [1, -1] + [1] * (input.ndim - 2)
    if weight is not None:
        normal = normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Division by the root mean square over the last axes."""
    axes = list(range(-len(normalized_shape), 0))
    floor = torch.finfo(input.dtype).eps if eps is None else eps
    normal = input * torch.rsqrt(input.square().mean(axes, keepdim=True) + floor)
    return normal if weight is None else normal * weight


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``v g / |v|`` over all axes but ``dim``; the fused kernel's double backward is wrong."""
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    norm = v.square().sum(axes, keepdim=True).sqrt()
    return v * (g / norm), norm


def weight_norm_value(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The first output of `weight_norm`."""
    return weight_norm(v, g, dim)[0]


def dropout(input: Tensor, p: float, train: bool) -> Tensor:
    """The identity, where nothing is dropped."""
    if train and p > 0:
        raise RuleError(
            f"dropout is on with p={p}: the model answers differently from call to call, so its objective has no Hessian. Call "
            "model.eval(), or set p=0."
        )
    return input.clone()


def hardsigmoid(self: Tensor) -> Tensor:
    """``clamp(x / 6 + 1/2, 0, 1)``; the fused kernel has no double backward."""
    return torch.nn.functional.hardtanh(self / 6 + 0.5, 0.0, 1.0)


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Pairwise distances by explicit differences; the fused kernel has no double backward."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def addcmul(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """``self + value * t1 * t2``."""
    return self + tensor1 * tensor2 * value


def addcdiv(self: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """``self + value * t1 / t2``."""
    return self + tensor1 / tensor2 * value


def broadcast_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor expanded where it has to be."""
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return [tensor.clone() if tensor.shape == shape else tensor.expand(shape) for tensor in tensors]


def written_over(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``self.copy_(src)`` leaves in ``self``."""
    return src.to(self.dtype).expand(self.shape)


def embedding_bag_forward(*args: Any, **kwargs: Any) -> Any:
    """Refused: the fused kernel has no double backward."""
    raise RuleError(
        "embedding_bag has no double backward in torch. Write torch.nn.functional.embedding(ids, weight) followed by "
        ".mean(dim) or .sum(dim) instead."
    )


def ctc_loss(*args: Any, **kwargs: Any) -> Any:
    """Refused: there is no double backward."""
    raise RuleError("ctc_loss has no double backward in torch, so its Hessian cannot be computed; choose another loss.")


@lru_cache(maxsize=1)
def lowerings() -> Mapping[Any, Callable[..., Any]]:
    """The table: operation overload to the function traced in its place."""
    aten = torch.ops.aten
    table: dict[Any, Callable[..., Any]] = {
        **lowered_losses(),
        aten.scaled_dot_product_attention.default: attention,
        aten.batch_norm.default: batch_norm,
        aten._native_batch_norm_legit_functional.default: batch_norm_functional,
        aten.instance_norm.default: instance_norm,
        aten.group_norm.default: group_norm,
        aten.rms_norm.default: rms_norm,
        aten._weight_norm_interface.default: weight_norm,
        aten._weight_norm.default: weight_norm_value,
        aten.dropout.default: dropout,
        aten.feature_dropout.default: dropout,
        aten.alpha_dropout.default: dropout,
        aten.hardsigmoid.default: hardsigmoid,
        aten.cdist.default: cdist,
        aten.broadcast_tensors.default: broadcast_tensors,
        aten.copy.default: written_over,
        aten.addcmul.default: addcmul,
        aten.addcdiv.default: addcdiv,
        aten.embedding_bag.default: embedding_bag_forward,
        aten.embedding_bag.padding_idx: embedding_bag_forward,
        aten.ctc_loss.IntList: ctc_loss,
        aten.ctc_loss.Tensor: ctc_loss,
    }
    recurrent = [aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input]
    table.update(get_decompositions(recurrent))
    elementary = [
        aten.var.dim, aten.var.correction, aten.var_mean.correction, aten.std.correction, aten.std.dim,
        aten.hinge_embedding_loss.default, aten.margin_ranking_loss.default, aten.cosine_embedding_loss.default,
        aten.multi_margin_loss.default, aten.multilabel_margin_loss.default, aten.lerp.Tensor, aten.lerp.Scalar,
    ]  # fmt: skip
    known = core_aten_decompositions()
    table.update({op: known[op] for op in elementary if op in known})
    return MappingProxyType(table)
