"""Lower an exported program node by node: what has to be rewritten is traced alone and spliced in.

``ExportedProgram.run_decompositions`` traces the whole program once more, which takes longer than the export itself. A
program that writes to nothing needs no functionalising, so only two kinds of node have to change: those in the table of
lowerings, and composite operations that may return a view (``reshape``, ``flatten``), which become what they stand for.
Whatever does not fit goes through ``run_decompositions``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from types import BuiltinFunctionType
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

Lowerings = Mapping[Any, Callable[..., Any]]


def lower_in_place(program: ExportedProgram, table: Lowerings) -> bool:
    """Rewrite the program's graph, or leave it as it was and return False.

    Args:
        program: As exported, before decompositions.
        table: Operation to the function traced in its place.
    """
    graph = program.graph
    if not all(_pure(node) for node in graph.nodes):
        return False
    for wanted, trace in ((table.get, _trace_lowering), (_view_maker, _trace_composite)):
        # A layer that repeats has the same operations on values of the same form: each form is traced once.
        known: dict[Hashable, fx.GraphModule | None] = {}
        for node in list(graph.nodes):
            function = wanted(node.target) if node.op == "call_function" else None
            if function is None:
                continue
            form = _form(node)
            if form not in known:
                known[form] = trace(node, function, table)
            traced = known[form]
            if traced is None:
                return False
            _splice(graph, node, traced)
    return True


def _form(node: fx.Node) -> Hashable:
    """Equal for nodes of one operation whose arguments differ at most in what their values are."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    described = [
        (nodes.index(leaf), _form_of(leaf.meta["val"])) if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves
    ]
    return node.target, str(spec), tuple(described)


def _form_of(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return repr(value)
    sizes = tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(value.storage_offset())
    return *sizes, value.dtype, value.device, value.requires_grad


def _pure(node: fx.Node) -> bool:
    """Whether a node writes to nothing and calls no subgraph."""
    if node.op == "get_attr":
        return isinstance(node.meta.get("val"), Tensor)
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return node.target is operator.getitem or isinstance(node.target, BuiltinFunctionType)


def _view_maker(target: Any) -> Callable[..., Any] | None:
    """How a composite operation whose result may share memory with its input is composed."""
    if not isinstance(target, OpOverload) or not target._can_decompose():
        return None
    return target.decompose if any(argument.alias_info for argument in target._schema.arguments) else None


def _trace_lowering(node: fx.Node, function: Callable[..., Any], table: Lowerings) -> fx.GraphModule | None:
    # Before dispatch, so that composite operations with rules of their own (log_softmax, matmul) stay whole.
    return _trace(node, function, table, pre_dispatch=True)


def _trace_composite(node: fx.Node, function: Callable[..., Any], table: Lowerings) -> fx.GraphModule | None:
    return _trace(node, function, table, pre_dispatch=False)


def _trace(
    node: fx.Node, function: Callable[..., Any], table: Lowerings, *, pre_dispatch: bool
) -> fx.GraphModule | None:
    """The function on the node's arguments as a graph of its tensor and size arguments; None if it is not one."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    values = [leaf.meta["val"] for leaf in leaves if isinstance(leaf, fx.Node)]
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
    if mode is None:
        return None

    def on(*given: Any) -> Any:
        remaining = iter(given)
        filled = [next(remaining) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    with mode:
        traced = make_fx(on, decomposition_table=table, pre_dispatch=pre_dispatch)(*values)
    traced.graph.eliminate_dead_code()
    body = [inner for inner in traced.graph.nodes if inner.op not in ("placeholder", "output")]
    return traced if all(inner.op == "call_function" and _pure(inner) for inner in body) else None


def _splice(graph: fx.Graph, node: fx.Node, traced: fx.GraphModule) -> None:
    arguments = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]
    places = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
    values: dict[fx.Node, fx.Node] = dict(zip(places, arguments, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(traced.graph, values)
    for inner in traced.graph.nodes:
        if inner.op == "call_function" and "nn_module_stack" in node.meta:
            values[inner].meta["nn_module_stack"] = node.meta["nn_module_stack"]
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
    elif isinstance(result, fx.Node):
        node.replace_all_uses_with(result, propagate_meta=False)
    graph.erase_node(node)
