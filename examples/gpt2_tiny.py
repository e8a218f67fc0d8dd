"""GPT-2 from transformers, tiny and with random weights: the tied embedding as embedding, as head, and the cross term.

Needs the extra `hf`. Nothing is set for disthess's sake: the default attention, the model's own module tree.

Run it: python examples/gpt2_tiny.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

import disthess


def next_token(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it."""
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def problem(width: int = 8, samples: int = 4, seed: int = 0) -> disthess.Problem:
    """Random tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=13, n_positions=8, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(1, 13, (samples, 6))
    return disthess.Problem(GPT2LMHeadModel(config).eval(), loss=next_token, batches=[({"input_ids": tokens}, tokens)])


def main() -> None:
    """Print the norms of the embedding's blocks by use."""
    with tempfile.TemporaryDirectory() as folder:
        store = disthess.compute(
            problem(),
            f"{folder}/gpt2.zarr",
            parameters=["*.wte.*", "*.attn.*"],
            shared="uses",
            dtype="float64",
            progress=False,
        )
        embedding, head = next(p.uses for p in store.parameters if p.name == "transformer.wte.weight")
        for a, b in ((embedding, embedding), (embedding, head), (head, head)):
            print(f"{a:<50} {b:<50} {np.linalg.norm(store.use_block(a, b)):.4f}")


if __name__ == "__main__":
    main()
