"""Compressors: rows as short messages of bytes, tensor by tensor, and back.

A message is a row of uint8 of fixed length, what ``neighbor_gather`` sends; sender and receivers
decode it to the same bits. Lengths per parameter tensor of m elements, b bytes each:

    identity  m b       top-k  k (b + 4)       random-k  k b
    sign  ceil(m / 8) + b       qsgd  ceil(m (bits + 1) / 8) + b
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from gossamer.algorithms.decentralized.packing import (
    from_bytes,
    pack_bits,
    to_bytes,
    unpack_bits,
)
from gossamer.runtime import Communicator, RowLayout, Stream, row_dot, row_norm
from gossamer.runtime.component import Component

__all__ = [
    "QSGD",
    "AnyCompressor",
    "Compressor",
    "Contraction",
    "Identity",
    "RandomK",
    "Sign",
    "TopK",
    "average_compressed",
]

# r rows, m elements of one parameter tensor


class Compressor(Component, ABC):
    """Packs rows into bytes and unpacks them; zero comes back as zero."""

    name: str = ""

    def pack(self, comm: Communicator, layout: RowLayout, v: Tensor) -> Tensor:
        """Return the messages (local, bytes) uint8 of the hosted ranks' rows v (local, d)."""
        parts = [
            self.encode(v[:, s.begin : s.end], _coins(comm, comm.ranks, s.tensor))
            for s in layout.slices
        ]
        return torch.cat(parts, dim=1)

    def unpack(
        self,
        comm: Communicator,
        layout: RowLayout,
        message: Tensor,
        senders: Iterable[int],
        step: int | None = None,
    ) -> Tensor:
        """Return the rows (r, d) behind messages (r, bytes).

        Args:
            comm: the ranks.
            layout: of the rows.
            message: what ``pack`` gave.
            senders: the rank that packed each.
            step: when they were packed; this step by default.
        """
        senders = tuple(senders)
        out = torch.zeros(len(message), layout.d, dtype=layout.dtype, device=message.device)
        begin = 0
        for s in layout.slices:
            size = s.shape.numel()
            end = begin + self.num_bytes(size, layout.dtype)
            coins = _coins(comm, senders, s.tensor, step)
            part = self.decode(message[:, begin:end], size, layout.dtype, coins)
            out[:, s.begin : s.end] = part
            begin = end
        return out

    @abstractmethod
    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Return the length of the message of one tensor of ``size`` elements."""

    @abstractmethod
    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Return the messages (r, num_bytes) of one tensor v (r, m); coins: a stream per row."""

    @abstractmethod
    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Return what ``encode`` packed, (r, m), given the senders' streams."""


class Identity(Compressor):
    """No compression: C(v) = v."""

    name: Literal["identity"] = "identity"

    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """All elements."""
        return size * dtype.itemsize

    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Pack v as it is."""
        return to_bytes(v)

    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Return v."""
        return from_bytes(message, dtype)


class _Sparse(Compressor):
    """Keeps k elements of each tensor."""

    ratio: float = Field(default=0.9, ge=0, lt=1)
    """Share of the elements that is dropped; 0.9 keeps a tenth."""
    k: int | None = Field(default=None, ge=1)
    """How many elements of each tensor are kept, in place of ``ratio``."""

    @model_validator(mode="after")
    def _one_of_both(self) -> _Sparse:
        if self.k is not None and "ratio" in self.model_fields_set:
            raise ValueError("ratio: has no effect beside k; drop one")
        return self

    def kept(self, size: int) -> int:
        """Return how many of ``size`` elements stay: max(1, int(size * (1 - ratio))), or k."""
        return min(size, self.k or max(1, int(size * (1 - self.ratio))))


class TopK(_Sparse):
    """The k elements of largest magnitude, with their places: delta = k / d."""

    name: Literal["top-k"] = "top-k"

    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """A value and an int32 place each."""
        return self.kept(size) * (dtype.itemsize + 4)

    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Pack values, then places."""
        places = v.abs().topk(self.kept(v.shape[1]), dim=1, sorted=False).indices
        return torch.cat([to_bytes(v.gather(1, places)), to_bytes(places.int())], dim=1)

    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Put the values at their places."""
        cut = self.kept(size) * dtype.itemsize
        places = from_bytes(message[:, cut:], torch.int32).long()
        return _scatter(from_bytes(message[:, :cut], dtype), places, size)


class RandomK(_Sparse):
    """k elements drawn by the sender's counted stream, so no places travel: delta = k / d."""

    name: Literal["random-k"] = "random-k"
    unbiased: bool = False
    """Multiply by d / k, so that E C(v) = v; no contraction then."""

    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Values only."""
        return self.kept(size) * dtype.itemsize

    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Pack the values at the drawn places."""
        return to_bytes(v.gather(1, self._places(v.shape[1], coins).to(v.device)))

    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Draw the sender's places again."""
        values = from_bytes(message, dtype)
        if self.unbiased:
            values = values * (size / self.kept(size))
        return _scatter(values, self._places(size, coins).to(values.device), size)

    def _places(self, size: int, coins: Stream) -> Tensor:
        """Return int64 (r, k); a sender with several receivers is drawn once."""
        if not coins.ids:  # one rank alone hears nothing
            return torch.zeros(0, self.kept(size), dtype=torch.int64)
        ids = tuple(sorted(set(coins.ids)))
        drawn = Stream(coins.key, ids, coins.step, coins.draw).permutation(size)
        row = {rank: at for at, rank in enumerate(ids)}
        return drawn[[row[rank] for rank in coins.ids], : self.kept(size)]


class Sign(Compressor):
    """One bit per element and a length: sgn(v) ||v||_1 / d, with sgn(0) = 1."""

    name: Literal["sign"] = "sign"

    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """The mean magnitude, then the bits."""
        return dtype.itemsize + math.ceil(size / 8)

    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Pack the mean magnitude and the signs."""
        negative = v < 0
        mean = row_dot(v, torch.where(negative, -1.0, 1.0).to(v.dtype)) / v.shape[1]
        return torch.cat([to_bytes(mean.to(v.dtype)), pack_bits(negative.int(), 1)], dim=1)

    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Give every element the mean magnitude."""
        mean = from_bytes(message[:, : dtype.itemsize], dtype)
        negative = unpack_bits(message[:, dtype.itemsize :], size, 1)
        return torch.where(negative == 1, -mean, mean)


class QSGD(Compressor):
    """Random rounding to s = 2^bits - 1 levels of ||v|| (arXiv:1610.02132).

    C(v) = ||v|| / s * sgn(v) * xi, where xi is s |v| / ||v|| rounded up or down by a coin so that
    E C(v) = v. The biased form, a contraction, divides by 1 + min(d / s^2, sqrt(d) / s).
    """

    name: Literal["qsgd"] = "qsgd"
    bits: int = Field(default=4, ge=1, le=8)
    """Bits of a level; each element travels as a level and a sign."""
    unbiased: bool = False
    """Keep E C(v) = v; no contraction then."""

    def num_bytes(self, size: int, dtype: torch.dtype) -> int:
        """The norm, then level and sign of each element."""
        return dtype.itemsize + math.ceil(size * (self.bits + 1) / 8)

    def encode(self, v: Tensor, coins: Stream) -> Tensor:
        """Round by the sender's coins; level * 2 + (v < 0)."""
        s = 2**self.bits - 1
        norm = row_norm(v).to(v.dtype)  # what the receiver multiplies by
        level = v.abs() / torch.where(norm > 0, norm, 1.0) * s
        whole = level.floor()
        up = coins.uniform_(torch.empty_like(level, memory_format=torch.contiguous_format))
        xi = (whole + (up < level - whole)).clamp(max=s)  # |v| / ||v|| may round to above 1
        return torch.cat([to_bytes(norm), pack_bits(xi.int() * 2 + (v < 0), self.bits + 1)], dim=1)

    def decode(self, message: Tensor, size: int, dtype: torch.dtype, coins: Stream) -> Tensor:
        """Return level times norm / s, with its sign."""
        s = 2**self.bits - 1
        share = 1.0 if self.unbiased else 1 / (1 + min(size / s**2, math.sqrt(size) / s))
        unit = from_bytes(message[:, : dtype.itemsize], dtype) * (share / s)
        codes = unpack_bits(message[:, dtype.itemsize :], size, self.bits + 1)
        return torch.where(codes % 2 == 1, -unit, unit) * (codes // 2).to(dtype)


def _hyphenated(value: Any) -> Any:
    """Let ``top_k`` name ``top-k``, and a bare name stand for its defaults."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {**value, "name": value["name"].replace("_", "-")}
    return value


AnyCompressor = Annotated[
    Annotated[Identity | TopK | RandomK | Sign | QSGD, Field(discriminator="name")],
    BeforeValidator(_hyphenated),
]
"""A compressor by its name, for the field of an algorithm."""


def _contracting(compressor: AnyCompressor) -> AnyCompressor:
    if getattr(compressor, "unbiased", False):
        raise ValueError("needs a contraction, which the unbiased form is not; drop 'unbiased'")
    return compressor


Contraction = Annotated[AnyCompressor, AfterValidator(_contracting)]
"""A compressor with E ||C(v) - v||^2 <= (1 - delta) ||v||^2, which remembered errors ask for."""


def average_compressed(
    compressor: Compressor, comm: Communicator, layout: RowLayout, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Exchange q = C(v) with the neighbours: one compressed message per edge.

    Args:
        compressor: C.
        comm: the ranks.
        layout: of the rows.
        v: (local, d); kept.

    Returns:
        q, the hosted ranks' own rows as every receiver decodes them, and sum_j w_ij q_j over the
        neighbours j, without the own term; both (local, d).
    """
    message = compressor.pack(comm, layout, v)
    q = compressor.unpack(comm, layout, message, comm.ranks)
    heard = comm.neighbor_gather(message)
    values = compressor.unpack(comm, layout, heard.values, heard.source.tolist())
    return q, heard.weighted_sum(values, torch.zeros_like(q))


def _coins(comm: Communicator, ids: Iterable[int], tensor: int, step: int | None = None) -> Stream:
    return comm.seed.stream("compressor", ids, comm.step if step is None else step, tensor)


def _scatter(values: Tensor, places: Tensor, size: int) -> Tensor:
    out = torch.zeros(len(values), size, dtype=values.dtype, device=values.device)
    return out.scatter_(1, places, values)
