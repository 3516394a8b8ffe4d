"""Compressors: what they keep, what they promise, what they cost in bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gossamer.algorithms.decentralized.compressors import (
    QSGD,
    AnyCompressor,
    Identity,
    RandomK,
    Sign,
    TopK,
    average_compressed,
)
from gossamer.algorithms.decentralized.packing import from_bytes, pack_bits, to_bytes, unpack_bits
from gossamer.runtime import Communicator, RowLayout, StackedTransport
from gossamer.topologies import build

COMPRESSORS = [
    Identity(),
    TopK(ratio=0.9),
    TopK(k=3),
    RandomK(ratio=0.75),
    RandomK(k=3, unbiased=True),
    Sign(),
    QSGD(bits=4),
    QSGD(bits=1),
    QSGD(bits=8, unbiased=True),
]
CONTRACTIONS = [c for c in COMPRESSORS if not getattr(c, "unbiased", False)]
by_repr = {"ids": lambda value: repr(value)}


def layout_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> RowLayout:
    module = nn.Module()
    for k, shape in enumerate(shapes):
        module.register_parameter(f"p{k}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return RowLayout(module)


def rows_of(layout: RowLayout, n: int = 8, seed: int = 0) -> torch.Tensor:
    rows = torch.zeros(n, layout.d, dtype=layout.dtype)
    random = np.random.default_rng(seed)
    for s in layout.slices:
        rows[:, s.begin : s.end] = torch.from_numpy(random.normal(size=(n, s.shape.numel())))
    return rows


def ring(n: int = 8) -> Communicator:
    return Communicator(build("ring", n), StackedTransport())


def compress(compressor, comm, layout, v):
    return compressor.unpack(comm, layout, compressor.pack(comm, layout, v), comm.ranks)


def squares(v: torch.Tensor) -> np.ndarray:
    return (v.double() ** 2).sum(dim=1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_keeps_the_k_largest_of_each_tensor_and_nothing_else(dtype):
    layout = layout_of((40,), (3, 7), dtype=dtype)
    v = rows_of(layout)
    q = compress(TopK(k=4), ring(), layout, v)
    for s in layout.slices:
        part, found = v[:, s.begin : s.end], q[:, s.begin : s.end]
        least = part.abs().sort(dim=1, descending=True).values[:, 3:4]
        assert torch.equal(found, torch.where(part.abs() >= least, part, 0.0))


def test_ratio_is_the_share_dropped_and_may_lose_one_to_rounding():
    assert TopK(ratio=0.9).kept(100) == 9  # int(100 * (1 - .9)) as in the official code
    assert TopK(ratio=0.9).kept(3) == 1
    assert TopK(k=10).kept(100) == 10
    assert TopK(k=10).kept(4) == 4


def test_random_k_draws_other_places_for_each_rank_step_and_tensor():
    layout, comm = layout_of((64,), (64,)), ring()
    drawn = []
    for step in range(2):
        comm.step = step
        q = compress(RandomK(k=8), comm, layout, torch.ones(8, layout.d))
        assert (q.sum(dim=1) == 16).all()
        drawn += list(q.reshape(16, 64))
    assert len({tuple(row.tolist()) for row in drawn}) == 32


def mean_of_draws(compressor, layout, v, draws: int = 2000) -> torch.Tensor:
    comm, total = ring(), torch.zeros_like(v)
    for step in range(draws):
        comm.step = step
        total += compress(compressor, comm, layout, v)
    return total / draws


@pytest.mark.parametrize(
    "compressor", [RandomK(k=4, unbiased=True), QSGD(bits=2, unbiased=True)], **by_repr
)
def test_the_unbiased_forms_have_the_mean_v(compressor):
    layout = layout_of((8,), dtype=torch.float64)
    v = rows_of(layout)
    error = mean_of_draws(compressor, layout, v) - v
    # Over all 8 rows: the error's expected size is 2 % of ||v|| or less.
    assert squares(error).sum() <= 0.05**2 * squares(v).sum()


@pytest.mark.parametrize("compressor", CONTRACTIONS, **by_repr)
def test_the_biased_forms_contract(compressor):
    layout = layout_of((30,), dtype=torch.float64)
    v, d, comm = rows_of(layout, n=8), 30, ring()
    draws, ratio = 200, np.zeros(8)
    for step in range(draws):
        comm.step = step
        ratio += squares(compress(compressor, comm, layout, v) - v) / squares(v) / draws
    if isinstance(compressor, Identity):
        delta = np.ones(8)
    elif isinstance(compressor, Sign):
        delta = (v.abs().sum(dim=1).numpy() ** 2) / (d * squares(v))
    elif isinstance(compressor, QSGD):
        s = 2**compressor.bits - 1
        delta = np.full(8, 1 / (1 + min(d / s**2, np.sqrt(d) / s)))
    else:
        delta = np.full(8, compressor.kept(d) / d)
    # The mean of 200 draws of random-k is within 3 standard deviations, .04, of its expectation.
    slack = 0.04 if isinstance(compressor, RandomK) else 1e-12
    assert (ratio <= 1 - delta + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compressor", COMPRESSORS, **by_repr)
def test_zero_comes_back_as_zero_and_padding_stays_zero(compressor, dtype):
    layout, comm = layout_of((5,), (2, 3), (), dtype=dtype), ring()
    assert (compress(compressor, comm, layout, torch.zeros(8, layout.d, dtype=dtype)) == 0).all()
    q = compress(compressor, comm, layout, rows_of(layout))
    assert torch.isfinite(q).all()
    used = {i for s in layout.slices for i in range(s.begin, s.end)}
    assert (q[:, [i for i in range(layout.d) if i not in used]] == 0).all()


@pytest.mark.parametrize("compressor", COMPRESSORS, **by_repr)
def test_one_large_and_many_tiny_elements_give_numbers(compressor):
    layout = layout_of((50,))
    v = torch.full((8, layout.d), 1e-38)
    v[:, 50:] = 0
    v[:, 7] = -1e18
    assert torch.isfinite(compress(compressor, ring(), layout, v)).all()


@pytest.mark.parametrize("compressor", COMPRESSORS, **by_repr)
def test_a_row_is_compressed_alike_alone_and_among_others(compressor):
    layout, comm = layout_of((33,), (4, 5)), ring()
    v = rows_of(layout)
    together = compressor.pack(comm, layout, v)
    for rank in range(8):
        comm.ranks, comm.local = range(rank, rank + 1), 1
        assert torch.equal(compressor.pack(comm, layout, v[rank : rank + 1])[0], together[rank])


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        (Identity(), 2 * 4 * (64 + 80)),
        (TopK(ratio=0.75), 2 * (16 + 20) * (4 + 4)),
        (RandomK(ratio=0.75), 2 * (16 + 20) * 4),  # the places are drawn, not sent
        (Sign(), 2 * (64 / 8 + 4 + 80 / 8 + 4)),
        (QSGD(bits=4), 2 * (64 * 5 / 8 + 4 + 80 * 5 / 8 + 4)),
    ],
    **by_repr,
)
def test_bytes_sent_are_those_of_the_table(compressor, expected):
    """deg * (per tensor: top k (b + 4), sign d / 8 + 4, qsgd d (bits + 1) / 8 + 4)."""
    layout, comm = layout_of((64,), (8, 10)), ring()
    average_compressed(compressor, comm, layout, rows_of(layout))
    assert comm.traffic.bytes_sent.tolist() == [expected] * 8
    assert comm.traffic.messages_sent.tolist() == [2] * 8


@pytest.mark.parametrize("compressor", COMPRESSORS, **by_repr)
def test_neighbours_decode_what_the_sender_decodes(compressor):
    layout, comm = layout_of((33,), (4, 5), dtype=torch.float64), ring()
    q, heard = average_compressed(compressor, comm, layout, rows_of(layout))
    W = build("ring", 8).round(0).matrix()
    np.testing.assert_allclose(
        heard.numpy(), (W - np.diag(np.diag(W))) @ q.numpy(), rtol=0, atol=1e-15
    )


@pytest.mark.parametrize("width", [1, 2, 5, 9])
@pytest.mark.parametrize("m", [0, 1, 7, 8, 33])
def test_bits_survive_packing(width, m):
    codes = torch.from_numpy(np.random.default_rng(m).integers(0, 2**width, (3, m))).int()
    message = pack_bits(codes, width)
    assert message.shape == (3, -(-m * width // 8))
    assert torch.equal(unpack_bits(message, m, width), codes)


def test_bytes_may_start_anywhere_in_a_message():
    values = torch.tensor([[1.5, -2.0]], dtype=torch.float64)
    message = torch.cat([torch.zeros(1, 3, dtype=torch.uint8), to_bytes(values)], dim=1)
    assert torch.equal(from_bytes(message[:, 3:], torch.float64), values)


def test_a_compressor_is_named_by_word_or_by_record():
    read = TypeAdapter(AnyCompressor).validate_python
    assert read("sign") == Sign()
    assert read({"name": "top_k", "k": 5}) == TopK(k=5)
    with pytest.raises(ValidationError, match="no effect beside k"):
        read({"name": "top-k", "k": 5, "ratio": 0.5})
    with pytest.raises(ValidationError, match="'top-k'"):
        read("topk")
