"""Exact Hessians of chosen subsets of a transformer of 22 million parameters, everything else held constant.

    python tests/bench subsets [--subset norms,biases,adapters,head] [--sentences 4] [--tokens 8] [--columns 6] [--out FOLDER]

norms     weights and biases of all layer norms
biases    all biases
adapters  rank-1 adapters beside the query and the value projection of every layer
head      the query rows of one attention head, in the middle of the encoder

Each is a certified store in float32, made by ``disthess.compute(problem, path, parameters=...)``: seconds of the wall and of the
processor, the memory of the tiles against the plan, that of the whole run with its certificate, and the error of some random
columns against ``torch.func`` (``jvp`` of ``grad`` in float64, by a model that puts its subset together itself). A tile of the
same rows through ``disthess.open_cache`` stands beside it.
Weights are random; with ``--quick`` the encoder is small.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import settings
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import disthess
from disthess.execute.memory import PeakMemory

SUBSETS = ("norms", "biases", "adapters", "head")
TILE = 256
"""Rows and columns of the tile through a cache."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the encoder."""

    width: int = 384
    layers: int = 6
    mlp: int = 1536
    heads: int = 12
    vocabulary: int = 30_000

    @property
    def head(self) -> int:
        """Rows of the query projection that one head has."""
        return self.width // self.heads


SMALL = Sizes(width=32, layers=2, mlp=64, heads=4, vocabulary=200)


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it, ``W x + B A x``; rank 0 is the layer alone."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base, self.rank = nn.Linear(width, width), rank
        if rank:
            self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to the same."""
        return self.base(x) + self.up(self.down(x)) if self.rank else self.base(x)


class Layer(nn.Module):
    """Attention and a GELU MLP, each with a layer norm before it."""

    def __init__(self, sizes: Sizes, rank: int) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.q, self.v = Adapted(sizes.width, rank), Adapted(sizes.width, rank)
        self.k, self.o = nn.Linear(sizes.width, sizes.width), nn.Linear(sizes.width, sizes.width)
        self.up, self.down = nn.Linear(sizes.width, sizes.mlp), nn.Linear(sizes.mlp, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        normal = self.norm1(x)
        q, k, v = (part(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, -1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Token numbers ``[N, T]`` to logits of 10 classes."""

    def __init__(self, sizes: Sizes, tokens: int, rank: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.place = nn.Parameter(torch.randn(tokens, sizes.width))
        self.layers = nn.ModuleList(Layer(sizes, rank) for _ in range(sizes.layers))
        self.norm, self.classes = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, 10]``, from the mean over tokens."""
        x = self.embed(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.classes(self.norm(x.mean(1)))


def build(name: str, sizes: Sizes, sentences: int, tokens: int) -> tuple[disthess.Problem, list[str]]:
    """A problem whose norms are not at their initial ones and zeros, and the patterns of one of its subsets."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder(sizes, tokens, rank=1 if name == "adapters" else 0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.add_(0.1 * torch.randn_like(module.weight))
                    module.bias.add_(0.1 * torch.randn_like(module.bias))
        batch = torch.randint(sizes.vocabulary, (sentences, tokens)), torch.randint(10, (sentences,))
    patterns = {
        "norms": ["*norm*"],
        "biases": ["*bias"],
        "adapters": ["layers.*.[qv].up.weight", "layers.*.[qv].down.weight"],
        "head": [f"layers.{sizes.layers // 2}.q.base.weight[{sizes.head}:{2 * sizes.head}]"],
    }
    return disthess.Problem(model, loss="cross_entropy", batches=[batch]), patterns[name]


def exact_columns(problem: disthess.Problem, names: list[str], columns: list[int]) -> np.ndarray:
    """Columns of the Hessian of these parameters, or of a range ``name[first:last]``, by ``torch.func`` in float64: ``[P, K]``."""
    wide = problem.to(torch.float64)
    held = {name: tensor.detach() for name, tensor in wide.model.named_parameters()}
    inputs, targets = wide.batches[0]
    ends = {}
    for name in names:
        base, _, text = name.partition("[")
        first, last = text[:-1].split(":") if text else (0, len(held[base]))
        ends[name] = (base, slice(int(first), int(last)))
    subset = {name: held[base][rows].clone() for name, (base, rows) in ends.items()}

    def loss(given: dict[str, Tensor]) -> Tensor:
        whole = dict(held)
        for name, (base, rows) in ends.items():
            whole[base] = torch.cat([held[base][: rows.start], given[name], held[base][rows.stop :]])
        return nn.functional.cross_entropy(functional_call(wide.model, whole, (inputs,)), targets)

    found = []
    sizes = [tensor.numel() for tensor in subset.values()]
    for column in columns:
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        flat[column] = 1
        tangent = {name: part.reshape(subset[name].shape) for name, part in zip(subset, flat.split(sizes), strict=True)}
        _, change = jvp(grad(loss), (subset,), (tangent,))
        found.append(torch.cat([change[name].reshape(-1) for name in subset]).detach())
    return torch.stack(found, dim=1).numpy()


def add_options(parser: argparse.ArgumentParser) -> None:
    """The verb's own options."""
    parser.add_argument("--subset", default=",".join(SUBSETS), help="names with commas between (default %(default)s)")
    parser.add_argument("--sentences", type=int, default=4, help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=8, help="of each sentence (default %(default)s)")
    parser.add_argument("--columns", type=int, default=6, help="that are compared (default %(default)s)")


def main(options: argparse.Namespace) -> None:
    """Measure each subset, print a table, keep a file for each."""
    chosen = settings.settings_of(options)
    names = options.subset.split(",")
    unknown = sorted(set(names) - set(SUBSETS))
    if unknown:
        raise SystemExit(f"no subset is called {', '.join(unknown)}; there are {', '.join(SUBSETS)}")
    rows = []
    for name in names:
        # A process for each: memory that an earlier one has left would hide what the next one takes.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            values = alone.submit(
                in_a_process, name, chosen, options.sentences, options.tokens, options.columns
            ).result()
        print(f"{name}: {values['wall_seconds']:.0f} s, worst column {values['worst_error']:.1e}", flush=True)
        settings.keep(chosen, f"subsets_{name}_{chosen.dtype}", {"subset": name, **values})
        rows.append((name, values))
    show(rows)


def in_a_process(name: str, chosen: settings.Settings, sentences: int, tokens: int, columns: int) -> dict[str, Any]:
    """`measured`, after a small run: what a first run loads is no part of the time and memory of the subset."""
    torch.set_num_threads(chosen.threads)
    measured(build(name, SMALL, 2, 4), chosen, 1)
    given = build(name, SMALL if chosen.quick else Sizes(), sentences, tokens)
    return {"data": {"sentences": sentences, "tokens": tokens}, **measured(given, chosen, columns)}


def measured(given: tuple[disthess.Problem, list[str]], chosen: settings.Settings, count: int) -> dict[str, Any]:
    """One subset: its plan, what it took, and its errors."""
    problem, patterns = given
    options: dict[str, Any] = {"parameters": patterns, "dtype": chosen.dtype, "threads": chosen.threads}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subset.zarr"
        with PeakMemory() as peak:
            wall, processor = time.perf_counter(), time.process_time()
            store = disthess.compute(problem, path, progress=False, **options)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            rise = peak.rise_bytes()
        plan = disthess.plan(problem, **options)
        columns = np.random.default_rng(0).choice(store.numel, min(count, store.numel), replace=False).tolist()
        exact = exact_columns(problem, [entry.name for entry in store.parameters], columns)
        found = np.concatenate([store.read(slice(0, store.numel), column) for column in columns], axis=1)
        certificate = store.certificate()
        tiles_peak = max(record.peak_bytes for record in store.store.records())
        tile = through_cache(problem, store, Path(folder) / "cache.zarr", chosen)
    errors = np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)
    return {
        "problem": {"P": problem.numel, "dtype": chosen.dtype, "patterns": patterns},
        "rows": store.numel,
        "plan": {"flops": plan.flops, "product_flops": plan.product_flops, "peak_bytes": plan.peak_bytes,
                 "disk_bytes": plan.disk_bytes},
        "wall_seconds": wall,
        "processor_seconds": processor,
        "load": os.getloadavg()[1],
        "peak_bytes": rise,
        "tiles_peak_bytes": tiles_peak,
        "certificate": certificate.worst if certificate else None,
        "columns": columns,
        "errors": errors.tolist(),
        "worst_error": float(errors.max()),
        "tile": tile,
    }  # fmt: skip


def through_cache(problem: disthess.Problem, store: Any, path: Path, chosen: settings.Settings) -> dict[str, Any]:
    """The first tile of the subset's first parameter by itself, against the store."""
    first = store.parameters[0]
    side = min(TILE, first.numel)
    base, _, text = first.name.partition("[")
    place = (first.name, slice(0, side)) if text else (base, slice(0, side))
    cache = disthess.open_cache(path, problem, dtype=chosen.dtype)
    plan = cache.plan(place, place)
    wall, processor = time.perf_counter(), time.process_time()
    tile = cache.read(place, place, compute=True)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    wanted = store.read(slice(0, side), slice(0, side))
    return {
        "entries": list(tile.shape),
        "products": plan.products,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "difference": float(np.linalg.norm(tile - wanted) / np.linalg.norm(wanted)),
    }


def show(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """The table."""
    table = Table(title="Exact Hessians of subsets")
    for title in (
        "subset",
        "rows",
        "seconds",
        "CPU s",
        "TFLOP",
        "tiles MB",
        "planned",
        "run MB",
        "worst column",
        "tile s",
    ):
        table.add_column(title, justify="left" if title == "subset" else "right")
    for name, values in rows:
        table.add_row(
            name,
            f"{values['rows']:,}",
            f"{values['wall_seconds']:.1f}",
            f"{values['processor_seconds']:.1f}",
            f"{values['plan']['flops'] / 1e12:.2f}",
            f"{values['tiles_peak_bytes'] / 1e6:.0f}",
            f"{values['plan']['peak_bytes'] / 1e6:.0f}",
            f"{values['peak_bytes'] / 1e6:.0f}",
            f"{values['worst_error']:.1e}",
            f"{values['tile']['wall_seconds']:.1f}",
        )
    Console(width=120).print(table)
