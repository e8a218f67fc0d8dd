"""The benchmarks, each with one verb; without a verb, one after another.

    python tests/bench [hessian|products|reductions|scaling|growth] [--problem mlp,gpt] [--dtype float32] [--quick] ...
    python tests/bench bounds|minilm_check|subsets|table

hessian     the whole Hessian, against torch.func and curvlinops; parts of peak speed
products    Hessian-vector products without a store, against other tools
reductions  spectra of a stored Hessian, against the speed of reading it
scaling     one Ray worker against two; tiles against the plan; a schedule of 64 workers
growth      time against parameters, samples and depth
bounds      what a sweep's operations take alone, and so how many times faster it could be at most; only when asked for
minilm_check  a real encoder's largest eigenvalue, trace and density, against PyHessian; only when asked for
subsets     exact Hessians of norms, biases, adapters and a head of 22 million parameters, against torch.func; only when asked for
table       print the Markdown tables of the results that were kept

``python tests/bench hessian --help`` shows a verb's options. Results are JSON files in tests/bench/results/, with times,
medians, the machine and versions. Close everything else first: contenders run turn about, but on the same cores as whatever
else runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import settings

VERBS = ("hessian", "products", "reductions", "scaling", "growth")
CHECKS = ("bounds", "minilm_check", "subsets")
"""Verbs that are run only when they are asked for."""


def main(arguments: Sequence[str]) -> None:
    """Run one verb, or all."""
    if arguments and arguments[0] == "table":
        print_table(arguments[1:])
    elif arguments and arguments[0] in (*VERBS, *CHECKS):
        run(arguments[0], arguments[1:])
    else:
        parser = argparse.ArgumentParser(
            prog="python tests/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        settings.add_options(parser)
        parser.parse_args(arguments)
        for verb in VERBS:
            print(f"\n{verb}", flush=True)
            run(verb, arguments)


def run(verb: str, arguments: Sequence[str]) -> None:
    """Run one verb; its module is loaded only now."""
    module = importlib.import_module(verb)
    parser = argparse.ArgumentParser(
        prog=f"python tests/bench {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",  # a verb may have its own meaning for a common option
    )
    settings.add_options(parser)
    module.add_options(parser)
    module.main(parser.parse_args(arguments))


def print_table(arguments: Sequence[str]) -> None:
    """The verb ``table``."""
    import table

    parser = argparse.ArgumentParser(prog="python tests/bench table", description=table.__doc__)
    parser.add_argument(
        "--out", type=Path, default=settings.RESULTS, help="folder of the JSON files (default %(default)s)"
    )
    table.print_markdown(parser.parse_args(arguments).out)


if __name__ == "__main__":
    main(sys.argv[1:])
