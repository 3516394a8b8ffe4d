"""The losses by name: a new one is a class in a file of its own and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import SerializeAsAny

from gossamer.algorithms.contrastive.cache import Full, NegCache
from gossamer.algorithms.contrastive.emc2 import EMC2
from gossamer.algorithms.contrastive.in_batch import DCL, SimCLR
from gossamer.algorithms.contrastive.losses import ContrastiveLoss
from gossamer.algorithms.contrastive.moco import MoCo
from gossamer.algorithms.contrastive.sogclr import ISogCLR, SogCLR
from gossamer.runtime.component import named

__all__ = ["LOSSES", "LossField"]

LOSSES: dict[str, type[ContrastiveLoss]] = {
    "emc2": EMC2,
    "simclr": SimCLR,
    "dcl": DCL,
    "sogclr": SogCLR,
    "isogclr": ISogCLR,
    "moco": MoCo,
    "negcache": NegCache,
    "full": Full,
}

LossField = Annotated[SerializeAsAny[ContrastiveLoss], named(LOSSES, "oracle.loss")]
"""A loss: its name, or a section with a name and fields."""
