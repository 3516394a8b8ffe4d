"""``prompted``: a language model answers by the words it finds likeliest (arXiv:2402.11592)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from torch.nn.utils.rnn import pad_sequence

from gossamer.algorithms.problems import Problem, Score
from gossamer.algorithms.tasks.candidates import (
    CandidateEncoder,
    Candidates,
    OwnCandidates,
    Scores,
    count_any_right,
    gold_loss,
)
from gossamer.algorithms.tasks.generation import AnswerScore, Questions
from gossamer.algorithms.tasks.hub_task import HubTask
from gossamer.algorithms.tasks.objectives import ClassificationLoss, count_right
from gossamer.algorithms.tasks.schemes import Full, SchemeField
from gossamer.algorithms.tasks.templates import Cloze, Question, Template, find_template
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["Prompted"]

Count = Annotated[int, Field(ge=1, strict=True)]
Dtype = Literal["float32", "bfloat16", "float16"]
_ANSWER_TOKENS = 50
"""Of a generated answer at most, as in arXiv:2305.17333."""


def _as_text(labels: object) -> object:
    """Let labels be numbers in YAML."""
    return {str(k): v for k, v in labels.items()} if isinstance(labels, dict) else labels


class Prompted(HubTask):
    """Fine-tune a `transformers` model on prompts; needs the extra `huggingface`.

    A row becomes a text for each candidate answer, by a template. A candidate's score is the mean
    log-probability of its tokens; the one of the highest score is the prediction. The answers of
    `squad` and `drop` are generated, each token the likeliest, up to a newline: their scores are
    `f1` and `exact_match`, of words. The score at step 0 is that of the model as it came:
    zero-shot.
    """

    name: str = "prompted"
    kind: Literal["causal-lm", "masked-lm"] = "causal-lm"
    """Whether the model predicts the next token, or those hidden at the candidate's place."""
    dtype: Dtype = "float32"
    """Of the model's weights. What a scheme adds is float32; losses are, always."""
    scheme: SchemeField = Full()
    """What is trained: `full`, `lora`, `prefix`, `prompt` or `head`; or {name: lora, r: 8}."""
    template: str
    """`sst2`, `rte`, `cb`, `boolq`, `wsc`, `wic`, `multirc`, `copa`, `record`, `winogrande`,
    `squad` or `drop`; or your own: a text with columns in braces and the candidate's place, as
    '{sentence} It was {label}'."""
    version: Literal[0, 1] = 0
    """Of the template; 1: without the words that ask for an answer (`sst2` and `rte`)."""
    labels: Annotated[dict[str, str] | None, BeforeValidator(_as_text)] = None
    """Value of the label -> the word for it: {0: terrible, 1: great}; None: the template's."""
    label: str | None = None
    """Column of the label; None: the template's, `label` (`answer` for `winogrande`). For `record`,
    `squad` and `drop` of all right answers; for the latter two maybe a path: `answers.text`."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of the template -> the dataset's column, where names differ: {sentence: text}."""
    as_classification: bool | None = None
    """Minimise the cross-entropy of the candidates' scores; false: the right candidate's mean
    negative log-likelihood. None: false for `copa`, `winogrande`, and where rows have their own
    candidates (`record`) or answers (the first one is trained on); true for the others."""
    context: Count = 256
    """Longest sequence, in tokens, an answer's included; longer texts lose their beginning."""
    max_new_tokens: Count | None = None
    """Longest answer, in tokens, of `squad` and `drop`, whose texts leave room for it; None: 50."""
    train_examples: Count | None = 1000
    """So many examples to train on, chosen by the seed; None: all that are not held out."""
    dev_examples: int = Field(500, ge=0, strict=True)
    """So many examples of the training split held out to choose settings by."""
    test_examples: Count | None = 1000
    """At most so many examples of `test_split`, or held out of the training split; None: all of
    `test_split`."""
    evaluate: Literal["test", "dev", "both"] = "test"
    """Which held-out examples the figures are of; ``both``: those of dev are called dev_accuracy
    and dev_loss, for ``keep_best`` say."""

    @field_validator("test_examples")
    @classmethod
    def _all_of_what(cls, count: int | None, info: ValidationInfo) -> int | None:
        if count is None and info.data.get("test_split") is None:
            raise ValueError("needs a number where there is no test_split")
        return count

    @field_validator("evaluate")
    @classmethod
    def _there_are_examples(cls, chosen: str, info: ValidationInfo) -> str:
        if chosen != "test" and info.data.get("dev_examples") == 0:
            raise ValueError("there are no examples with dev_examples: 0; use more, or test")
        return chosen

    def build(self, n: int, seed: int) -> Problem:
        """Load, render, tokenize, split over n ranks, and load the model.

        Raises:
            ConfigError: a package, model, dataset, split, column or label is missing, they do not
                fit together, or there are fewer examples than asked for.
        """
        template = find_template(
            self.template,
            version=self.version,
            labels=self.labels,
            label=self.label,
            columns=self.columns,
        )
        self._check(template)
        tokenizer = self.load_tokenizer()
        encoder = self._encoder(template, tokenizer)
        splits = self.load_splits()
        rows = self._rows(splits, self.train_split, "task.train_split", template)
        chosen = self._divide(len(rows), seed)
        held_out = rows.select(chosen["test"])
        if self.evaluate != "dev" and self.test_split is not None:
            rest = self._rows(splits, self.test_split, "task.test_split", template)
            order = _shuffled(len(rest), "task/test", seed)[: self.test_examples]
            held_out = rest.select(np.sort(order))
        as_classification = self.as_classification
        if as_classification is None:
            as_classification = template.as_classification
        score = self._score(template, tokenizer)
        encode = partial(self._encode, encoder, template, score)
        dev = None if self.evaluate == "test" else encode(rows.select(chosen["dev"]))
        test = dev if self.evaluate == "dev" else encode(held_out)
        train = encode(rows.select(chosen["train"]))
        module = self._module(tokenizer, seed)
        return Problem(
            module=module,
            train=train,
            shards=self.split(train.labels.numpy(), n, seed),
            test=test,
            dev=dev if self.evaluate == "both" else None,
            loss=ClassificationLoss() if as_classification else gold_loss,
            score=score,
            **self.scheme.problem_parts(module, seed),
        )

    def _check(self, template: Template) -> None:
        """Refuse fields that do not go with the template."""
        if self.as_classification and not template.options:
            raise ConfigError(
                f"task.as_classification: template '{self.template}' has no candidates that all "
                "rows share; leave it out"
            )
        if not isinstance(template, Question):
            if self.max_new_tokens is not None:
                raise ConfigError(
                    f"task.max_new_tokens: has no effect with template '{self.template}', whose "
                    "answer is one of its candidates; leave it out"
                )
            return
        if self.kind == "masked-lm":
            raise ConfigError(
                f"task.kind: template '{self.template}' is answered by going on with a text, which "
                "a masked language model does not do; use causal-lm, and such a model"
            )
        if self.heterogeneity == "sorted":
            raise ConfigError(
                f"task.heterogeneity: sorted goes by labels, and the answers of template "
                f"'{self.template}' are words; use iid or contiguous"
            )

    def _score(self, template: Template, tokenizer: Any) -> Score:
        if isinstance(template, Question):
            return AnswerScore(tokenizer, self.max_new_tokens or _ANSWER_TOKENS)
        return count_any_right if isinstance(template, Cloze) else count_right

    # --- rows -------------------------------------------------------------------------------

    def _rows(self, splits: Mapping[str, Any], split: str, field: str, template: Template) -> Any:
        columns: dict[str, Iterable[str]] = {
            "task.template": sorted(template.fields() - set(template.columns)),
            "task.columns": template.columns.values(),
            "task.label": [template.label_column],
        }
        return self.choose_rows(splits, split, field, columns)

    def _divide(self, count: int, seed: int) -> dict[str, np.ndarray]:
        """Return which rows of the training split are for what, each in the order of the file."""
        held_out = self.dev_examples
        if self.test_split is None:
            assert self.test_examples is not None, "checked above"
            held_out += self.test_examples
        wanted = held_out + (self.train_examples or 1)
        if wanted > count:
            raise ConfigError(
                f"task.train_examples: {wanted} rows are needed to train on and to hold out, "
                f"'{self.train_split}' has {count}; lower train_examples, dev_examples or "
                "test_examples, or name a test_split"
            )
        order = _shuffled(count, "task/held-out", seed)
        dev, test, train = np.split(order, [self.dev_examples, held_out])
        parts = {"dev": dev, "test": test, "train": train[: self.train_examples]}
        return {name: np.sort(part) for name, part in parts.items()}

    def _encode(
        self, encoder: CandidateEncoder, template: Template, score: Score, rows: Any
    ) -> Candidates | OwnCandidates | Questions:
        examples, labels = [], []
        for row in rows:
            examples.append(template.render(row))
            try:
                labels.append(template.gold(row))
            except KeyError as error:
                raise ConfigError(
                    f"task.labels: column '{template.label}' holds {row[template.label]!r}, and "
                    f"the labels are {', '.join(template.options)}; add it, or name another split"
                ) from error
        try:
            if isinstance(template, Question) and isinstance(score, AnswerScore):
                starts = encoder.encode_starts([prompt.before for (prompt,) in examples])
                numbers = score.take([template.answers(row) for row in rows])
                return Questions(encoder.encode(examples, labels), *starts, numbers)
            found = encoder.encode(examples, labels)
        except ValueError as error:
            raise ConfigError(
                f"task.template: {error}; use another text, or a longer context than {self.context}"
            ) from error
        if isinstance(template, Cloze):
            right = [torch.tensor(template.right(row)) for row in rows]
            return OwnCandidates(found, pad_sequence(right, batch_first=True))
        return found

    # --- the model --------------------------------------------------------------------------

    def _encoder(self, template: Template, tokenizer: Any) -> CandidateEncoder:
        masked = self.kind == "masked-lm"
        if masked and tokenizer.mask_token_id is None:
            raise ConfigError(
                f"task.kind: the tokenizer of '{self.tokenizer or self.model}' has no mask token; "
                "use a masked language model's, or kind: causal-lm"
            )
        if not masked and not template.text.endswith("{label}"):
            raise ConfigError(
                "task.template: a causal model does not see what stands behind {label}; end there"
            )
        room = 0
        if isinstance(template, Question):
            room = self.max_new_tokens or _ANSWER_TOKENS
            last = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
            if "\n" not in tokenizer.decode([last]):
                raise ConfigError(
                    f"task.tokenizer: '{self.tokenizer or self.model}' has no token for a newline, "
                    f"with which answers end in template '{self.template}'; use another model"
                )
        return CandidateEncoder(tokenizer, self.context, masked, room)

    def _module(self, tokenizer: Any, seed: int) -> Scores:
        auto = {"causal-lm": "AutoModelForCausalLM", "masked-lm": "AutoModelForMaskedLM"}
        tokens = self.context + self.scheme.extra_tokens
        dtype = getattr(torch, self.dtype)
        model = self.load_model(auto[self.kind], tokenizer, seed, tokens, dtype)
        config: Any = model.config
        config.use_cache = False  # a forward pass takes whole sequences, for answers too
        return Scores(self.scheme.apply(model, seed))


def _shuffled(count: int, name: str, seed: int) -> np.ndarray:
    return Random(seed).stream(name).permutation(count)[0].numpy()
