"""Secret noise: whose it is, how much of it, and from which key.

Noise is counted like all random numbers (arXiv:1106.0031's Philox), but its keys come from the
operating system's entropy, and are kept in the checkpoint alone. Philox is no cryptographic
generator; neither is the one of the peers in their default mode.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gossamer.runtime import Communicator, ConfigError, RowLayout
from gossamer.runtime.perturb import Probe, direction_, perturb_
from gossamer.runtime.random import Stream

__all__ = ["NoiseMode", "SecretNoise", "normal_terms", "secret_key"]

NoiseMode = Literal["split", "rank0", "replicated", "local", "pairwise"]

_PARTS = 4
"""Independent normals in each element. One alone ends at 5.8 standard deviations (its uniforms have
24 bits), which would tell neighbours apart; four end at 11.5, and lie on no one's grid
(arXiv:2107.10138)."""

_UNUSED_STEP = 0xFFFFFFFF
"""No release has it: what stands there may be shown, hashed."""


class SecretNoise:
    """The noise of the hosted ranks' releases.

    Attributes:
        mode: ``split``: each rank adds its n-th part of the variance; ``rank0``: rank 0 all of it;
            ``replicated``: all add the same noise, once in the mean; ``local`` and ``pairwise``:
            each all of it.
        keys: (local, 2) int64, secret: of the noise, and of the coins of the sampling.
    """

    def __init__(self, mode: NoiseMode, comm: Communicator, noise_seed: int | None) -> None:
        """Draw keys; ``noise_seed`` makes them repeatable, and the run not private."""
        self.mode, self._comm = mode, comm
        self.keys = torch.tensor(
            [[secret_key(noise_seed, "noise", rank), secret_key(noise_seed, "coins", rank)]
             for rank in comm.ranks],
            dtype=torch.int64,
        )  # fmt: skip

    def agree(self, layout: RowLayout) -> None:
        """Share what ``replicated`` shares, and compare what must be equal, or must not.

        Raises:
            ConfigError: on every process: two ranks would add the same noise, which all modes but
                ``replicated`` and ``rank0`` forbid, or different noise under ``replicated``.
        """
        comm = self._comm
        if self.mode == "replicated":
            row = self.keys[:, :1].contiguous().to(comm.device)
            self.keys[:, 0] = comm.broadcast(row, count=False)[0].cpu()
        shown = [self._digest(layout, i) for i in range(comm.local)]
        rows = torch.tensor(shown, dtype=torch.int64, device=comm.device)[:, None]
        digests = comm.all_gather(rows, count=False).flatten().tolist()
        different = len(set(digests))
        if self.mode == "replicated" and different > 1:
            raise ConfigError("oracle.noise_mode: replicated, but the ranks' noise differs")
        if self.mode in ("split", "local", "pairwise") and different < comm.n:
            raise ConfigError(
                f"oracle.noise_mode: {self.mode} needs independent noise on every rank, but two "
                "ranks would draw the same; restart without the keys of another rank"
            )

    def coin_seed(self, rank: int) -> int:
        """Return the seed of a hosted rank's sampling."""
        return int(self.keys[rank - self._comm.ranks.start, 1])

    def add_(self, rows: Tensor, layout: RowLayout, release: int, scales: Sequence[float]) -> None:
        """Add noise number ``release`` to the hosted ranks' rows (local, d).

        Args:
            rows: their clipped sums.
            layout: of a row; padding stays as it is.
            release: a number that no other release has.
            scales: per hosted rank, the standard deviation in its row; 0 adds nothing.
        """
        for row, terms in zip(rows, self.terms(release, scales), strict=True):
            for seed, term in terms:
                perturb_(row, layout, seed, term.step, term.probe, term.coefficient)

    def terms(self, release: int, scales: Sequence[float]) -> list[list[tuple[int, Probe]]]:
        """Return what ``add_`` adds: per hosted rank directions, with their seeds."""
        return [normal_terms(self._seed(i), release, scale) for i, scale in enumerate(scales)]

    def pending(
        self, rows: Tensor, layout: RowLayout, release: int, scales: Sequence[float]
    ) -> list[list[tuple[int, Probe]]]:
        """Add to ``rows`` what cannot wait, and return the rest of the noise as ``terms``."""
        return self.terms(release, scales)

    def scalar(self, release: int) -> float:
        """Return one standard normal of rank 0's, beside the noise number ``release``."""
        stream = Stream(self._seed(0), (1 << 30,), step=release)
        parts = stream.normal_(torch.empty(1, _PARTS, dtype=torch.float64))
        return float(parts.sum()) / math.sqrt(_PARTS)

    def scales(self, total: float) -> list[float]:
        """Return the standard deviation in each hosted row, where the sum is to have ``total``.

        Of ``replicated`` rows, which are the same on every rank, the mean has it: n-th parts.
        """
        return [total * self._share(rank) for rank in self._comm.ranks]

    def variances(self, total: float, sizes: Sequence[float]) -> tuple[list[float], float]:
        """Return the variance per element in each hosted row, and in the mean of all rows.

        Of the release added last, where rank r's row is divided by ``sizes[r]``.
        """
        parts = [(total * self._share(r) / size) ** 2 for r, size in enumerate(sizes)]
        mean = parts[0] if self.mode == "replicated" else sum(parts) / len(parts) ** 2
        return [parts[r] for r in self._comm.ranks], mean

    def _share(self, rank: int) -> float:
        """Return the standard deviation that a rank adds, over that of the sum."""
        n, mode = self._comm.n, self.mode
        if mode == "rank0":
            return float(rank == 0)
        return {"split": math.sqrt(1 / n), "replicated": 1 / n}.get(mode, 1.0)

    # --- what a resume needs -----------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the secrets, a row per hosted rank."""
        return {"keys": self.keys.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        self.keys = state["keys"].clone()

    def _seed(self, i: int) -> int:
        return int(self.keys[i, 0]) & (2**64 - 1)

    def _digest(self, layout: RowLayout, i: int) -> int:
        size = min(64, layout.d)
        row = torch.empty(size, dtype=torch.float32)
        values = direction_(row, layout, self._seed(i), _UNUSED_STEP, 0).numpy().tobytes()
        return int.from_bytes(hashlib.sha256(values).digest()[:8], "little", signed=True)


def normal_terms(seed: int, release: int, scale: float) -> list[tuple[int, Probe]]:
    """Return ``scale`` times the standard normals (seed, release): directions with their seed."""
    share = scale / math.sqrt(_PARTS)
    return [(seed, Probe(release, part, share)) for part in range(_PARTS)] if scale else []


def secret_key(noise_seed: int | None, name: str, rank: int) -> int:
    """Return 63 secret bits, or those of a seed that was given."""
    if noise_seed is None:
        return secrets.randbits(63)
    digest = hashlib.sha256(f"{noise_seed}/{name}/{rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
