"""Models of the transformers library at tiny sizes with random weights, as a user would pass them: nothing is set for our sake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import disthess

T = pytest.importorskip("transformers")

SIZES = {"vocab_size": 11, "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.randint(3, 11, (3, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
LABELS = torch.where(MASK == 1, IDS, -100)
CLASSES = torch.tensor([0, 1, 1])
IMAGES = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
SENTENCES = {"input_ids": IDS, "attention_mask": MASK}


def gpt2() -> nn.Module:
    return T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=11, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    )


def vit() -> nn.Module:
    return T.ViTForImageClassification(
        T.ViTConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=5, image_size=4,
                    patch_size=2, num_channels=1)
    )  # fmt: skip


def distilbert() -> nn.Module:
    config = T.DistilBertConfig(vocab_size=11, max_position_embeddings=8, n_layers=1, n_heads=2, dim=4, hidden_dim=5)
    return T.DistilBertForSequenceClassification(config)


def albert() -> nn.Module:
    return T.AlbertForSequenceClassification(T.AlbertConfig(**{**SIZES, "num_hidden_layers": 2}, embedding_size=3))


def bart() -> nn.Module:
    return T.BartForConditionalGeneration(
        T.BartConfig(vocab_size=11, d_model=4, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=5, decoder_ffn_dim=5,
                     encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=8)
    )  # fmt: skip


def t5() -> nn.Module:
    config = T.T5Config(vocab_size=11, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T.T5ForConditionalGeneration(config)


def opt() -> nn.Module:
    config = T.OPTConfig(vocab_size=11, hidden_size=4, num_hidden_layers=1, ffn_dim=5, num_attention_heads=2,
                         max_position_embeddings=8, word_embed_proj_dim=4, pad_token_id=0)  # fmt: skip
    return T.OPTForCausalLM(config)


def next_token(outputs: Any, labels: Tensor) -> Tensor:
    """The loss of language models, without their cast to float32."""
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


LANGUAGE: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT, num_key_value_heads=1)),
    "mistral": lambda: T.MistralForCausalLM(T.MistralConfig(**TEXT, num_key_value_heads=1)),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=2, pad_token_id=0)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**TEXT)),
    "opt": opt,
    "t5": t5,
    "bart": bart,
}
CASTS_DOWN = {"llama", "qwen2", "mistral", "gemma", "gpt_neox", "t5"}
"""These normalise, rotate or take a softmax in float32 whatever their dtype: no more than that can be asked."""
CLASSIFIERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT)), SENTENCES),
    "vit": (vit, {"pixel_values": IMAGES}),
    "roberta": (lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**TEXT)), SENTENCES),
    "distilbert": (distilbert, SENTENCES),
    "electra": (lambda: T.ElectraForSequenceClassification(T.ElectraConfig(**TEXT, embedding_size=4)), SENTENCES),
    "albert": (albert, SENTENCES),
}
DEFAULT = ("gpt2", "bert")


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double().eval()


def error(store: Any, problem: disthess.Problem, part: str = "hessian") -> float:
    wanted = disthess.reference_hessian(problem, part)
    return float(np.linalg.norm(store.dense(part) - wanted) / np.linalg.norm(wanted))


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(LANGUAGE))
def test_language_models_by_logits(name: str, tmp_path: Path) -> None:
    inputs = {**SENTENCES, "decoder_input_ids": IDS} if name in ("t5", "bart") else SENTENCES
    problem = disthess.Problem(build(LANGUAGE[name]), loss=next_token, batches=[(inputs, LABELS)])
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=("hessian", "ggn"), progress=False)
    allowed = 1e-5 if name in CASTS_DOWN else 1e-10
    assert error(store, problem) <= allowed
    assert error(store, problem, "ggn") <= allowed
    assert store.attributes["method"] == "graph"
    assert store.certificate().passed
    if name not in CASTS_DOWN:
        assert disthess.psd_check(store).verdict == "positive semi-definite"


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.slow) for n in LANGUAGE])
def test_language_models_by_their_own_loss(name: str, tmp_path: Path) -> None:
    problem = disthess.Problem(
        build(LANGUAGE[name]), objective=lambda m, b: m(**b).loss, batches=[{**SENTENCES, "labels": LABELS}]
    )
    store = disthess.compute(problem, tmp_path / "run.zarr", progress=False)
    assert error(store, problem) <= 1e-5
    assert store.attributes["method"] == "graph"


@pytest.mark.parametrize("name", marked(CLASSIFIERS))
def test_classifiers(name: str, tmp_path: Path) -> None:
    make, inputs = CLASSIFIERS[name]
    problem = disthess.Problem(build(make), loss="cross_entropy", batches=[(inputs, CLASSES)])
    store = disthess.compute(problem, tmp_path / "run.zarr", parts=("hessian", "ggn"), progress=False)
    assert error(store, problem) <= 1e-10
    assert error(store, problem, "ggn") <= 1e-10
    assert store.attributes["method"] == "graph"


@pytest.mark.slow
def test_gpt2_embedding_as_embedding_as_head_and_across(tmp_path: Path) -> None:
    model = build(gpt2)
    problem = disthess.Problem(model, loss=next_token, batches=[(SENTENCES, LABELS)])
    sections = disthess.attention_sections(model)
    assert sections["transformer.h.0.attn.k.weight"] == "transformer.h.0.attn.c_attn.weight[:, 4:8]"
    store = disthess.compute(
        problem, tmp_path / "run.zarr", shared="uses", sections=sections, activations="*.attn", progress=False
    )
    name = "transformer.wte.weight"
    embedding, head = next(parameter for parameter in store.parameters if parameter.name == name).uses
    wanted = disthess.reference_hessian(untied(model), parameters=["transformer.wte.weight", "lm_head.weight"])
    size = 44
    for (a, rows), (b, columns) in (
        ((embedding, slice(0, size)), (embedding, slice(0, size))),
        ((embedding, slice(0, size)), (head, slice(size, None))),
        ((head, slice(size, None)), (head, slice(size, None))),
    ):
        np.testing.assert_allclose(store.use_block(a, b), wanted[rows, columns], atol=1e-12)
    whole = sum(store.use_block(a, b) for a in (embedding, head) for b in (embedding, head))
    np.testing.assert_allclose(store.block(name, name), whole, atol=1e-14)
    table = store.pairs(of="sections")
    assert {"transformer.h.0.attn.q.weight", "transformer.h.0.attn.v.bias"} <= set(table.names)
    key_bias = next(row for row in table.rows if row.a == row.b == "transformer.h.0.attn.k.bias")
    # A softmax does not see what is added to all its keys alike.
    assert key_bias.norm < 1e-15
    assert "transformer.h.0.attn" in store.activations[0].modules


def untied(model: nn.Module) -> disthess.Problem:
    import copy

    apart = copy.deepcopy(model)
    apart.lm_head.weight = nn.Parameter(apart.transformer.wte.weight.detach().clone())
    return disthess.Problem(apart, loss=next_token, batches=[(SENTENCES, LABELS)])
