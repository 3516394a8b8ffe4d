"""A language of 66 words, and small models that have read it: what prompts are tried with.

A sentence has a sentiment, and eight words that are for or against something, or neither. Half of
the texts that a model reads add ``it was great`` or ``it was terrible``, rightly six times in ten:
it learns to judge, and which words judge. Forward passes fine-tune what is pretrained on texts that
look like the prompts (task alignment, arXiv:2402.11592); models of the hub take too long for this.
"""

# Shapes: B sentences, T words of a text.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.algorithms.tasks.hub import load_package
from gossamer.algorithms.tasks.models import seeded
from gossamer.runtime.random import Random

__all__ = ["NEUTRAL", "write"]

_EACH = 20
_FOR, _AGAINST, NEUTRAL = (
    [f"{kind}{k}" for k in range(_EACH)] for kind in ("good", "bad", "plain")
)
_CUE, _JUDGEMENTS = ["it", "was"], ["terrible", "great"]
_SPECIAL = ["[PAD]", "[UNK]"]
_WORDS = [*_SPECIAL, *_CUE, *_JUDGEMENTS, *_AGAINST, *_FOR, *NEUTRAL]
_NUMBER = {word: k for k, word in enumerate(_WORDS)}
_LENGTH = 8
_POLAR, _AGAINST_THE_REST, _RIGHT = 0.35, 0.15, 0.6
_STEPS, _BATCH, _RATE = 500, 128, 3e-3


def write(folder: Path, seed: int, train: int = 512, test: int = 1000) -> None:
    """Write a pretrained model to ``folder/model`` and sentences with labels to ``folder/data``.

    Args:
        folder: exists.
        seed: of the model, of what it reads, and of the sentences, of which it reads none.
        train: sentences in ``train.jsonl``.
        test: sentences in ``test.jsonl``.

    Raises:
        ConfigError: ``transformers`` is not installed.
    """
    model: Any = _pretrained(seed)
    model.save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, count in (("train", train), ("test", test)):
        words, labels = _sentences(seed, f"sentences/{name}", 0, count)
        rows = [
            {"sentence": " ".join(_WORDS[k] for k in sentence), "label": label}
            for sentence, label in zip(words.tolist(), labels.tolist(), strict=True)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(lines)


def _sentences(seed: int, name: str, step: int, count: int) -> tuple[Tensor, Tensor]:
    """Return words int64 (B, 8) and sentiments int64 (B,), 1: for."""
    source = Random(seed)
    labels = source.stream(f"{name}/labels", step=step).integers(2, count)[0]
    shape = (count, _LENGTH)
    polar, other = (
        source.stream(f"{name}/{what}", step=step).uniform_(torch.empty(1, count * _LENGTH))
        for what in ("polar", "other")
    )
    which = source.stream(f"{name}/words", step=step).integers(_EACH, count * _LENGTH).view(shape)
    sides = labels[:, None] ^ (other.view(shape) < _AGAINST_THE_REST).long()
    first = torch.where(sides == 1, _NUMBER[_FOR[0]], _NUMBER[_AGAINST[0]])
    first[polar.view(shape) >= _POLAR] = _NUMBER[NEUTRAL[0]]
    return first + which, labels


def _texts(seed: int, step: int) -> Tensor:
    """Return what a model reads in a step, int64 (B, T)."""
    words, labels = _sentences(seed, "sentences/read", step, _BATCH)
    right = Random(seed).stream("sentences/read/right", step=step)
    wrong = (right.uniform_(torch.empty(1, _BATCH))[0] >= _RIGHT).long()
    judged = torch.tensor([_NUMBER[word] for word in _JUDGEMENTS])[labels ^ wrong]
    cue = torch.tensor([_NUMBER[word] for word in _CUE]).expand(_BATCH, -1)
    rest = Random(seed).stream("sentences/read/rest", step=step).integers(_EACH, _BATCH * 3)
    ends = rest.view(_BATCH, 3) + _NUMBER[NEUTRAL[0]]
    half = _BATCH // 2
    ends[:half] = torch.cat([cue, judged[:, None]], dim=1)[:half]
    return torch.cat([words, ends], dim=1)


def _pretrained(seed: int) -> torch.nn.Module:
    """Return an OPT of 29,000 parameters after 500 steps of Adam."""
    transformers = load_package("transformers")
    config = transformers.OPTConfig(
        vocab_size=len(_WORDS),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        dropout=0.0,
        activation_function="gelu",
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with seeded(seed):
        model: torch.nn.Module = transformers.OPTForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    for step in range(_STEPS):
        texts = _texts(seed, step)
        logits = model(input_ids=texts).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _tokenizer() -> Any:
    """Return a tokenizer of these words, by spaces."""
    tokenizers, models = load_package("tokenizers"), load_package("tokenizers.models")
    core = tokenizers.Tokenizer(models.WordLevel(_NUMBER, unk_token=_SPECIAL[1]))
    core.pre_tokenizer = load_package("tokenizers.pre_tokenizers").WhitespaceSplit()
    return load_package("transformers").PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_SPECIAL[0],
        unk_token=_SPECIAL[1],
        model_input_names=["input_ids", "attention_mask"],
    )
