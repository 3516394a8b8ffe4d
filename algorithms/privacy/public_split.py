"""Which training examples are public, and which rank sees which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gossamer.runtime.errors import ConfigError
from gossamer.runtime.random import Random

__all__ = ["PublicSplit", "split_public"]


@dataclass(frozen=True)
class PublicSplit:
    """The training set in three disjoint parts, per rank: int64 places in it, ascending.

    Attributes:
        private: what of a rank's own shard is not public.
        training: public, dealt evenly over the ranks whatever their shards: all may see it.
        validation: public, held out; empty where nothing is.
    """

    private: tuple[np.ndarray, ...]
    training: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of private, public training and public validation examples."""
        private, training, validation = (
            sum(map(len, parts)) for parts in (self.private, self.training, self.validation)
        )
        return private, training, validation


def split_public(
    shards: Sequence[np.ndarray],
    seed: int,
    fraction: float | None = None,
    indices: str | None = None,
    validation: float = 0.0,
) -> PublicSplit:
    """Take the public examples out of the ranks' shards; a pure function of its arguments.

    The choice depends on the union of the shards alone, not on how many there are.

    Args:
        shards: per rank, int64 places in the training set.
        seed: of the choice and of the dealing, the run's.
        fraction: share of the public examples, to the nearest number.
        indices: None: chosen by a counted permutation; ``first``: those with the lowest places;
            else a file of places, all of them public.
        validation: share of the public examples that is held out, to the nearest number.

    Raises:
        ConfigError: a part would be empty, or less than one example for each rank; or the file is
            missing, broken, or names what is no training example.
    """
    known, n = np.unique(np.concatenate(list(shards))), len(shards)
    random = Random(seed)
    if indices is None or indices == "first":
        assert fraction is not None, "checked by the configuration"
        count = round(fraction * len(known))
        order = random.stream("public/choice").permutation(len(known))[0].numpy()
        public = known[:count] if indices == "first" else known[order[:count]]
    else:
        public = _read(Path(indices), known)
    # Mixed anew, so that the parts are alike where the file or the training set is sorted.
    public = np.sort(public)
    public = public[random.stream("public/parts").permutation(len(public))[0].numpy()]
    held = round(validation * len(public))
    parts = {"training": public[held:], "validation": public[:held]}
    for name, part in parts.items():
        if len(part) < n and (name == "training" or validation > 0):
            raise ConfigError(
                f"oracle.{'fraction' if indices in (None, 'first') else 'indices'}: leaves "
                f"{len(part)} of {len(known)} examples for public {name}, which needs one for each "
                f"of the {n} ranks; make more of them public"
            )
    private = tuple(np.sort(np.setdiff1d(shard, public)) for shard in shards)
    for rank, shard in enumerate(private):
        if len(shard) == 0:
            raise ConfigError(
                f"oracle: public takes all {len(shards[rank])} examples of rank {rank}, so that "
                "nothing private is left; make fewer examples public"
            )
    training, validated = (
        tuple(np.sort(part[rank::n]) for rank in range(n)) for part in parts.values()
    )
    return PublicSplit(private=private, training=training, validation=validated)


def _read(path: Path, known: np.ndarray) -> np.ndarray:
    """Return the places that a file names: one whole number a line, or a .npy array."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False).reshape(-1)
        else:
            found = np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
    except OSError as error:
        raise ConfigError(
            f"oracle.indices: cannot read {path} ({error.strerror}); write 'first', or a file with "
            "one place in the training set a line"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"oracle.indices: {path}: {error}; write one whole number a line"
        ) from None
    if found.dtype.kind not in "iu":
        raise ConfigError(f"oracle.indices: {path} holds {found.dtype}, not whole numbers")
    places: np.ndarray = found.astype(np.int64)
    strange = np.setdiff1d(places, known)
    if len(strange):
        raise ConfigError(
            f"oracle.indices: {path} names {strange[0]}, which is no training example (there are "
            f"{len(known)}, from {known[0]} to {known[-1]}); correct the file"
        )
    if len(np.unique(places)) < len(places):
        raise ConfigError(f"oracle.indices: {path} names an example twice; correct the file")
    return places
