"""Small language models and a tokenizer of words, saved to folders; nothing is fetched."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra: gossamer[huggingface]")

WORDS = [
    "the",
    "film",
    "is",
    "good",
    "bad",
    "long",
    "was",
    "It",
    "great",
    "terrible",
    "and",
    "so",
    "I",
    "saw",
    "it",
    ",",
    "Yes",
    "No",
]
SPECIAL = ["[PAD]", "[UNK]", "[MASK]", "[EOS]"]
SENTENCES = ["the film is good", "the film was long and bad", "good", "It is so bad , I saw it"]


def make_tokenizer(words=WORDS, newlines=False):
    """Words between spaces; a newline is one more word, or none."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(["\n"] if newlines else []), *words]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if newlines:
        split = pre_tokenizers.Split
        parts = [split(" ", "removed"), split("\n", "isolated")]
        core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        eos_token="[EOS]",
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(kind, vocabulary, width=16, layers=2, positions=48):
    """A model of two layers or so with random weights; biases are not zero, as a trained one's."""
    if kind == "gpt2":
        sizes = {"n_positions": positions, "n_embd": width, "n_layer": layers, "n_head": 2}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=vocabulary, bos_token_id=3, eos_token_id=3, **sizes)
        )
    else:
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "max_position_embeddings": positions,
            "pad_token_id": 0,
        }
        ends = {"bos_token_id": 3, "eos_token_id": 3}
        if kind == "opt":
            config = transformers.OPTConfig(
                ffn_dim=2 * width, word_embed_proj_dim=width, **sizes, **ends
            )
            model = transformers.OPTForCausalLM(config)
        elif kind == "llama":
            config = transformers.LlamaConfig(
                intermediate_size=2 * width, num_key_value_heads=1, **sizes, **ends
            )
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.BertConfig(intermediate_size=2 * width, **sizes)
            model = transformers.BertForMaskedLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model


def save(kind, folder: Path, tokenizer=None, **sizes):
    torch.manual_seed(0)
    tokenizer = tokenizer or make_tokenizer()
    make_model(kind, len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_rows(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence_rows(count):
    return [{"sentence": SENTENCES[k % 4], "label": (k + k // 4) % 2} for k in range(count)]
