"""``pretraining``: a causal language model from fresh weights, on any text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import nn

from gossamer.algorithms.problems import Dataset, Problem, Stream
from gossamer.algorithms.tasks.corpus import (
    Corpus,
    CorpusBuilder,
    divide,
    read_documents,
    read_rows,
    tail,
)
from gossamer.algorithms.tasks.document_stream import DocumentStream
from gossamer.algorithms.tasks.files import expand, standard_library
from gossamer.algorithms.tasks.hub import (
    Logits,
    load_model,
    load_splits,
    require_length,
)
from gossamer.algorithms.tasks.language import (
    PaddedDocuments,
    Windows,
    count_next_tokens,
    count_padded_tokens,
    next_token_loss,
    padded_token_loss,
)
from gossamer.algorithms.tasks.llama import LLAMA, LlamaShape, build_llama
from gossamer.algorithms.tasks.partition import ShardedTask
from gossamer.algorithms.tasks.schemes import Full, SchemeField
from gossamer.algorithms.tasks.tokenizers import Tokenizer, open_tokenizer
from gossamer.runtime.component import validate
from gossamer.runtime.errors import ConfigError, nearest
from gossamer.runtime.random import Random

__all__ = ["Pretraining"]

Count = Annotated[int, Field(ge=1, strict=True)]

_STREAM_VALIDATES = 1000
"""Texts that a stream's run validates on, unless told otherwise."""
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "packed": {"loss": next_token_loss, "weigh": count_next_tokens},
    "single": {"loss": padded_token_loss, "weigh": count_padded_tokens, "uneven": True},
}


def _shaped(given: object) -> object:
    """Return the shape of a section, or a name."""
    return validate(LlamaShape, given, "task.model") if isinstance(given, dict) else given


class _Data(NamedTuple):
    train: Dataset | Stream
    shards: tuple[np.ndarray, ...]
    test: Dataset | None


class Pretraining(ShardedTask):
    """Train a causal language model from fresh weights; needs the extra `huggingface`.

    The text is that of local files (`data`), or of a dataset (`dataset`), which may be streamed.
    Nothing named: the Python standard library's own source. Figures are per token; an evaluation
    takes 128 examples unless the run's `evaluate_examples` says otherwise.
    """

    name: str = "pretraining"
    model: Annotated[LlamaShape | str, BeforeValidator(_shaped)]
    """`llama-60m`, `-130m`, `-350m`, `-1b` or `-7b` (arXiv:2406.02214); a LLaMA of your own shape,
    {hidden: 128, layers: 2, heads: 4, ffn: 336}; or any causal model of `transformers`, by its name
    on the hub or a folder with its config.json."""
    scheme: SchemeField = Full()
    """What is trained, and how it is parameterised: a scheme's name, or {name: lora, r: 8}."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the model's weights. Losses are float32 at least; a LLaMA's norms and angles always, as
    `transformers` has them."""
    tokenizer: str = "bytes"
    """`bytes`, 256 of them, or a tokenizer of `transformers`, by name or folder."""
    vocabulary: Count | None = None
    """Tokens that the model knows; None: as many as the tokenizer has. T5's has 32,100, of which
    text uses the 32,000 of the papers' models."""
    context: int = Field(256, ge=2, strict=True)
    """Tokens per sequence, the most that a prediction can see."""
    documents: Literal["packed", "single"] = "packed"
    """`packed`: all texts one after another, each with an end-of-text token where the tokenizer has
    one, cut into sequences. `single`: a text per sequence, cut or padded on the right (GaLore,
    SLTrain); padding is neither predicted nor seen."""
    data: str | tuple[str, ...] = ()
    """Local files, folders (all files below) or patterns such as `docs/**/*.md`; relative ones are
    looked for here and in GOSSAMER_DATA. JSON lines (.jsonl or .json) have a text in each line, any
    other file is one text, tables (.csv, .tsv, .parquet) aside; both may end in .gz."""
    dataset: str | None = None
    """Instead of `data`: a dataset's name on the hub, such as `allenai/c4`, a folder, or a file:
    .json, .jsonl, .csv, .tsv, .txt (a text per line) or .parquet."""
    subset: str | None = None
    """Which configuration of the dataset, such as `en`."""
    train_split: str = "train"
    """Which split of the dataset to train on; a single file is `train`."""
    validation_split: str | None = None
    """Which split of the dataset to validate on; None: `validation`, where there is one."""
    streaming: bool = False
    """Read the dataset while the run goes on, not before. Rank i of n learns from texts i, i + n,
    ... of the shuffled stream, read once by each rank of a process."""
    shuffle_buffer: Count = 1000
    """Texts of the stream that the next one is drawn from."""
    shuffle_seed: int | None = Field(None, ge=0, strict=True)
    """Of the stream's order; None: the run's. The papers' is 42."""
    column: str = "text"
    """Of JSON lines and datasets: the one with the text."""
    validation: int = Field(10, ge=0, strict=True)
    """Without a split to validate on: every so manieth file validates. With fewer files, or a
    dataset, one in so many texts, at the end of each; of a file that is one text, its end; of a
    stream, the first `validation_documents`. 0: nothing does."""
    validation_documents: Count | None = None
    """Texts that are read and kept to validate on, at most; None: all, or 1,000 of a stream. How
    many sequences of them an evaluation takes is the run's `evaluate_examples`. The papers' 10
    million tokens are 39,063 sequences of 256."""

    @field_validator("data")
    @classmethod
    def _one_path_is_a_list_of_one(cls, data: str | tuple[str, ...]) -> tuple[str, ...]:
        return (data,) if isinstance(data, str) else data

    @field_validator("validation")
    @classmethod
    def _something_is_trained_on(cls, validation: int) -> int:
        if validation == 1:
            raise ValueError("would leave nothing to train on; use 2 or more, or 0 for none")
        return validation

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> Self:
        if self.data and self.dataset is not None:
            raise ConfigError("task.dataset: there is task.data already; leave one of them out")
        if self.streaming and self.dataset is None:
            raise ConfigError("task.streaming: streams a dataset; name it in task.dataset")
        needs: dict[str, tuple[str, bool]] = {
            "dataset": ("subset train_split validation_split", self.dataset is not None),
            "streaming: true": ("shuffle_buffer shuffle_seed", self.streaming),
            "streaming: false": ("heterogeneity alpha drop_remainder", not self.streaming),
            "data or dataset": ("column", bool(self.data or self.dataset)),
        }
        for needed, (names, met) in needs.items():
            for name in names.split():
                if not met and getattr(self, name) != type(self).model_fields[name].default:
                    raise ConfigError(f"task.{name}: has no effect without {needed}; leave it out")
        if self.validation_split == self.train_split:
            raise ConfigError(
                f"task.validation_split: '{self.train_split}' is trained on; use another"
            )
        usual = type(self).model_fields["validation"].default
        if self.validation_split is not None and self.validation != usual:
            raise ConfigError("task.validation: has no effect with validation_split; leave it out")
        if self.streaming and self.validation not in (0, usual):
            raise ConfigError(
                f"task.validation: a stream has no end to take 1 / {self.validation} of; set "
                "validation_documents, or validation: 0 for none"
            )
        if self.validation == 0 and self.validation_documents:
            raise ConfigError("task.validation_documents: has no effect with validation: 0")
        if self.scheme.extra_tokens:
            raise ConfigError(
                f"task.scheme: {self.scheme.name} trains tokens for a model that was trained "
                "before; use another scheme, or task: prompted"
            )
        return self

    def build(self, n: int, seed: int) -> Problem:
        """Read and tokenize the text, or open the stream, and make the model.

        Raises:
            ConfigError: a package, file, dataset, split, column, tokenizer or model is missing or
                broken, they do not fit together, or there is too little text.
        """
        tokenizer = open_tokenizer(self.tokenizer, self.vocabulary)
        if self.dataset is None:
            data = self._from_files(tokenizer, n, seed)
        else:
            splits = load_splits(self.dataset, self.subset, streaming=self.streaming)
            make = self._from_stream if self.streaming else self._from_rows
            data = make(splits, tokenizer, n, seed)
        if data.test is not None and len(data.test) == 0:
            raise ConfigError(
                f"task.validation: leaves no sequence of {self.context} tokens to validate on; use "
                "more text, a smaller context, or validation: 0"
            )
        model = self._model(self.vocabulary or tokenizer.vocabulary, seed)
        module = Logits(self.scheme.apply(model, seed))
        return Problem(
            module=module,
            train=data.train,
            shards=data.shards,
            test=data.test,
            objective="examples",
            **_OBJECTIVES[self.documents],
            **self.scheme.problem_parts(module, seed),
        )

    # --- the model --------------------------------------------------------------------------

    def _model(self, vocabulary: int, seed: int) -> nn.Module:
        dtype = getattr(torch, self.dtype)
        shape = LLAMA.get(self.model) if isinstance(self.model, str) else self.model
        if shape is not None:
            return build_llama(
                shape, vocabulary=vocabulary, context=self.context, dtype=dtype, seed=seed
            )
        assert isinstance(self.model, str)
        try:
            model = load_model(
                "AutoModelForCausalLM",
                self.model,
                pretrained=False,
                seed=seed,
                dtype=dtype,
                vocab_size=vocabulary,
                # A token that is no text must not lose its embedding to padding.
                pad_token_id=None,
            )
        except ConfigError as error:
            raise ConfigError(f"{error}{nearest(self.model, LLAMA)}") from error
        config: Any = model.config
        config.use_cache = False  # of keys and values, for generation alone
        require_length(config, self.model, self.context)
        return model

    # --- finite data ------------------------------------------------------------------------

    def _from_files(self, tokenizer: Tokenizer, n: int, seed: int) -> _Data:
        files = standard_library()
        if self.data:
            found = [file for path in self.data for file in expand(path, "task.data")]
            # Once each: a file that two patterns name would be trained and validated on.
            files = list({file.resolve(): file for file in found}.values())
        parts = self._parts(tokenizer)
        for number, file in enumerate(files):
            documents = read_documents(file, self.column, "task.data")
            divided = divide(documents, number, len(files), self.validation)
            for part, some in zip(parts, divided, strict=True):
                part.add(some, number)
        return self._finite(parts, n, seed)

    def _from_rows(
        self, splits: Mapping[str, Any], tokenizer: Tokenizer, n: int, seed: int
    ) -> _Data:
        parts = self._parts(tokenizer)
        train = self._rows(splits, self.train_split, "task.train_split")
        held_out = self._held_out(splits)
        if held_out is None:
            count = len(train)
            cut = count - tail(count, self.validation)
            held_out = train.select(range(cut, count)) if cut < count else []
            train = train.select(range(cut))
        for part, rows in zip(parts, (train, held_out), strict=True):
            part.add(self._texts(rows))
        return self._finite(parts, n, seed)

    def _parts(self, tokenizer: Tokenizer) -> tuple[CorpusBuilder, CorpusBuilder]:
        """Return what the texts to train and to validate on are gathered in."""
        alone = self.context if self.documents == "single" else None
        most = self.validation_documents
        return CorpusBuilder(tokenizer, alone), CorpusBuilder(tokenizer, alone, most)

    def _finite(self, parts: tuple[CorpusBuilder, CorpusBuilder], n: int, seed: int) -> _Data:
        train, files = self._examples(parts[0].finish(), parts[0].tokenizer)
        test, _ = self._examples(parts[1].finish(), parts[1].tokenizer)
        if len(train) == 0:
            raise ConfigError(
                f"task.context: the text is too short for a sequence of {self.context} tokens; use "
                "more text, or a smaller context"
            )
        validates = self.validation > 0 or len(test) > 0
        return _Data(train, self.split(files, n, seed), test if validates else None)

    def _examples(self, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Dataset, np.ndarray]:
        """Return the examples, and the number of the file that each is from, or starts in."""
        if self.documents == "single":
            found = PaddedDocuments(corpus.tokens, corpus.offsets, self.context, tokenizer.pad)
            return found, corpus.files
        windows = Windows(corpus.tokens, self.context)
        return windows, corpus.files_at(np.arange(len(windows)) * self.context)

    # --- streams ----------------------------------------------------------------------------

    def _from_stream(
        self, splits: Mapping[str, Any], tokenizer: Tokenizer, n: int, seed: int
    ) -> _Data:
        rows = self._rows(splits, self.train_split, "task.train_split")
        held_out = self._held_out(splits)
        most = self.validation_documents or _STREAM_VALIDATES
        if held_out is None and self.validation:
            held_out, rows = rows.take(most), rows.skip(most)
            if next(self._texts(rows), None) is None:
                raise ConfigError(
                    f"task.validation_documents: the stream '{self.dataset}' has no text to train "
                    f"on after its first {most}; use fewer, a validation_split, or validation: 0"
                )
        test = None
        if held_out is not None:
            part = self._parts(tokenizer)[1]
            part.add(self._texts(held_out.take(most)))
            test, _ = self._examples(part.finish(), tokenizer)
        order = self.shuffle_seed
        if order is None:
            order = Random(seed).stream("task/stream").seed()

        def shuffled(epoch: int) -> Iterator[bytes]:
            return self._texts(rows.shuffle(order + epoch, buffer_size=self.shuffle_buffer))

        train = DocumentStream(
            documents=shuffled,
            tokenizer=tokenizer,
            context=self.context,
            packed=self.documents == "packed",
            n=n,
            seed=seed,
        )
        return _Data(train, (), test)

    # --- datasets ---------------------------------------------------------------------------

    def _held_out(self, splits: Mapping[str, Any]) -> Any:
        """Return the split to validate on; None: it is a part of the one to train on, or none."""
        split = self.validation_split
        if split is None:
            usual = "validation"
            if self.validation == 0 or usual not in splits or usual == self.train_split:
                return None
            if self.validation != type(self).model_fields["validation"].default:
                raise ConfigError(
                    f"task.validation: has no effect, as '{self.dataset}' has a split '{usual}'; "
                    "leave it out, or set 0 not to validate"
                )
            split = usual
        return self._rows(splits, split, "task.validation_split")

    def _rows(self, splits: Mapping[str, Any], split: str, where: str) -> Any:
        if split not in splits:
            raise ConfigError(
                f"{where}: '{self.dataset}' has no split '{split}'{nearest(split, splits)}"
            )
        # A stream is opened now.
        if next(self._texts(splits[split]), None) is None:
            raise ConfigError(f"{where}: '{split}' of '{self.dataset}' has no text; use another")
        return splits[split]

    def _texts(self, rows: Any) -> Iterator[bytes]:
        return read_rows(rows, self.column, str(self.dataset))
