"""Communicator, transports, flat rows, random numbers, the loop, checkpoints."""

from gossamer import register_backend
from gossamer.runtime.communicator import Communicator, Work
from gossamer.runtime.errors import (
    CommError,
    CommTimeout,
    ConfigError,
    PeerLost,
    RanksDiffer,
    RoundMismatch,
)
from gossamer.runtime.messages import Messages, RaggedMessages
from gossamer.runtime.random import Random, Stream
from gossamer.runtime.rows import RowLayout, combine, row_dot, row_norm
from gossamer.runtime.transports import Transport, open_transport
from gossamer.runtime.transports.stacked import StackedTransport

__all__ = [
    "CommError",
    "CommTimeout",
    "Communicator",
    "ConfigError",
    "Messages",
    "PeerLost",
    "RaggedMessages",
    "Random",
    "RanksDiffer",
    "RoundMismatch",
    "RowLayout",
    "StackedTransport",
    "Stream",
    "Transport",
    "Work",
    "combine",
    "open_transport",
    "row_dot",
    "row_norm",
]

register_backend()  # torch has done so when it was imported, unless told not to
