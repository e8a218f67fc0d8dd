"""What the command line prints: tables for people, plain dicts for ``--json``; and the few files it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from disthess.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from disthess.config import ReportSection

_CORNER = 5
_PARAMETER_ROWS = 40
_USES = 12
_KINK_ROWS = 8


def print_run(store: Any, report: ReportSection, path: str) -> None:
    """What ``disthess run`` shows of a finished store."""
    from disthess import api
    from disthess.pictures import files as pictures

    print_certificates(store)
    print_splits(store)
    print_kinks(store)
    print_definiteness(store)
    part = store.parts[0]
    pairs = api.eigenvalues(store, k=report.eigenvalues, part=part) if report.eigenvalues else None
    curve = api.spectral_density(store, part=part) if report.density else None
    if pairs is not None:
        print_spectrum(part, pairs, None)
    if report.blocks:
        print_blocks(part, store.blocks(part), report.blocks)
    if report.pictures:
        # Beside the store, not in it: a store holds arrays alone. Of one on an object store, in the current folder.
        folder = Path(path.rsplit("/", 1)[-1] if "://" in path else path).with_suffix(".pictures")
        draw(pictures.spectrum_picture, folder / "spectrum.png", curve, pairs, part)
        names = [entry.name for entry in store.parameters]
        draw(pictures.block_picture, folder / "blocks.png", names, store.blocks(part).matrix(), part)
        typer.echo(f"pictures   {folder / 'spectrum.png'}  {folder / 'blocks.png'}")
    typer.echo(f"store      {path}    (disthess info {path})")


def print_certificates(store: Any) -> None:
    """One line per part, and one for the activation blocks where there are any."""
    for part in (*store.parts, *(["activations"] if store.activations else [])):
        print_certificate(store, part)


def print_splits(store: Any) -> None:
    """How many tiles ran out of memory and were computed in smaller pieces; nothing if none did."""
    split = sum(record.split > 0 for record in store.store.records())
    if split:
        typer.echo(
            f"memory     {split} tile{'s were' if split != 1 else ' was'} split for memory: exact to rounding, but not the bytes "
            f"of a run that had enough"
        )


def print_kinks(store: Any) -> None:
    """Where the objective's derivatives jump at these parameters, and what torch took there; nothing if nothing is tied."""
    found = store.kinks
    if found is None:
        typer.echo("kinks      not looked for: the model was not captured")
        return
    for entry in found[:_KINK_ROWS]:
        samples = (
            "" if entry["samples"] is None else f" in {entry['samples']:,} sample{'s' if entry['samples'] != 1 else ''}"
        )
        typer.echo(
            f"kink       {entry['node']} ({entry['op'].split('.')[1]}): {entry['entries']:,} tied{samples}; "
            f"torch takes {entry['torch_takes']}"
        )
    if found:
        more = f"{len(found) - _KINK_ROWS} more nodes; " if len(found) > _KINK_ROWS else ""
        typer.echo(f"           {more}the Hessian there is one of several: see disthess.clarke_hessian")


def print_definiteness(store: Any) -> None:
    """Whether the generalised Gauss-Newton matrix, where it is stored, has a negative eigenvalue."""
    if "ggn" not in store.parts:
        return
    from disthess import api

    found = api.psd_check(store)
    why = "" if found.verdict == "positive semi-definite" else "; the loss is not convex in the model's outputs"
    typer.echo(
        f"ggn        {found.verdict}: smallest eigenvalue {found.smallest:.3e} (residual {found.residual:.1e}, rounding "
        f"{found.tolerance:.1e}), largest {found.largest:.4e}{why}"
    )


def print_certificate(store: Any, part: str) -> None:
    """One line per part: how far the stored matrix is from Hessian-vector products of the eager model."""
    summary = certificate_summary(store, part)
    if summary is None:
        typer.echo(f"certificate {part}: none")
        return
    typer.echo(
        f"certificate {part}: {'passed' if summary['passed'] else 'FAILED'}, worst ||Hx - hvp(x)|| / ||hvp(x)|| = "
        f"{summary['worst']:.2e} over {summary['vectors']} random x, asymmetry {summary['symmetry']:.1e}, tolerance "
        f"{summary['tolerance']:.0e}"
    )


def print_spectrum(part: str, pairs: Any, density: Any) -> None:
    """Eigenvalues, largest first, with residuals; and where the bulk lies."""
    if pairs is not None:
        shown = table(f"extreme eigenvalues of the {part}", "eigenvalue", "||Hv - lambda v||")
        order = np.argsort(pairs.values)[::-1]
        for value, residual in zip(pairs.values[order], pairs.residuals[order], strict=True):
            shown.add_row(f"{value: .8e}", f"{residual:.1e}")
        show(shown)
    if density is not None:
        mean, spread = _moments(density)
        typer.echo(f"density of the {part}: mean eigenvalue {mean:.4g}, standard deviation {spread:.4g}")


def spectrum_summary(part: str, pairs: Any, density: Any) -> dict[str, Any]:
    """As JSON."""
    tree: dict[str, Any] = {"part": part}
    if pairs is not None:
        tree["eigenvalues"] = [
            {"value": float(value), "residual": float(residual)}
            for value, residual in zip(pairs.values, pairs.residuals, strict=True)
        ]
    if density is not None:
        tree["density"] = {
            "grid": np.asarray(density.grid, dtype=float).tolist(),
            "density": np.asarray(density.density, dtype=float).tolist(),
            "standard_error": np.broadcast_to(density.standard_error, np.shape(density.grid)).astype(float).tolist(),
        }
    return tree


def print_low_rank(part: str, found: Any, out: Path | None) -> None:
    """Values and what is left out."""
    values = found.values
    typer.echo(
        f"{part}, rank {len(values)} ({found.method}): error {found.error:.4g} in Frobenius norm, {found.relative_error:.2%} of "
        f"the whole (at most {found.frobenius_bound:.4g}; {found.spectral_bound:.4g} in spectral norm)"
    )
    shown = ", ".join(f"{value:.5g}" for value in values[:10])
    typer.echo(f"values, largest magnitude first: {shown}{', ...' if len(values) > 10 else ''}")
    if out is not None:
        typer.echo(f"saved: {out} (values, vectors)")


def low_rank_summary(part: str, found: Any) -> dict[str, Any]:
    """As JSON."""
    return {
        "part": part,
        "rank": len(found.values),
        "values": [float(value) for value in found.values],
        "method": found.method,
        "error": float(found.error),
        "standard_error": float(found.standard_error),
        "relative_error": float(found.relative_error),
        "frobenius_bound": float(found.frobenius_bound),
        "spectral_bound": float(found.spectral_bound),
    }


def print_blocks(part: str, blocks: Any, count: int) -> None:
    """The blocks of largest Frobenius norm."""
    shown = table(f"largest blocks of the {part}", "A", "B", "Frobenius norm", "trace", left=2)
    for row in list(blocks.rows())[:count]:
        trace = getattr(row, "trace", None)
        shown.add_row(row.a, row.b, f"{row.norm:.6e}", "" if trace is None or math.isnan(trace) else f"{trace: .6e}")
    show(shown)


def print_block(values: np.ndarray, title: str, out: Path | None) -> None:
    """Shape, norm, and the file or a corner."""
    typer.echo(f"{title}: shape {values.shape[0]} x {values.shape[1]}, {values.dtype}")
    typer.echo(f"Frobenius norm {np.linalg.norm(values):.6e}, entries {_range(values)}")
    if out is not None:
        typer.echo(f"saved: {out}")
        return
    corner = values[:_CORNER, :_CORNER]
    typer.echo(f"first {corner.shape[0]} x {corner.shape[1]} entries (--out F.npy saves all):")
    for row in corner:
        typer.echo("  " + "  ".join(f"{entry: .6e}" for entry in row))


def store_summary(store: Any) -> dict[str, Any]:
    """What a store holds, as JSON."""
    missing = len(store.missing_tiles())
    total = len(store.layout.tiles)
    return {
        "path": str(store.path),
        "numel": store.numel,
        "dtype": store.layout.dtype,
        "parts": list(store.parts),
        "tiles": {"total": total, "done": total - missing, "missing": missing},
        "loss": _number(lambda: store.loss),
        "gradient_norm": _number(lambda: np.linalg.norm(store.gradient)),
        "parameters": [
            {"name": entry.name, "shape": list(entry.shape), "numel": entry.numel, "uses": len(entry.uses),
             "aliases": list(entry.aliases)}
            for entry in store.parameters
        ],
        "uses": list(store.uses()),
        "activations": [
            {"name": entry.name, "modules": list(entry.modules), "shape": list(entry.shape)} for entry in store.activations
        ],
        "sections": store.sections,
        "kinks": store.kinks,
        "certificates": {
            part: certificate_summary(store, part)
            for part in (*store.parts, *(["activations"] if store.activations else []))
        },
    }  # fmt: skip


def print_store(store: Any) -> None:
    """What a store holds."""
    tree = store_summary(store)
    tiles = tree["tiles"]
    typer.echo(f"store      {tree['path']}: {', '.join(tree['parts'])}, {tree['dtype']}")
    typer.echo(f"parameters {tree['numel']:,} in {len(tree['parameters'])} tensors")
    typer.echo(
        f"tiles      {tiles['done']} of {tiles['total']} done{', run again to resume' if tiles['missing'] else ''}"
    )
    if tree["loss"] is not None and tree["gradient_norm"] is not None:
        typer.echo(f"loss       {tree['loss']:.8g}, gradient norm {tree['gradient_norm']:.4g}")
    print_certificates(store)
    if not tiles["missing"]:
        print_kinks(store)
        print_definiteness(store)
    shown = table("", "parameter", "shape", "entries", "uses", left=2)
    for entry in tree["parameters"][:_PARAMETER_ROWS]:
        names = entry["name"] + "".join(f" = {alias}" for alias in entry["aliases"])
        shown.add_row(names, " x ".join(map(str, entry["shape"])), f"{entry['numel']:,}", str(entry["uses"]))
    show(shown)
    if len(tree["parameters"]) > _PARAMETER_ROWS:
        typer.echo(f"... and {len(tree['parameters']) - _PARAMETER_ROWS} more; --json lists all")
    shared = [use for entry in store.parameters if len(entry.uses) > 1 for use in entry.uses]
    if shared:
        more = f", ... ({len(shared)} in all; --json lists them)" if len(shared) > _USES else ""
        typer.echo(f"uses of shared parameters: {', '.join(shared[:_USES])}{more}")
    if tree["activations"]:
        typer.echo(
            f"activations: {', '.join(entry['name'] for entry in tree['activations'])}    (disthess activations)"
        )
    for name, text in tree["sections"].items():
        typer.echo(f"section {name} = {text}")


def certificate_summary(store: Any, part: str) -> dict[str, Any] | None:
    """A part's certificate as JSON, or None while there is none."""
    try:
        found = store.certificate(part)
    except StoreError:
        return None
    if found is None:
        return None
    errors = np.atleast_1d(found.errors)
    return {
        "passed": bool(found.passed),
        "worst": float(found.worst),
        "vectors": len(errors),
        "symmetry": float(found.symmetry),
        "tolerance": float(found.tolerance),
    }


def save_array(path: Path, values: np.ndarray) -> None:
    """Write one array as ``.npy``, under exactly that name."""
    _written(path, lambda target: _save_open(target, values))


def save_text(path: Path, text: str) -> None:
    """Write text."""
    _written(path, lambda target: target.write_text(text, encoding="utf-8"))


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as ``.npz``, under exactly that name."""

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    _written(path, write)


def draw(picture: Callable[..., None], path: Path, *arguments: Any) -> None:
    """Draw a picture into a file, whose folder is made if need be."""
    _written(path, lambda target: picture(target, *arguments))


def _save_open(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values)


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be written: {error}. Name a file of a kind and in a folder that can be."
        ) from error


def table(title: str, *columns: str, left: int = 0) -> Table:
    """An empty table; the first ``left`` columns are words."""
    made = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    return made


def show(made: Table) -> None:
    """Print a table."""
    console = Console()
    # Piped output has no width of its own: leave room for long parameter names.
    width = console.width if console.is_terminal else 160
    Console(width=width, highlight=False).print(made)


def _moments(density: Any) -> tuple[float, float]:
    grid, height = np.asarray(density.grid, dtype=float), np.asarray(density.density, dtype=float)
    mass = np.trapezoid(height, grid)
    mean = np.trapezoid(height * grid, grid) / mass
    return float(mean), float(math.sqrt(max(np.trapezoid(height * (grid - mean) ** 2, grid) / mass, 0.0)))


def _range(values: Sequence[Any] | np.ndarray) -> str:
    array = np.asarray(values)
    return f"{array.min():.4e} to {array.max():.4e}" if array.size else "none"


def _number(get: Callable[[], Any]) -> float | None:
    """A number of a store that may not be there yet."""
    try:
        value = get()
    except StoreError:
        return None
    return None if value is None or not math.isfinite(float(value)) else float(value)
