"""Time the digits Hessian: disthess end to end, its store written, against torch.func with its best chunk size.

    python tests/bench/bench_digits.py [--quick] [--rounds 3] [--threads 2] [--dtype float32]

Both contenders run in this process, turn about, on the same threads. torch.func is ``vmap`` of ``jvp`` of ``grad`` over the
columns of the identity, in chunks of 16, 64 and 256, into one dense array in memory; nothing is written for it. ``--quick``
times it on 512 columns and scales up. Medians and the ratio are printed and kept as JSON in tests/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

import disthess

ROOT = Path(__file__).parents[2]
CHUNKS = (16, 64, 256)
QUICK_COLUMNS = 512


def main() -> None:
    """Run the benchmark."""
    options = parse()
    torch.set_num_threads(options.threads)
    sys.path.insert(0, str(ROOT / "examples"))
    import digits_mlp

    problem = digits_mlp.problem()
    contenders: dict[str, Callable[[], float]] = {"disthess": lambda: time_disthess(problem, options)}
    for chunk in CHUNKS:
        contenders[f"torch.func chunk {chunk}"] = lambda chunk=chunk: time_torch_func(problem, chunk, options)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender())
            print(f"round {turn + 1}  {name:22s} {seconds[name][-1]:8.2f} s", flush=True)
    report(seconds, problem.numel, options)


def parse() -> argparse.Namespace:
    """Command line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"time torch.func on {QUICK_COLUMNS} columns and scale up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    return parser.parse_args()


def time_disthess(problem: disthess.Problem, options: argparse.Namespace) -> float:
    """Seconds of `disthess.compute` from problem to certified store."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        disthess.compute(problem, f"{folder}/digits.zarr", dtype=options.dtype, threads=options.threads, progress=False)
        return time.perf_counter() - begin


def time_torch_func(problem: disthess.Problem, chunk: int, options: argparse.Namespace) -> float:
    """Seconds of the dense Hessian by torch.func (scaled up from some columns with ``--quick``)."""
    moved = problem.to(getattr(torch, options.dtype))
    (inputs, targets), model = moved.batches[0], moved.model
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    sizes = [tensor.numel() for tensor in parameters.values()]
    gradient = grad(
        lambda values: torch.nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)
    )

    def product(vector: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        tangents = {name: part.reshape(tensor.shape) for (name, tensor), part in parts}
        _, change = jvp(gradient, (parameters,), (tangents,))
        return torch.cat([entry.reshape(-1) for entry in change.values()])

    numel = sum(sizes)
    columns = min(QUICK_COLUMNS, numel) if options.quick else numel
    begin = time.perf_counter()
    matrix = torch.empty(columns, numel, dtype=moved.dtype)
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        basis = torch.zeros(stop - start, numel, dtype=moved.dtype)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1
        matrix[start:stop] = vmap(product)(basis)
    return (time.perf_counter() - begin) * numel / columns


def report(seconds: dict[str, list[float]], numel: int, options: argparse.Namespace) -> None:
    """Print medians and the ratio, and keep them."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in medians if name != "disthess"), key=medians.__getitem__)
    ratio = medians["disthess"] / medians[best]
    for name, value in medians.items():
        print(f"median   {name:22s} {value:8.2f} s")
    print(f"disthess takes {ratio:.3f} of the time of {best}" + (" (scaled up)" if options.quick else ""))
    kept = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {"machine": platform.machine(), "processor": processor(), "threads": options.threads},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "disthess": disthess.__version__},
        "problem": {"name": "digits_mlp", "numel": numel, "dtype": options.dtype},
        "quick": options.quick,
        "seconds": seconds,
        "medians": medians,
        "best_torch_func": best,
        "ratio": ratio,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"digits_{options.dtype}_{options.threads}threads{'_quick' if options.quick else ''}.json"
    path.write_text(json.dumps(kept, indent=2) + "\n")
    print(f"kept in {path.relative_to(ROOT)}")


def processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
