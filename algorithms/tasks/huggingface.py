"""Any Hugging Face model on any Hugging Face dataset, by name or from local files."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from gossamer.algorithms.problems import Dataset, Problem
from gossamer.algorithms.tasks.arrays import TensorDataset, hold_out
from gossamer.algorithms.tasks.hub import Logits
from gossamer.algorithms.tasks.hub_task import HubTask
from gossamer.algorithms.tasks.language import (
    Windows,
    count_masked_tokens,
    count_next_tokens,
    mask_tokens,
    masked_token_loss,
    next_token_loss,
)
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.runtime.errors import ConfigError

__all__ = ["HuggingFace"]

Count = Annotated[int, Field(ge=1, strict=True)]

_TEXTS_AT_ONCE = 1000


class _Kind(NamedTuple):
    """What distinguishes the kinds of model: the head, and what is computed from its logits."""

    auto: str
    objective: dict[str, Any]


_KINDS = {
    "causal-lm": _Kind(
        "AutoModelForCausalLM",
        {"loss": next_token_loss, "weigh": count_next_tokens, "objective": "examples"},
    ),
    "masked-lm": _Kind(
        "AutoModelForMaskedLM",
        {"loss": masked_token_loss, "weigh": count_masked_tokens, "objective": "examples"},
    ),
    "sequence-classification": _Kind(
        "AutoModelForSequenceClassification", {"loss": ClassificationLoss(), "score": count_right}
    ),
}


class HuggingFace(HubTask):
    """Train a `transformers` model on a `datasets` dataset; needs the extra `huggingface`.

    Language models see the texts one after another, cut into blocks of `context` tokens;
    classifiers see one text (or pair) per example. Dropout is as the model's configuration says.
    """

    name: str = "huggingface"
    kind: Literal["causal-lm", "masked-lm", "sequence-classification"] = "causal-lm"
    """What the model predicts: the next token, hidden tokens, or the class of a text."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training examples held out, chosen by the seed, where no `test_split` is
    named."""
    text: str | tuple[str, str] = "text"
    """Column of the text, or the two columns of a pair."""
    label: str = "label"
    """Column of the class (sequence-classification): integers or words."""
    context: Count = 128
    """Tokens per example; longer texts are cut."""
    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Share of a block's tokens that are predicted (masked-lm)."""

    @field_validator("text", "label", "mask_rate", "test_fraction")
    @classmethod
    def _settings_have_an_effect(cls, value: object, info: ValidationInfo) -> object:
        kind, field = info.data.get("kind"), str(info.field_name)
        unused = {
            "text": isinstance(value, tuple) and kind != "sequence-classification",
            "label": kind != "sequence-classification",
            "mask_rate": kind != "masked-lm",
            "test_fraction": info.data.get("test_split") is not None,
        }
        if kind is not None and unused[field] and value != cls.model_fields[field].default:
            beside = "test_split" if field == "test_fraction" else f"kind: {kind}"
            raise ValueError(f"has no effect with {beside}; leave it out")
        return value

    def build(self, n: int, seed: int) -> Problem:
        """Load, tokenize, split over n ranks, and load the model.

        Raises:
            ConfigError: a package, model, dataset, split or column is missing, they do not fit
                together, or there are fewer examples than ranks.
        """
        tokenizer = self.load_tokenizer()
        splits = self.load_splits()
        rows = self._rows(splits, self.train_split, "task.train_split")
        names = self._class_names(rows)
        dataset, classes = self._examples(rows, names, tokenizer, seed)
        fraction = self.test_fraction if self.test_split is None else 0.0
        train, held_out = hold_out(dataset, fraction, seed)
        test: Dataset | None = held_out
        if self.test_split is not None:
            rows = self._rows(splits, self.test_split, "task.test_split")
            test, _ = self._examples(rows, names, tokenizer, seed)
        return Problem(
            module=self._module(tokenizer, names, seed),
            train=train,
            shards=self.split(classes[train.places.numpy()], n, seed),
            test=test,
            **_KINDS[self.kind].objective,
        )

    # --- rows -------------------------------------------------------------------------------

    def _rows(self, splits: dict[str, Any], split: str, field: str) -> Any:
        columns = {"task.text": self._text_columns()}
        if self.kind == "sequence-classification":
            columns["task.label"] = [self.label]
        return self.choose_rows(splits, split, field, columns)

    def _text_columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)

    def _class_names(self, rows: Any) -> list[Any]:
        """Return the classes of a classifier in the order of their numbers; [] for the others."""
        if self.kind != "sequence-classification":
            return []
        names = sorted(set(rows[self.label]))
        if len(names) < 2:
            raise ConfigError(
                f"task.label: column '{self.label}' of '{self.dataset}' holds {len(names)} class; "
                "a classifier needs two"
            )
        return names

    # --- examples ---------------------------------------------------------------------------

    def _examples(
        self, rows: Any, names: list[Any], tokenizer: Any, seed: int
    ) -> tuple[Dataset, np.ndarray]:
        """Return the examples and, to split them by, their classes."""
        if names:
            return self._classified(rows, names, tokenizer)
        tokens = self._tokens(rows, tokenizer)
        if self.kind == "causal-lm":
            windows = Windows(tokens, self.context)
            return windows, np.zeros(len(windows), np.int64)
        blocks = tokens[: len(tokens) // self.context * self.context].view(-1, self.context)
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                f"task.kind: the tokenizer of '{self.tokenizer or self.model}' has no mask token; "
                "use a masked language model's, or kind: causal-lm"
            )
        hidden, targets = mask_tokens(
            blocks.long(), self.mask_rate, tokenizer.mask_token_id, len(tokenizer), seed
        )
        return TensorDataset((hidden, targets)), np.zeros(len(blocks), np.int64)

    def _classified(
        self, rows: Any, names: list[Any], tokenizer: Any
    ) -> tuple[Dataset, np.ndarray]:
        number = {name: k for k, name in enumerate(names)}
        unknown = sorted(set(rows[self.label]) - set(names))
        if unknown:
            raise ConfigError(
                f"task.test_split: class {unknown[0]!r} of column '{self.label}' does not occur in "
                "the training split; use another split"
            )
        classes = np.array([number[name] for name in rows[self.label]], dtype=np.int64)
        if tokenizer.pad_token is None:
            raise ConfigError(
                f"task.tokenizer: '{self.tokenizer or self.model}' has no padding token; use "
                "another tokenizer"
            )
        texts = [list(rows[column]) for column in self._text_columns()]
        encoded = tokenizer(
            *texts,
            truncation=True,
            max_length=self.context,
            padding="max_length",
            return_tensors="pt",
        )
        columns = [encoded[name] for name in _inputs(tokenizer)]
        return TensorDataset((*columns, torch.from_numpy(classes))), classes

    def _tokens(self, rows: Any, tokenizer: Any) -> Tensor:
        """Return the tokens of all texts, one after another, int32."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        texts = rows[self._text_columns()[0]]
        parts = [np.empty(0, dtype=np.int32)]
        for begin in range(0, len(rows), _TEXTS_AT_ONCE):
            batch = list(texts[begin : begin + _TEXTS_AT_ONCE])
            encoded = tokenizer(batch, add_special_tokens=False)["input_ids"]
            parts += [np.array([*ids, *end], dtype=np.int32) for ids in encoded]
        return torch.from_numpy(np.concatenate(parts))

    # --- the model --------------------------------------------------------------------------

    def _module(self, tokenizer: Any, names: list[Any], seed: int) -> nn.Module:
        classes: dict[str, Any] = {"num_labels": len(names)} if names else {}
        model = self.load_model(_KINDS[self.kind].auto, tokenizer, seed, self.context, **classes)
        return Logits(model, _inputs(tokenizer) if names else ("input_ids",))


def _inputs(tokenizer: Any) -> tuple[str, ...]:
    """Return what a classifier takes: ids, mask, and the halves of a pair where BERT tells them."""
    known = ("input_ids", "attention_mask", "token_type_ids")
    return tuple(name for name in known if name in tokenizer.model_input_names)
