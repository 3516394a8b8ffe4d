"""``contrastive``: gradients of comparisons between examples, whose embeddings cross ranks.

Every rank embeds two views of its own examples, all embeddings come to every rank (or those of the
neighbours do), each rank weighs and differentiates the terms of its own rows, and gradients of
embeddings go back to who made them: a reduce-scatter. With all-reduce of the parameters' gradients
this is one process with the batch of all, to rounding. Where the ranks' f_i are means over their
own rows, rank i's row is the gradient of sum_j f_j along its own parameters, so that the mean over
ranks is that of their mean f; nothing has to be multiplied by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny
from torch import Tensor, nn

from gossamer.algorithms.contrastive.columns import Columns, Exchange, exchange
from gossamer.algorithms.contrastive.contrast import Contrast
from gossamer.algorithms.contrastive.losses import (
    ContrastiveLoss,
    Keys,
    Rows,
    Setting,
    Visit,
    Weights,
)
from gossamer.algorithms.contrastive.owners import Owners, strided_shards
from gossamer.algorithms.contrastive.passes import Passes
from gossamer.algorithms.contrastive.recall import Recalls
from gossamer.algorithms.estimates import Estimate, Sink
from gossamer.algorithms.oracles.module_oracle import ModuleOracle
from gossamer.algorithms.problems import DataPlan, Problem, RankBatches
from gossamer.runtime import Communicator, ConfigError, combine

__all__ = ["Contrastive"]
