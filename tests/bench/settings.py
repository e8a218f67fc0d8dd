"""What every verb is told: problems, dtype, rounds, threads, sizes, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import disthess

RESULTS = Path(__file__).parent / "results"
NAMES = ("mlp", "cnn", "rnn", "gpt")
QUICK_SIZES = {"mlp": (0.25, 128), "cnn": (0.5, 64), "rnn": (0.25, 64), "gpt": (0.25, 4)}
"""With ``--quick``: factor of the widths, and samples."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Options after defaults.

    Attributes:
        problems: Names.
        dtype: ``float32`` or ``float64``.
        rounds: Times that every contender runs.
        threads: Threads of this process; also workers of Ray, of one thread each.
        scale: Factor of widths; None for each problem's default.
        samples: First so many samples; None for each problem's default.
        quick: Whether everything is small, to see that it runs.
        out: Folder of the JSON files; None to write none.
    """

    problems: tuple[str, ...]
    dtype: str
    rounds: int
    threads: int
    scale: float | None
    samples: int | None
    quick: bool
    out: Path | None

    def size(self, name: str) -> tuple[float, int | None]:
        """Factor of the widths and samples of a problem."""
        scale, samples = QUICK_SIZES[name] if self.quick else (1.0, None)
        return self.scale or scale, self.samples or samples

    def build(self, name: str) -> disthess.Problem:
        """A problem at its size."""
        from variants import build

        return build(name, *self.size(name))


def add_options(parser: argparse.ArgumentParser, problems: Sequence[str] = NAMES) -> None:
    """The options that all verbs have."""
    parser.add_argument("--problem", default=",".join(problems), help="names with commas between (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default %(default)s")
    parser.add_argument("--rounds", type=int, help="times that every contender runs; medians count (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads, or one-thread Ray workers (default 2)")
    parser.add_argument("--scale", type=float, help="factor of the problems' widths (default 1)")
    parser.add_argument("--samples", type=int, help="take the first so many samples only (default all)")
    parser.add_argument("--quick", action="store_true", help="small problems, one round: to see that it runs")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON files (default tests/bench/results, --quick: none)"
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Defaults filled in.

    Raises:
        SystemExit: A problem is not known.
    """
    names = tuple(options.problem.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise SystemExit(f"no problem is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return Settings(
        problems=names,
        dtype=options.dtype,
        rounds=options.rounds or (1 if options.quick else 3),
        threads=options.threads,
        scale=options.scale,
        samples=options.samples,
        quick=options.quick,
        out=options.out or (None if options.quick else RESULTS),
    )


def keep(settings: Settings, name: str, values: dict[str, Any]) -> None:
    """Write a result as ``name.json``, with when, where and by which versions it was measured; nothing without a folder."""
    import machine

    if settings.out is None:
        return
    about = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": machine.hardware(settings.threads),
        "versions": machine.versions(),
        "quick": settings.quick,
        "rounds": settings.rounds,
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"{name}.json"
    path.write_text(json.dumps({**about, **values}, indent=2) + "\n")
    print(f"kept in {path}")
