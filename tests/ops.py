"""One row or more per rule: operation, arguments away from kinks, which slots move, and where samples lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disthess.graph.ir import BatchAxis

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """A call of one operation.

    Attributes:
        op: Overload name.
        make: Arguments from a seeded generator, float64.
        active: Slots that move.
        output: Which output.
        samples: Number of samples along the batch axes.
        batch: Batch axis of the output.
        inputs: Batch axis of each slot; empty for none.
        note: Tells rows of one operation apart.
    """

    op: str
    make: Callable[[torch.Generator], Arguments]
    active: tuple[int, ...] = (0,)
    output: int | None = None
    samples: int = 1
    batch: BatchAxis | None = None
    inputs: tuple[BatchAxis | None, ...] = ()
    note: str = field(default="")

    @property
    def name(self) -> str:
        """Test id."""
        return self.op.removeprefix("aten.") + (f"-{self.note}" if self.note else "")


FIRST, MIDDLE = BatchAxis(0, 1, 1), BatchAxis(1, 1, 1)
FLAT, OUTER, BOTH = BatchAxis(0, 1, 2), BatchAxis(0, 2, 1), BatchAxis(1, 2, 2)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def positive(g: torch.Generator, *shape: int) -> Tensor:
    return 0.3 + torch.rand(shape, generator=g, dtype=torch.float64)


def apart(g: torch.Generator, *shape: int) -> Tensor:
    """Distinct values, none within 0.02 of a multiple of a half, so of no kink."""
    count = 1
    for size in shape:
        count *= size
    values = torch.randperm(count, generator=g).double() * 0.613 - 0.3065 * count + 0.0517
    near = (values * 2 - (values * 2).round()).abs() < 0.04
    return torch.where(near, values + 0.05, values).reshape(shape)


def on(*args: Any, **kwargs: Any) -> Callable[[torch.Generator], Arguments]:
    """Arguments where a callable makes a tensor from the generator and anything else is taken as it is."""

    def make(g: torch.Generator) -> Arguments:
        def fill(value: Any) -> Any:
            if isinstance(value, list) and any(map(callable, value)):
                return [fill(entry) for entry in value]
            return value(g) if callable(value) else value

        return tuple(fill(value) for value in args), {key: fill(value) for key, value in kwargs.items()}

    return make


def t(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: normal(g, *shape)


def u(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: positive(g, *shape)


def a(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: apart(g, *shape)


def ids(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(high, shape, generator=g)


def mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(shape, generator=g) > 0.4


def simple(op: str, *args: Any, **kwargs: Any) -> Row:
    return Row(f"aten.{op}", on(*args, **kwargs))


X = t(3, 4)

SHAPES = (
    simple("view.default", X, [2, 6]), simple("reshape.default", X, [4, 3]), simple("_unsafe_view.default", X, [12]),
    simple("flatten.using_ints", t(2, 3, 2), 1, 2), simple("unflatten.int", X, 1, [2, 2]), simple("squeeze.default", t(3, 1, 2)),
    simple("squeeze.dim", t(3, 1, 2), 1), simple("squeeze.dims", t(1, 3, 1), [0, 2]), simple("unsqueeze.default", X, 1),
    simple("view_copy.default", X, [12]), simple("_reshape_alias.default", X, [2, 6], [6, 1]),
    simple("clone.default", X), simple("alias.default", X), simple("contiguous.default", X), simple("lift_fresh_copy.default", X),
    simple("to.dtype", X, torch.float64), simple("_to_copy.default", X),
    Row("aten.to.dtype", on(X, torch.float32), note="narrower"), Row("aten._to_copy.default", on(X, dtype=torch.float32), note="narrower"),
    simple("permute.default", t(2, 3, 4), [2, 0, -2]), simple("transpose.int", t(2, 3, 4), 0, -1), simple("t.default", X),
    simple("swapaxes.default", X, 0, 1), simple("numpy_T.default", X), simple("mT.default", X),
    simple("movedim.int", t(2, 3, 4), 0, 2), simple("movedim.intlist", t(2, 3, 4), [0, 1], [2, 0]),
    simple("expand.default", t(3, 1), [2, 3, 4]), simple("broadcast_to.default", t(3, 1), [3, 4]),
    Row("aten.expand_as.default", on(t(1, 4), X)),
    simple("select.int", X, 1, -2), simple("slice.Tensor", X, 1, 0, 4, 2), simple("narrow.default", X, 1, 1, 2),
    Row("aten.split.Tensor", on(t(5, 2), 2, 0), output=2), Row("aten.split_with_sizes.default", on(t(5, 2), [1, 3, 1]), output=1),
    Row("aten.chunk.default", on(X, 2, 1), output=1), Row("aten.unbind.int", on(X, 1), output=2),
    Row("aten.cat.default", on([t(2, 3), t(1, 3), t(2, 3)], 0), active=(0, 2)), Row("aten.concat.default", on([t(2, 3), t(2, 1)], -1), active=(0, 1)),
    Row("aten.stack.default", on([t(2, 3), t(2, 3)], 1), active=(0, 1)), Row("aten.cat.default", on([t(0), t(2, 3)], 1), active=(1,), note="empty"),
    Row("aten.slice.Tensor", on(t(5, 2), 0, None, -1, 3), note="ends"), Row("aten.split.Tensor", on(t(5, 2), 2, -2), output=0, note="negative"),
    Row("aten.where.self", on(mask(2), t(3, 2), t(3, 1)), active=(1, 2), note="narrow"),
    Row("aten.where.self", on(mask(3, 4), X, t(4)), active=(1, 2)), Row("aten.where.ScalarOther", on(mask(3, 4), X, 2.0), active=(1,)),
    Row("aten.where.ScalarSelf", on(mask(3, 4), 1.0, X), active=(1,)), simple("masked_fill.Scalar", X, mask(3, 4), 0.5),
    Row("aten.masked_fill.Tensor", on(X, mask(3, 4), t()), active=(0, 2)),
    Row("aten.slice_scatter.default", on(X, t(3, 2), 1, 1, 3), active=(0, 1)), Row("aten.select_scatter.default", on(X, t(3), 1, 2), active=(0, 1)),
    simple("flip.default", X, [1]), simple("roll.default", X, [1], [0]), simple("tril.default", X), simple("triu.default", X, 1),
    simple("repeat.default", X, [2, 1]), simple("cumsum.default", X, 1), simple("diagonal.default", t(3, 3)), simple("diag_embed.default", X),
    simple("unfold.default", X, 1, 2, 1), simple("im2col.default", t(1, 2, 3, 3), [2, 2], [1, 1], [0, 0], [1, 1]),
    simple("pixel_shuffle.default", t(1, 4, 2, 2), 2), simple("pixel_unshuffle.default", t(1, 1, 4, 4), 2), simple("constant_pad_nd.default", X, [1, 2]),
    simple("pad.default", X, [1, 0]), simple("reflection_pad1d.default", t(1, 2, 4), [1, 2]), simple("reflection_pad2d.default", t(1, 1, 3, 3), [1, 1, 1, 1]),
    simple("replication_pad1d.default", t(1, 2, 4), [1, 2]), simple("replication_pad2d.default", t(1, 1, 3, 3), [1, 1, 1, 1]),
    simple("repeat_interleave.self_int", X, 2, 1), simple("repeat_interleave.self_Tensor", X, lambda g: torch.tensor([1, 2, 0]), 0),
    simple("upsample_nearest2d.vec", t(1, 1, 2, 2), None, [2.0, 2.0]), simple("upsample_bilinear2d.vec", t(1, 1, 2, 2), None, False, [2.0, 2.0]),
    simple("trace.default", t(3, 3)), simple("diag.default", t(3)), simple("rot90.default", X), simple("real.default", X),
    *(simple(f"{name}.default", a(3, 4)) for name in ("detach", "zeros_like", "ones_like", "empty_like", "sign", "floor", "ceil", "round", "trunc")),
    simple("full_like.default", X, 2.0), simple("new_zeros.default", X, [2]), simple("new_ones.default", X, [2]), simple("new_full.default", X, [2], 1.0),
)  # fmt: skip

ELEMENTWISE = (
    *(simple(f"{name}.default", t(3, 4)) for name in (
        "exp", "exp2", "expm1", "square", "sin", "cos", "sinh", "cosh", "atan", "asinh", "erf", "neg", "tanh", "sigmoid", "silu", "gelu", "selu",
        "celu", "softplus", "mish", "log_sigmoid", "tan")),
    *(simple(f"{name}.default", u(3, 4)) for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal")),
    *(simple(f"{name}.default", a(3, 4)) for name in ("abs", "relu", "relu6", "leaky_relu", "elu", "hardtanh", "hardswish", "hardshrink",
                                                    "softshrink")),
    Row("aten.gelu.default", on(t(3, 4), approximate="tanh"), note="tanh"), Row("aten.leaky_relu.default", on(a(3, 4), 0.2), note="slope"),
    Row("aten.elu.default", on(a(3, 4), 0.7, 1.3, 0.9), note="settings"), Row("aten.celu.default", on(a(3, 4), 2.0), note="alpha"),
    Row("aten.softplus.default", on(t(3, 4), 2.0, 1.0), note="threshold"), Row("aten.log_sigmoid_forward.default", on(t(3, 4)), output=0),
    Row("aten.hardtanh.default", on(a(3, 4), -0.7, 1.3), note="bounds"),
    simple("threshold.default", a(3, 4), 0.2, -1.0), simple("clamp.default", a(3, 4), -0.7, 0.9), simple("clamp_min.default", a(3, 4), 0.1),
    simple("clamp_max.default", a(3, 4), 0.1), simple("pow.Tensor_Scalar", u(3, 4), 2.5), Row("aten.pow.Tensor_Scalar", on(t(3, 4), 3), note="cube"),
    Row("aten.pow.Tensor_Scalar", on(lambda g: torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64), 2), note="at_zero"),
    Row("aten.pow.Tensor_Scalar", on(u(3, 4), -1.5), note="negative"), Row("aten.clamp.default", on(a(3, 4), None, 0.9), note="above"),
    Row("aten.elu.default", on(a(3, 4), 1.0, 2.0, 3.0), note="input_scale"), Row("aten.pow.Tensor_Scalar", on(t(3, 4), 1), note="one"), Row("aten.pow.Tensor_Scalar", on(t(3, 4), 0), note="zero"),
)  # fmt: skip

TWO = (0, 1)
BIAS: dict[str, Any] = {"active": TWO, "samples": 3, "batch": FIRST, "inputs": (FIRST, None)}
BINARY = (
    *(Row(f"aten.{name}.Tensor", on(t(3, 4), u(3, 4)), active=TWO) for name in ("add", "sub", "rsub", "mul", "div")),
    *(Row(f"aten.{name}.Tensor", on(t(3, 4), u(4)), note="bias", **BIAS) for name in ("add", "sub", "mul", "div")),
    Row("aten.add.Tensor", on(t(3, 2, 4), u(2, 1), alpha=0.5), note="alpha", **BIAS), Row("aten.mul.Tensor", on(t(3, 2, 4), u()), note="scalar", **BIAS),
    Row("aten.mul.Tensor", on(t(1, 4), u(3, 4)), active=TWO, samples=3, batch=FIRST, inputs=(None, FIRST), note="row"),
    Row("aten.mul.Tensor", on(t(2, 6, 4), u(4)), active=TWO, samples=3, batch=BatchAxis(1, 2, 1), inputs=(BatchAxis(1, 2, 1), None), note="outer"),
    Row("aten.add.Tensor", on(t(3, 2, 4), t(2, 4)), note="position", **BIAS), Row("aten.rsub.Tensor", on(t(3, 4), t(4), alpha=0.5), note="bias", **BIAS),
    Row("aten.div.Tensor", on(t(4), u(3, 4)), active=TWO, samples=3, batch=FIRST, inputs=(None, FIRST), note="top"),
    Row("aten.pow.Tensor_Tensor", on(u(4), t(3, 4)), active=TWO, samples=3, batch=FIRST, inputs=(None, FIRST), note="base"),
    Row("aten.maximum.default", on(a(3, 4), t(4)), note="bias", **BIAS),
    Row("aten.div.Tensor", on(t(2, 3, 4), u(2, 1, 4)), active=TWO, samples=3, batch=MIDDLE, inputs=(MIDDLE, None), note="middle"),
    Row("aten.mul.Tensor", on(t(6, 4), u(4)), active=TWO, samples=3, batch=FLAT, inputs=(FLAT, None), note="flat"),
    Row("aten.div.Tensor", on(t(2, 12, 4), u(2, 1, 4)), active=TWO, samples=3, batch=BOTH, inputs=(BOTH, None), note="both"),
    *(simple(f"{name}.Scalar", t(3, 4), 1.7) for name in ("add", "sub", "rsub", "mul", "div")),
    Row("aten.maximum.default", on(a(3, 4), t(3, 4)), active=TWO), Row("aten.minimum.default", on(a(3, 4), t(3, 4)), active=TWO),
    Row("aten.pow.Tensor_Tensor", on(u(3, 4), t(4)), note="bias", **BIAS), simple("pow.Scalar", 1.7, t(3, 4)),
    *(simple(f"{name}.default", t(3, 4)) for name in ("sum", "mean")), simple("sum.dim_IntList", t(3, 4, 2), [0, -1]), simple("mean.dim", t(3, 4, 2), [1], True),
    Row("aten.sum.dim_IntList", on(X, []), note="all"), Row("aten.mean.dim", on(X, None), note="all"), Row("aten.sum.default", on(t()), note="number"),
)  # fmt: skip

LAYER: dict[str, Any] = {"active": (0, 1, 2), "samples": 3, "batch": FIRST, "inputs": (FIRST, None, None)}
WEIGHT: dict[str, Any] = {"active": TWO, "samples": 3}
PRODUCTS = (
    Row("aten.linear.default", on(t(3, 4), t(2, 4), t(2)), **LAYER), Row("aten.linear.default", on(t(3, 5, 4), t(2, 4), t(2)), note="rows", **LAYER),
    *(Row("aten.linear.default", on(t(6, 4) if axis.dim == 0 else t(2, 3, 4), t(2, 4), t(2)), active=(0, 1, 2), samples=3, batch=axis,
          inputs=(axis, None, None), note=note) for axis, note in ((MIDDLE, "middle"), (FLAT, "flat"), (OUTER, "outer"))),
    Row("aten.linear.default", on(t(2, 12, 4), t(2, 4), t(2)), active=(0, 1, 2), samples=3, batch=BOTH, inputs=(BOTH, None, None), note="both"),
    *(Row("aten.mm.default", on(t(6, 4), t(4, 2)), batch=axis, inputs=(axis, None), note=note, **WEIGHT) for axis, note in ((FLAT, "flat"), (OUTER, "outer"))),
    Row("aten.matmul.default", on(t(2, 3, 4), t(4, 2)), batch=MIDDLE, inputs=(MIDDLE, None), note="middle", **WEIGHT),
    Row("aten.matmul.default", on(t(2, 12, 4), t(4, 2)), batch=BOTH, inputs=(BOTH, None), note="axis_of_both", **WEIGHT),
    Row("aten.addmm.default", on(t(2), t(6, 4), t(4, 2), alpha=2.0), active=(0, 1, 2), samples=3, batch=OUTER, inputs=(None, OUTER, None), note="outer"),
    Row("aten.addmm.default", on(t(3, 2), t(3, 4), t(4, 2), beta=0.5), active=(0, 1, 2), note="full"),
    Row("aten.matmul.default", on(t(4), t(3, 4, 2)), active=TWO, note="left_vector"), Row("aten.matmul.default", on(t(4), t(4)), active=TWO, note="dot"),
    Row("aten.matmul.default", on(t(2, 1, 3, 4), t(5, 4, 2)), active=TWO, note="four_axes"),
    Row("aten.baddbmm.default", on(t(2), t(3, 2, 4), t(3, 4, 2), beta=0.5, alpha=2.0), active=(0, 1, 2), note="bias"),
    Row("aten.linear.default", on(t(3, 4), t(2, 4)), active=TWO, note="no_bias"), Row("aten.linear.default", on(t(4), t(2, 4), t(2)), active=(0, 1, 2), note="vector"),
    Row("aten.mm.default", on(t(3, 4), t(4, 2)), active=TWO, samples=3, batch=FIRST, inputs=(FIRST, None)),
    Row("aten.matmul.default", on(t(3, 2, 4), t(4, 2)), active=TWO, samples=3, batch=FIRST, inputs=(FIRST, None), note="weight"),
    Row("aten.matmul.default", on(t(3, 2, 4), t(3, 4, 2)), active=TWO, note="both"), Row("aten.matmul.default", on(t(2, 4), t(3, 4, 2)), active=TWO, note="broadcast"),
    Row("aten.matmul.default", on(t(3, 4), t(4)), active=TWO, note="vector"), Row("aten.bmm.default", on(t(3, 2, 4), t(3, 4, 2)), active=TWO),
    Row("aten.addmm.default", on(t(2), t(3, 4), t(4, 2), beta=0.5, alpha=2.0), active=(0, 1, 2), samples=3, batch=FIRST, inputs=(None, FIRST, None)),
    Row("aten.baddbmm.default", on(t(3, 2, 2), t(3, 2, 4), t(3, 4, 2)), active=(0, 1, 2)),
    Row("aten.mv.default", on(t(3, 4), t(4)), active=TWO), Row("aten.dot.default", on(t(4), t(4)), active=TWO),
    Row("aten.einsum.default", on("ni,ij->nj", [t(3, 4), t(4, 2)]), active=TWO),
    Row("aten.einsum.default", on("bi,bj,ijk->bk", [t(3, 2), t(3, 4), t(2, 4, 2)]), active=(0, 1, 2), note="three"),
)  # fmt: skip


def convolution(axes: int, op: str, weight: Callable[[torch.Generator], Tensor], note: str = "", *rest: Any) -> Row:
    source = t(2, 2, *[4] * axes)
    bias = t(4 if "transpose" not in op else 3)
    return Row(f"aten.{op}", on(source, weight, bias, *rest), active=(0, 1, 2), samples=2, batch=FIRST, inputs=(FIRST, None, None), note=note)  # fmt: skip


LAYERS = (
    *(convolution(axes, f"conv{axes}d.default", t(4, 2, *[2] * axes), "", [2] * axes, [1] * axes) for axes in (1, 2, 3)),
    *(convolution(axes, f"conv{axes}d.padding", t(4, 2, *[3] * axes), "", [1] * axes, "same") for axes in (1, 2, 3)),
    convolution(2, "conv2d.default", t(4, 1, 2, 2), "groups", [1, 1], [0, 0], [1, 1], 2),
    convolution(1, "conv_transpose1d.default", t(2, 3, 2), "", [2]), convolution(2, "conv_transpose2d.input", t(2, 3, 2, 2), "", [2, 2]),
    convolution(3, "conv_transpose3d.input", t(2, 3, 2, 2, 2)), Row("aten.conv2d.default", on(t(2, 2, 4, 4), t(3, 2, 2, 2)), active=TWO, note="no_bias"),
    Row("aten.conv2d.default", on(t(2, 4, 4), t(3, 2, 2, 2), t(3)), active=(0, 1, 2), note="no_batch"),
    convolution(1, "conv1d.default", t(4, 2, 2), "dilation", [2], [1], [2]), convolution(1, "conv_transpose1d.default", t(2, 3, 2), "padding", [2], [1], [1]),
    Row("aten.conv_transpose2d.input", on(t(2, 4, 3, 3), t(4, 2, 2, 2), t(4), [2, 2], [1, 1], [1, 1], 2), active=(0, 1, 2), note="groups"),
    *(simple(name, t(3, 4, 2), 1) for name in ("softmax.int", "log_softmax.int")), *(simple(f"_{n}.default", t(3, 4), -1, False) for n in ("softmax", "log_softmax")),
    simple("logsumexp.default", t(3, 4, 2), [0, 2]), Row("aten.logsumexp.default", on(t(3, 4), [1], True), note="keep"),
    Row("aten.layer_norm.default", on(t(3, 4), [4], t(4), t(4)), **LAYER), Row("aten.layer_norm.default", on(t(3, 2, 4), [2, 4], t(2, 4), t(2, 4)), note="two", **LAYER),
    Row("aten.layer_norm.default", on(t(3, 2, 4), [4]), note="plain"),
    *(Row("aten.layer_norm.default", on(t(6, 4) if axis.dim == 0 else t(2, 3, 4), [4], t(4), t(4)), active=(0, 1, 2), samples=3, batch=axis,
          inputs=(axis, None, None), note=note) for axis, note in ((MIDDLE, "middle"), (FLAT, "flat"), (OUTER, "outer"))),
    Row("aten.layer_norm.default", on(t(3, 4), [4], t(4)), note="no_bias", **BIAS),
    # Not its bias: torch has no double backward of a layer_norm with a bias alone.
    Row("aten.layer_norm.default", on(t(3, 4), [4], None, t(4)), note="no_weight"),
    Row("aten.embedding.default", on(t(5, 3), ids(5, 2, 3)), samples=3, batch=MIDDLE, inputs=(None, MIDDLE), note="middle"),
    Row("aten.embedding.default", on(t(5, 3), ids(5, 6)), samples=3, batch=OUTER, inputs=(None, OUTER), note="outer"),
    Row("aten.embedding.default", on(t(5, 3), ids(5, 3, 4)), samples=3, batch=FIRST, inputs=(None, FIRST)),
    Row("aten.embedding.default", on(t(5, 3), ids(5, 3, 4), 1), samples=3, batch=FIRST, inputs=(None, FIRST), note="padding"),
    simple("gather.default", X, 1, ids(4, 3, 2)), simple("index_select.default", X, 1, ids(4, 5)), simple("index.Tensor", X, [None, ids(4, 2)]),
    Row("aten.scatter.src", lambda g: ((normal(g, 3, 4), 1, torch.tensor([[0, 2], [3, 1], [1, 0]]), normal(g, 3, 2)), {}), active=(0, 2)),
    Row("aten.scatter.src", lambda g: ((torch.full((3, 4), -torch.inf, dtype=torch.float64), 1, torch.tensor([[0, 2], [3, 1], [1, 0]]), normal(g, 3, 2)), {}), active=(2,), note="minus infinity"),
    Row("aten.scatter.value", lambda g: ((normal(g, 3, 4), 1, torch.tensor([[0, 2], [3, 1], [1, 0]]), 2.0), {})),
    Row("aten.scatter_add.default", lambda g: ((normal(g, 3, 4), 1, torch.tensor([[0, 2], [3, 3], [1, 0]]), normal(g, 3, 2)), {}), active=(0, 2)),
    Row("aten.index_put.default", lambda g: ((normal(g, 4, 3), [torch.tensor([0, 2])], normal(g, 2, 3)), {}), active=(0, 2)),
    Row("aten.index_add.default", lambda g: ((normal(g, 4, 3), 0, torch.tensor([0, 0, 2]), normal(g, 3, 3)), {"alpha": 0.5}), active=(0, 2)),
    Row("aten.index_copy.default", lambda g: ((normal(g, 4, 3), 0, torch.tensor([0, 2]), normal(g, 2, 3)), {}), active=(0, 2)),
    Row("aten.index_fill.int_Scalar", lambda g: ((normal(g, 4, 3), 0, torch.tensor([0, 2]), 1.5), {})),
    Row("aten.put.default", lambda g: ((normal(g, 4, 3), torch.tensor([0, 5]), normal(g, 2)), {}), active=(0, 2)),
    Row("aten.diagonal_scatter.default", lambda g: ((normal(g, 3, 3), normal(g, 3)), {}), active=(0, 1)),
    Row("aten.masked_scatter.default", lambda g: ((normal(g, 2, 3), torch.tensor([[True, False, True], [False, True, False]]), normal(g, 3)), {}), active=(0, 2)),
    Row("aten.masked_select.default", lambda g: ((normal(g, 2, 3), torch.tensor([[True, False, True], [False, True, False]])), {})),
    Row("aten.gather.default", on(X, 0, ids(3, 2, 3)), note="rows"), Row("aten.index.Tensor", on(X, [ids(3, 5), ids(4, 5)]), note="pairs"),
    simple("take_along_dim.default", X, ids(4, 3, 2), 1),
    simple("max_pool1d.default", a(2, 2, 6), [2], [1]), simple("max_pool2d.default", a(1, 2, 5, 5), [2, 2], [2, 2], [1, 1]),
    Row("aten.max_pool2d.default", on(a(1, 2, 7, 7), [3, 2], [], [1, 0], [2, 1], True), note="dilation"),
    Row("aten.max_pool2d.default", on(a(2, 5, 5), [2, 2]), note="no_batch"),
    simple("avg_pool1d.default", t(2, 2, 6), [2]), simple("avg_pool2d.default", t(1, 2, 4, 4), [2, 2]), simple("avg_pool3d.default", t(1, 1, 2, 2, 2), [2, 2, 2]),
    simple("adaptive_avg_pool1d.default", t(1, 2, 6), [3]), simple("adaptive_avg_pool2d.default", t(1, 2, 4, 4), [1, 2]), simple("_adaptive_avg_pool2d.default", t(1, 2, 4, 4), [2, 2]),
)  # fmt: skip

ROWS: tuple[Row, ...] = (*SHAPES, *ELEMENTWISE, *BINARY, *PRODUCTS, *LAYERS)
