"""From a problem and one of its batches to a `Graph`.

1. Ties are recorded by object identity; the objective is exported with a dynamic batch dimension where the model allows it
   (``export.py``), fused operations lowered (``lower.py``).
2. Every FX node becomes a `Node`; every (node, parameter) occurrence gets a use leaf of its own.
3. Batch axes are read off the symbolic shapes; independence is decided in ``coupling.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from disthess.errors import GraphError
from disthess.graph.export import FlatObjective, batch_size, export_objective
from disthess.graph.ir import BatchAxis, Graph, Node, Ref
from disthess.graph.names import name_nodes
from disthess.graph.select import select_activations
from disthess.problem import Problem, batch_tensors


@dataclass(frozen=True, slots=True)
class Capture:
    """A graph before independence is decided, with the tensors it holds besides parameters and inputs.

    Attributes:
        graph: Regions and liveness are set; ``independent`` is not yet decided.
        constants: Buffers and literal tensors by node index.
        note: Why the batch dimension is not dynamic, or empty.
    """

    graph: Graph
    constants: Mapping[int, Tensor]
    note: str


def capture(problem: Problem, batch: Any, selected: frozenset[str], activations: Sequence[str] = ()) -> Capture:
    """Export the objective on one batch and turn it into a `Graph`.

    Args:
        problem: In the dtype and on the device wanted.
        batch: The example; its batch dimension is made dynamic where the model allows it.
        selected: First names of the parameters whose Hessian is wanted; others are constants.
        activations: Names or globs of the nodes and modules whose activation Hessian is wanted.

    Returns:
        The graph, with batch axes, liveness and the model's boundary.

    Raises:
        GraphError: ``torch.export`` cannot capture the objective, with its reason in a sentence.
        ConfigError: An activation is not known.
    """
    module = FlatObjective(problem.module(), batch)
    tensors = batch_tensors(batch)
    samples = batch_size(tensors)
    program, note = export_objective(module, tensors, samples)
    builder = _Builder(problem, program, selected, dynamic=not note)
    return builder.build(samples if not note else 1, note, activations)


@final
class _Builder:
    """Turns an exported program into nodes."""

    def __init__(self, problem: Problem, program: ExportedProgram, selected: frozenset[str], dynamic: bool) -> None:
        self._problem = problem
        self._program = program
        self._dynamic = dynamic
        self._selected = selected
        self._first_name = {
            name: parameter.name for parameter in problem.parameters() for name in (parameter.name, *parameter.aliases)
        }
        self._nodes: list[Node] = []
        self._modules: list[str] = []
        self._ref: dict[fx.Node, int] = {}
        self._multi: dict[fx.Node, fx.Node] = {}
        self._parameters: dict[fx.Node, str] = {}
        self._constants: dict[int, Tensor] = {}
        self._symbol: Any = None

    def build(self, samples: int, note: str, activations: Sequence[str]) -> Capture:
        self._leaves()
        for fx_node in self._program.graph.nodes:
            if fx_node.op == "call_function":
                self._operation(fx_node)
            elif fx_node.op == "get_attr":
                self._add_constant(fx_node, fx_node.name, getattr(self._program.graph_module, str(fx_node.target)))
        loss = self._loss()
        loss = self._prune(loss)
        nodes = name_nodes(self._nodes, self._modules)
        nodes = tuple(_with(node, module=module) for node, module in zip(nodes, self._modules, strict=True))
        asked = select_activations(nodes, loss, activations)
        live = _live(nodes, asked)
        nodes = tuple(_with(node, live=node.index in live, asked=node.index in asked) for node in nodes)
        nodes, boundary = self._boundary(nodes)
        graph = Graph(nodes, loss, samples, False, self._dynamic, "", boundary)
        return Capture(graph, self._constants, note)

    def _leaves(self) -> None:
        placeholders = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        user = 0
        for fx_node, spec in zip(placeholders, self._program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                value = fx_node.meta.get("val")
                if self._dynamic and self._symbol is None and isinstance(value, Tensor) and value.ndim:
                    self._symbol = _symbol(value.shape[0])
                self._add(fx_node, "input", str(user), (), (), None, "")
                user += 1
            elif spec.kind == InputKind.PARAMETER and self._known(str(spec.target)) in self._selected:
                self._parameters[fx_node] = self._known(str(spec.target))
            else:
                self._add_constant(fx_node, str(spec.target), _held(self._program, spec))

    def _known(self, target: str) -> str:
        return self._first_name.get(target.removeprefix("objective.model."), "")

    def _add_constant(self, fx_node: fx.Node, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add(fx_node, "constant", name, (), (), None, "", value=value)
            self._constants[self._ref[fx_node]] = value.detach()

    def _operation(self, fx_node: fx.Node) -> None:
        value = fx_node.meta.get("val")
        module = _module_path(fx_node)
        if "getitem" in str(fx_node.target) and isinstance(fx_node.args[0], fx.Node) and fx_node.args[0] in self._multi:
            source = self._multi[fx_node.args[0]]
            self._emit(fx_node, source, int(fx_node.args[1]), module)  # type: ignore[arg-type]
        elif isinstance(value, (tuple, list)):
            self._multi[fx_node] = fx_node
        elif isinstance(value, Tensor):
            self._emit(fx_node, fx_node, None, module)
        elif value is not None:
            args = tuple(self._argument(entry, None) for entry in fx_node.args)
            self._add(fx_node, "size", _op_name(fx_node.target), args, (), None, module)

    def _emit(self, fx_node: fx.Node, source: fx.Node, output: int | None, module: str) -> None:
        uses: dict[str, int] = {}
        args = tuple(self._argument(entry, uses, module) for entry in source.args)
        kwargs = tuple((key, self._argument(entry, uses, module)) for key, entry in source.kwargs.items())
        self._add(fx_node, "op", _op_name(source.target), args, kwargs, output, module)

    def _argument(self, entry: Any, uses: dict[str, int] | None, module: str = "") -> Any:
        if isinstance(entry, fx.Node):
            if entry in self._parameters:
                name = self._parameters[entry]
                if uses is None:
                    return Ref(self._use(entry, name, module))
                if name not in uses:
                    uses[name] = self._use(entry, name, module)
                return Ref(uses[name])
            return Ref(self._ref[entry])
        if isinstance(entry, (tuple, list)):
            return tuple(self._argument(item, uses, module) for item in entry)
        if isinstance(entry, torch.dtype):
            return entry
        return entry

    def _use(self, fx_node: fx.Node, name: str, module: str) -> int:
        value = fx_node.meta["val"]
        index = len(self._nodes)
        shape = tuple(int(size) for size in value.shape)
        self._nodes.append(Node(index, "", "use", name, (), (), None, shape, _dtype(value)))
        self._modules.append(module)
        return index

    def _add(
        self,
        fx_node: fx.Node,
        kind: Any,
        op: str,
        args: Any,
        kwargs: Any,
        output: int | None,
        module: str,
        value: Any = None,
    ) -> None:
        value = fx_node.meta.get("val") if value is None else value
        index = len(self._nodes)
        shape: tuple[int, ...] = ()
        batch = None
        if isinstance(value, Tensor):
            shape = tuple(_hint(size) for size in value.shape)
            batch = self._batch_axis(value)
        self._nodes.append(Node(index, "", kind, op, args, kwargs, output, shape, _dtype(value), batch))
        self._modules.append(module)
        self._ref[fx_node] = index

    def _batch_axis(self, value: Tensor) -> BatchAxis | None:
        """The one axis whose size is a multiple of the batch symbol; dim -1 marks a shape that mixes it otherwise."""
        found: list[BatchAxis] = []
        for dim, size in enumerate(value.shape):
            if isinstance(size, int) or self._symbol is None:
                continue
            factor = size.node.expr / self._symbol
            if not factor.is_Integer:
                return BatchAxis(-1, 1, 1)
            found.append(BatchAxis(dim, 1, int(factor)))
        return None if not found else found[0] if len(found) == 1 else BatchAxis(-1, 1, 1)

    def _loss(self) -> int:
        signature = self._program.graph_signature
        outputs = next(node for node in self._program.graph.nodes if node.op == "output").args[0]
        user = [
            arg
            for arg, spec in zip(outputs, signature.output_specs, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT
        ]
        if len(user) != 1 or not isinstance(user[0], fx.Node):
            raise GraphError(f"the objective must return one scalar tensor, its graph returns {len(user)} values.")
        if user[0] not in self._ref:
            raise GraphError("the objective returns a parameter itself; return a scalar computed from the model.")
        return self._ref[user[0]]

    def _prune(self, loss: int) -> int:
        """Keep what the objective depends on, and renumber."""
        reached = {loss}
        for node in reversed(self._nodes):
            if node.index in reached:
                reached.update(node.refs())
        kept = sorted(reached)
        new = {old: index for index, old in enumerate(kept)}
        self._modules = [self._modules[old] for old in kept]
        self._constants = {new[old]: value for old, value in self._constants.items() if old in new}
        self._nodes = [
            _with(
                self._nodes[old],
                index=new[old],
                args=_renumber(self._nodes[old].args, new),
                kwargs=_renumber(self._nodes[old].kwargs, new),
            )
            for old in kept
        ]
        return new[loss]

    def _boundary(self, nodes: tuple[Node, ...]) -> tuple[tuple[Node, ...], bool]:
        """Mark nodes before the model's outputs; with an objective only if the output module was named."""
        if self._problem.recipe.objective is None:
            inside = [module == "model" or module.startswith("model.") for module in self._modules]
            return tuple(_with(node, in_model=flag) for node, flag in zip(nodes, inside, strict=True)), True
        if self._problem.output is None:
            return nodes, False
        wanted = f"model.{self._problem.output}" if self._problem.output else "model"
        members = {i for i, module in enumerate(self._modules) if module == wanted or module.startswith(wanted + ".")}
        if not members:
            raise GraphError(
                f"output={self._problem.output!r} names no module that the objective calls; modules it calls: "
                f"{', '.join(sorted({m.removeprefix('model.') for m in self._modules if m.startswith('model.')})[:20])}."
            )
        after: set[int] = set()
        for node in nodes:
            if node.index not in members and any(ref in members or ref in after for ref in node.refs()):
                after.add(node.index)
        for node in nodes:
            if node.kind == "use" and node.live:
                consumer = next(other for other in nodes if node.index in other.refs())
                if consumer.index in after:
                    after.add(node.index)
        return tuple(_with(node, in_model=node.index not in after) for node in nodes), True


def _renumber(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, Ref):
        return Ref(new[value.node])
    return tuple(_renumber(entry, new) for entry in value) if isinstance(value, tuple) else value


def _live(nodes: Sequence[Node], asked: frozenset[int]) -> set[int]:
    live: set[int] = set()
    for node in nodes:
        depends = node.index in asked or (node.kind == "op" and any(ref in live for ref in node.refs()))
        if depends and (node.dtype.startswith("complex") or node.dtype in ("float16", "bfloat16")):
            raise GraphError(
                f"the objective passes through {node.dtype} values ({node.op}), which the sweep does not follow. Compute in real "
                "float32 or float64 throughout, or use method='autograd'."
            )
        if node.kind == "use" or (depends and node.dtype in ("float32", "float64")):
            live.add(node.index)
    return live


def _with(node: Node, **changes: Any) -> Node:
    return dataclasses.replace(node, **changes)


def _held(program: ExportedProgram, spec: Any) -> Any:
    target = spec.target
    if spec.kind == InputKind.PARAMETER:
        return program.state_dict[target]
    if spec.kind == InputKind.BUFFER:
        return program.state_dict[target] if target in program.state_dict else program.constants[target]
    return program.constants.get(target)


def _symbol(size: Any) -> Any:
    return None if isinstance(size, int) else size.node.expr


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""


def _op_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"python.{getattr(target, '__name__', target)}"


def _module_path(fx_node: fx.Node) -> str:
    stack = fx_node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    path = paths[-1] if paths else ""
    return path.removeprefix("objective.") if path.startswith("objective.") else ""
