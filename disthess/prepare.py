"""From a problem and what is asked of it to a plan: check, capture, count, plan. Nothing of the Hessian is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from disthess import hvp
from disthess.cut import cut_parameters
from disthess.errors import ConfigError, GraphError
from disthess.execute.forked import why_not
from disthess.execute.threads import default_threads
from disthess.graph.program import Program, build_programs, rounds_inside
from disthess.planning.plan import Plan
from disthess.planning.planner import Method, PlanRequest, Sharing, make_plan
from disthess.planning.source import Basis
from disthess.planning.workload import SourceCost, Workload
from disthess.preflight import casts_down, check_dtype, check_parameters, check_problem
from disthess.preflight import select_parameters as select_parameters
from disthess.problem import Parameter, Problem, batch_tensors, sample_count
from disthess.reduce.sections import check_sections
from disthess.store.layout import ParameterSpec
from disthess.sweep.check import check_rules, doubtful_operations
from disthess.sweep.tables import with_tables
from disthess.sweep.workload import (
    SourceCounter,
    batch_runs,
    distinct_graphs,
    parameter_targets,
    primal_entries,
    with_activations,
)
from disthess.types import ITEM_BYTES, PARTS, DType, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked of a problem; see `disthess.compute` for each."""

    parts: Sequence[Part] = ("hessian",)
    parameters: str | Sequence[str] | None = None
    dtype: DType | None = None
    method: Literal["auto", "graph", "autograd"] = "auto"
    shared: Sharing = "auto"
    basis: Basis | None = None
    executor: Literal["serial", "threads", "processes", "ray"] = "serial"
    workers: int | None = None
    threads: int | None = None
    device: str | None = None
    memory_bytes: int | None = None
    address: str | None = None
    activations: str | Sequence[str] | None = None
    activations_per_sample: bool = False
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A problem ready to run.

    Attributes:
        problem: A copy in the run's dtype, on the CPU.
        names: Selected parameters, in user order.
        programs: One per batch; empty for the autograd method.
        plan: The plan.
        rounds_inside: Name of a node that the model itself computes in float32 although the run is float64, or empty: no more
            than float32's precision can then be asked of the model's own products.
    """

    problem: Problem
    names: tuple[str, ...]
    programs: tuple[Program, ...]
    plan: Plan
    rounds_inside: str = ""


def prepare(problem: Problem, options: Options, *, checked: bool = True, planning: bool = False) -> Prepared:
    """Check, capture and plan.

    Args:
        problem: The user's problem; not changed.
        options: What is asked.
        checked: Whether to run the preflight checks and the rules' self-checks.
        planning: Whether the plan is all that is wanted: the problem may then be without values, on the meta device.

    Returns:
        The prepared run.

    Raises:
        ConfigError: An option is unknown or matches nothing.
        ProblemError: The problem has no Hessian as given.
        GraphError: ``method="graph"`` and the objective cannot be captured.
        RuleError: A rule failed its self-check.
    """
    _check_options(options)
    check_parameters(problem)
    check_dtype(problem, options.dtype)
    name = options.dtype or str(problem.dtype).removeprefix("torch.")
    dtype: DType = "float64" if name == "float64" else "float32"
    lacking = bool(planning and problem.without_values)
    bound = problem.to(getattr(torch, dtype), "meta" if lacking else "cpu")
    cut = cut_parameters(bound, _patterns(options.parameters))
    names = select_parameters(bound, options.parameters, cut)
    if checked:
        check_problem(bound, names)
    programs, method, reason = _capture(bound, names, options, checked)
    if method == "autograd" and checked:
        # A model that torch cannot differentiate twice is refused here, before a store is made.
        place = "meta" if lacking else "cpu"
        hvp.hessian_vector_products(bound, names, torch.ones(1, _count(bound, names), dtype=bound.dtype, device=place))
    if programs and any(part != "hessian" for part in options.parts) and not programs[0].graph.has_model_boundary:
        raise ConfigError(
            "the ggn and residual parts need to know where the model ends and the loss begins. Pass loss= instead of objective=, "
            "or name the module whose output is the model's output: Problem(..., output='name')."
        )
    inside = ""
    if dtype == "float64":
        narrow = [rounds_inside(program.graph) for program in programs] if programs else [casts_down(bound)]
        inside = next((name for name in narrow if name), "")
    if inside:
        reason += f"; the model itself casts to float32 at {inside}, so that nothing beyond float32 is certain"
    workload = _with_decay(_workload(bound, names, programs, dtype, options.parts), bound)
    if programs:
        # Indices that are given count, also where the model has no weights.
        workload = with_tables(
            workload, programs, [batch_tensors(batch) for batch in problem.batches], unprobed=lacking
        )
        workload = with_activations(workload, programs, options.activations_per_sample)
    check_sections(workload.parameters, options.sections)
    workers, threads = _crew(options)
    request = PlanRequest(
        tuple(options.parts),
        dtype,
        method,
        reason,
        options.shared,
        options.basis,
        workers,
        threads,
        options.device or "cpu",
        _not_checked(programs) if lacking else "",
    )
    return Prepared(bound, names, programs, make_plan(workload, request), inside)


def _capture(
    problem: Problem, names: tuple[str, ...], options: Options, checked: bool
) -> tuple[tuple[Program, ...], Method, str]:
    method = options.method
    activations = _patterns(options.activations)
    if method == "autograd":
        _refuse_activations(activations, "method='autograd' was asked for, which knows no nodes. Use method='auto'.")
        return (), "autograd", "asked for"
    try:
        programs = build_programs(problem, frozenset(names), activations)
        if checked:
            check_rules(problem, programs)
    except GraphError as reason:
        if method == "graph":
            raise
        _refuse_activations(activations, f"the model cannot be captured: {reason}")
        return (), "autograd", f"the graph method is not available ({_clip(str(reason))})"
    return programs, "graph", "captured by torch.export" if method == "auto" else "asked for"


def _patterns(given: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)


def _refuse_activations(activations: Sequence[str], why: str) -> None:
    if activations:
        raise ConfigError(f"activation blocks need the captured graph, and {why}")


def _count(problem: Problem, names: tuple[str, ...]) -> int:
    return sum(parameter.tensor.numel() for parameter in problem.parameters() if parameter.name in names)


def _clip(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _workload(
    problem: Problem, names: tuple[str, ...], programs: tuple[Program, ...], dtype: DType, parts: Sequence[Part]
) -> Workload:
    item = ITEM_BYTES[dtype]
    selected = [parameter for parameter in problem.parameters() if parameter.name in names]
    named = [(p.name, p.aliases, tuple(p.tensor.shape)) for p in selected]
    data = sum(sample_count(batch) for batch in problem.batches)
    model_bytes = sum(t.numel() * t.element_size() for t in (*problem.model.parameters(), *problem.model.buffers()))
    model_bytes += sum(t.numel() * t.element_size() for batch in problem.batches for t in batch_tensors(batch))
    title = f"{type(problem.model).__name__}, {problem.recipe.title}"
    batches = len(problem.batches)
    if not programs:
        return _autograd_workload(title, selected, named, data, batches, model_bytes, item)
    graph, *others = distinct_graphs(programs)
    counter = SourceCounter(graph, others, parts)
    specs = counter.parameters(named)
    targets = parameter_targets(specs)
    ranked = sorted((spec for spec in specs if spec.uses), key=lambda spec: spec.rank)
    sources = tuple(counter.together(spec, targets[spec.name]) for spec in ranked)
    one_graph = all(program.graph is graph for program in programs)
    sizes = [_told_apart(program, batch) for program, batch in zip(programs, problem.batches, strict=True)]
    tensors = (
        problem.model.named_parameters(remove_duplicate=False),
        problem.model.named_buffers(remove_duplicate=False),
    )
    held = frozenset(f"objective.model.{name}" for kind in tensors for name, _ in kind)
    entries = sum(
        primal_entries(program.graph, held) * size // program.graph.samples
        for program, size in zip(programs, sizes, strict=True)
    )
    return Workload(
        title=title,
        parameters=specs,
        sources=sources,
        use_sources=_use_costs(counter, ranked) if one_graph else (),
        samples=sum(sizes),
        largest_batch=max(sizes),
        batches=batches,
        data_samples=data,
        independent=graph.independent,
        why=graph.why,
        model_bytes=model_bytes,
        primal_bytes=entries * item,
        dtype_bytes=item,
        runs=batch_runs(programs, [sample_count(batch) for batch in problem.batches]),
    )


def _with_decay(workload: Workload, problem: Problem) -> Workload:
    specs = tuple(
        dataclasses.replace(spec, weight_decay=problem.weight_decay.get(spec.name, 0.0)) for spec in workload.parameters
    )
    return dataclasses.replace(workload, parameters=specs)


def _not_checked(programs: Sequence[Program]) -> str:
    """What a plan without values leaves open."""
    said = (
        "there are no values: whether any is NaN or infinite, and whether the objective is the same from call to call"
    )
    if programs:
        said += (
            "; whether an operation mixes samples where shapes do not show it; whether the captured graph gives the "
        )
        said += "objective's value"
        operations = doubtful_operations(programs)
        if operations:
            said += f"; the derivatives of {', '.join(operations)}, which a run compares with central differences"
    return said + ". Nothing at kinks, nor any certificate, belongs to a plan"


def _told_apart(program: Program, batch: Any) -> int:
    return sample_count(batch) if program.graph.independent else 1


def _use_costs(counter: SourceCounter, ranked: Sequence[Any]) -> tuple[SourceCost, ...]:
    if not any(len(spec.uses) > 1 for spec in ranked):
        return ()
    order = counter.use_names()
    return tuple(counter.apart(use, frozenset(order[place:])) for place, use in enumerate(order))


def _autograd_workload(
    title: str,
    selected: Sequence[Parameter],
    named: Sequence[tuple[str, tuple[str, ...], tuple[int, ...]]],
    data: int,
    batches: int,
    model_bytes: int,
    item: int,
) -> Workload:
    specs = tuple(
        ParameterSpec(name, aliases, shape, rank, (name,)) for rank, (name, aliases, shape) in enumerate(named)
    )
    total = sum(spec.numel for spec in specs)
    sources = tuple(
        SourceCost(
            spec.name, spec.name, spec.uses, 0, spec.numel, 0, 0, 0, 4 * total, 0, 0, total, False, 4 * total, total, 0
        )
        for spec in specs
    )
    return Workload(
        title, specs, sources, (), data, 1, batches, data, False, "the autograd method does not need to know", model_bytes,
        8 * model_bytes, item,
    )  # fmt: skip


def _crew(options: Options) -> tuple[int, int]:
    if options.executor == "serial":
        return 1, options.threads or default_threads(1)
    workers = options.workers or default_threads(1)
    if options.executor == "processes":
        return workers, 1
    return workers, options.threads or default_threads(workers)


def _check_options(options: Options) -> None:
    parts = options.parts
    if isinstance(parts, str) or not parts or any(part not in PARTS for part in parts):
        raise ConfigError(f"parts must be a list out of {', '.join(PARTS)}, got {parts!r}.")
    if len(set(parts)) != len(parts):
        raise ConfigError(f"parts names one part twice: {parts!r}.")
    for key, allowed in _CHOICES.items():
        value = getattr(options, key)
        if value not in allowed:
            shown = ", ".join(str(entry) for entry in allowed if entry is not None)
            raise ConfigError(f"{key} must be one of {shown}, got {value!r}.")
    for key in ("workers", "threads", "memory_bytes"):
        value = getattr(options, key)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{key} must be a positive whole number, got {value!r}.")
    if options.executor == "serial" and options.workers not in (None, 1):
        raise ConfigError(
            f"workers={options.workers} needs executor='threads', 'processes' or 'ray'; the serial executor is one worker with "
            "threads."
        )
    if options.executor == "processes":
        _check_processes(options)


def _check_processes(options: Options) -> None:
    if options.threads not in (None, 1) or (options.device or "cpu") != "cpu":
        raise ConfigError(
            "executor='processes' forks workers of one thread on the CPU, got "
            f"threads={options.threads}, device={options.device!r}. Leave both out, or use 'threads' or 'ray'."
        )
    reason = why_not()
    if reason:
        raise ConfigError(f"executor='processes' cannot be used here: {reason}. Use 'threads' or 'ray'.")


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": (None, "float32", "float64"),
    "method": ("auto", "graph", "autograd"),
    "shared": ("auto", "uses", "sum"),
    "basis": (None, "output", "parameter"),
    "executor": ("serial", "threads", "processes", "ray"),
}
