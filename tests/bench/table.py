"""Tables of results: on a terminal by Rich, and as Markdown for the README."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

Values = dict[str, Any]
ORDER = ("mlp", "cnn", "rnn", "gpt")


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header, rows of text (the first column to the left, numbers to the right), and notes under it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as Markdown, then each note as a paragraph."""
        lines = ["| " + " | ".join(self.header) + " |", "|---|" + "---:|" * (len(self.header) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *("\n" + note for note in self.notes)])


def show(table: Table) -> None:
    """Print on the terminal; as wide as it needs to be where there is none."""
    shown = RichTable(title=table.title, caption="\n".join(table.notes) or None, caption_justify="left")
    for place, name in enumerate(table.header):
        shown.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 150, markup=False).print(shown)


def hessian_table(found: Sequence[Values]) -> Table:
    """Times of the whole Hessian, one row per problem and dtype."""
    header = (
        "problem",
        "P",
        "N",
        "disthess",
        "torch.func",
        "curvlinops",
        "disthess / best peer",
        "of GEMM peak",
        "store's writes / raw",
    )
    return Table("Whole Hessian", header, tuple(_hessian_row(values) for values in found), _hessian_notes(found))


def _hessian_row(values: Values) -> tuple[str, ...]:
    problem, form = values["problem"], values["best_disthess"]
    rates = values["writes"]["bytes_per_second"]
    return (
        f"{problem['name']}, {problem['dtype']}",
        f"{problem['P']:,}",
        f"{problem['N']:,}",
        f"{seconds(values['medians'][form])} ({form.removeprefix('disthess, ')})",
        _tool(values, "torch.func"),
        _tool(values, "curvlinops"),
        f"{values['ratio']:.3f}",
        f"{values['sweeps'][form]['fraction_of_peak']:.0%}",
        f"{rates['store_alone'] / rates['raw']:.0%}",
    )


def _tool(values: Values, tool: str) -> str:
    if tool not in values["best_of_tools"]:
        return "not installed"
    best = values["best_of_tools"][tool]
    about = "*" if values["columns"]["peers_scaled_up"] else ""
    wrong = f", wrong by {values['differences'][best['name']]:.0e}" if best["name"] in values["wrong_peers"] else ""
    return f"{seconds(best['seconds'])}{about} (chunk {best['chunk']}{wrong})"


def _hessian_notes(found: Sequence[Values]) -> tuple[str, ...]:
    scaled = sorted({values["columns"]["timed"] for values in found if values["columns"]["peers_scaled_up"]})
    columns = " or ".join(f"{count:,}" for count in scaled)
    return (
        (f"* timed on {columns} columns at equal distances over all parameters, and scaled up to P",) if scaled else ()
    )


def bounds_table(found: Sequence[Values]) -> Table:
    """What would be left if a sweep did nothing but its products, or nothing but its operations, each in a hot cache."""
    header = (
        "problem",
        "capture and certificate",
        "products at GEMM peak",
        "products alone",
        "operations alone",
        "tiles as run",
        "at most, peak",
        "at most, products",
        "at most, operations",
        "as run",
        "aimed at",
    )
    notes = ("Seconds of one thread but for the tiles as run; times faster than the best of torch.func.",)
    return Table("Floors", header, tuple(_bounds_row(values) for values in found), notes)


def _bounds_row(values: Values) -> tuple[str, ...]:
    work, faster = values["seconds_alone_of"], values["times_faster"]
    return (
        f"{values['problem']['name']}, {values['problem']['dtype']}",
        seconds(values["fixed"]),
        *(seconds(work[key]) for key in ("peak", "products", "operations")),
        seconds(values["run"]["tiles"]),
        *(f"{faster[key]:.1f}" for key in ("peak", "products", "operations", "run")),
        f"{values['target']:.1f}",
    )


def scaling_table(found: Sequence[Values]) -> Table:
    """One worker against two, and how well the plan foresees tiles."""
    header = (
        "problem",
        "P",
        "tiles, 1 worker",
        "tiles, 2 workers",
        "ratio",
        "end to end, 1",
        "end to end, 2",
        "ratio",
        "two processes apart",
        "correlation with the plan",
        "worst tile / plan",
        "of tiles from 1 % on",
    )
    return Table("Workers of one thread", header, tuple(_scaling_row(values) for values in found))


def _scaling_row(values: Values) -> tuple[str, ...]:
    tiles, whole, forecast = values["tiles"], values["end_to_end"], values["forecast"]
    return (
        f"{values['problem']['name']}, {values['problem']['dtype']}",
        f"{values['problem']['P']:,}",
        seconds(tiles["one"]),
        seconds(tiles["two"]),
        f"{tiles['ratio']:.2f}",
        seconds(whole["one"]),
        seconds(whole["two"]),
        f"{whole['ratio']:.2f}",
        f"{values['apart']['ratio']:.2f}",
        f"{forecast['correlation']:.3f}" if forecast["correlation"] is not None else "-",
        f"{forecast['largest_factor']:.2f}",
        f"{forecast['largest_factor_of_large_tiles'] or math.nan:.2f}",
    )


def schedule_table(values: Values) -> Table:
    """Balance of a plan for many workers."""
    header = ("plan", "P", "tiles", "workers", "busiest owner / mean", "makespan / mean")
    row = (
        values["plan"],
        f"{values['P']:,}",
        f"{values['tiles']:,}",
        str(values["workers"]),
        f"{values['balance']:.4f}",
        f"{values['makespan']:.4f}",
    )
    return Table("Schedule by projected FLOPs, nothing computed", header, (row,))


def growth_table(values: Values) -> Table:
    """Exponents of times and of planned work."""
    header = ("grows", "sizes", "sweep", "end to end", "planned product FLOPs", "planned FLOPs")
    rows = []
    for name, growth in values["growth"].items():
        slopes = growth["slopes"]
        rows.append(
            (
                name,
                ", ".join(f"{size:,}" for size in growth["sizes"]),
                *(f"{slopes[key]:.2f}" for key in ("sweep_seconds", "seconds", "product_flops", "flops")),
            )
        )
    return Table(f"Exponents of growth, {values['dtype']}", header, tuple(rows))


def seconds(value: float) -> str:
    """Three figures.

    >>> seconds(0.01234), seconds(123.4)
    ('0.0123 s', '123 s')
    """
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def print_markdown(folder: Path) -> None:
    """The tables of all results in a folder, as Markdown."""
    tables: list[tuple[Callable[[Sequence[Values]], Table], list[Values]]] = []
    for dtype in ("float32", "float64"):
        verbs = {"hessian": hessian_table, "bounds": bounds_table, "scaling": scaling_table}
        tables += [(make, _read(folder, verb, dtype)) for verb, make in verbs.items()]
    for make, found in tables:
        if found:
            _print(make(found))
    for path in sorted(folder.glob("scaling_schedule.json")):
        _print(schedule_table(json.loads(path.read_text())))
    for path in sorted(folder.glob("growth_*.json")):
        _print(growth_table(json.loads(path.read_text())))


def _print(table: Table) -> None:
    print(f"{table.title}:\n\n{table.markdown()}\n")


def _read(folder: Path, verb: str, dtype: str) -> list[Values]:
    paths = [folder / f"{verb}_{name}_{dtype}.json" for name in ORDER]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]
