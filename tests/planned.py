"""Problems planned in a process of their own, with the seconds and bytes that it took. Run: python planned.py NAME ..."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def mlp(width: int) -> Any:
    """64-width-width-10 on as many samples as the digits."""
    import torch
    from torch import nn

    import disthess

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    batch = (torch.randn(1797, 64), torch.randint(10, (1797,)))
    return disthess.Problem(model, loss="cross_entropy", batches=[batch])


def decoder(**sizes: Any) -> Any:
    """That of the example."""
    from disthess.loading import Source, load_problem

    return load_problem(Source("examples/plan_7b.py:problem", sizes, folders=(str(ROOT),)))


def llama(layers: int, on: str) -> Any:
    """That of transformers, 7 billion parameters at 32 layers, with token indices on a device."""
    import torch
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

    import disthess

    def next_token(outputs: Any, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers)).eval()
    tokens = torch.zeros(2, 64, dtype=torch.long, device=on)
    return disthess.Problem(model, loss=next_token, batches=[({"input_ids": tokens}, tokens)])


GPUS = {"executor": "ray", "device": "cuda"}
PLANNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (lambda: mlp(960), {**GPUS, "workers": 64}),
    "mlp of many tiles": (lambda: mlp(960), {**GPUS, "workers": 64, "basis": "parameter"}),
    "transformer": (
        lambda: decoder(width=128, inner=384, heads=4, layers=4, words=500, samples=8, tokens=32, device="cpu"),
        {**GPUS, "workers": 64},
    ),
    "norms of 7 billion": (decoder, {**GPUS, "workers": 256, "parameters": "*norm*"}),
    "projections of 7 billion": (
        decoder,
        {**GPUS, "workers": 256, "parameters": ["layers.5.attention.o_proj.*", "layers.6.attention.[qkv]_proj.*"]},
    ),
    "norms of transformers' 7 billion": (
        lambda: llama(32, "meta"),
        {**GPUS, "workers": 256, "parameters": ["model.norm.*", "*layernorm.weight"]},
    ),
    "small mlp": (lambda: mlp(160), {**GPUS, "workers": 64}),
    "one layer of 7 billion": (lambda: decoder(layers=1), {**GPUS, "workers": 256, "parameters": "*norm*"}),
}
"""A problem, and the options of its plan, by name."""


def measured(*names: str) -> list[dict[str, Any]]:
    """Plan, print and write as JSON in a fresh process; what it found out, with its CPU seconds and peak bytes so far."""
    done = subprocess.run(
        [sys.executable, __file__, *names],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
    )
    if done.returncode:
        raise AssertionError(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main(name: str) -> None:
    """Plan, and print what is to be known as one line of JSON."""
    import disthess
    from disthess.execute.dispatch import Dispatcher
    from disthess.execute.memory import peak_process_bytes

    make, options = PLANNED[name]
    problem = make()
    plan = disthess.plan(problem, **options)
    text = plan.describe(flops_per_second=40e12, rate="as given")
    tree = json.dumps(plan.to_json())
    queued = Dispatcher(plan.layout.tiles, plan.workers).queued
    # Seconds of the processor: those of the clock, on a machine that does nothing else.
    found = {"seconds": time.process_time(), "peak_bytes": peak_process_bytes(), "text": text, "queued": queued}
    found |= {"model_numel": problem.numel, "numel": plan.layout.numel, "tiles": len(json.loads(tree)["tiles"])}
    print(json.dumps(found))


if __name__ == "__main__":
    for each in sys.argv[1:]:
        main(each)
