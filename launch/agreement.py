"""Errors that some processes meet and others do not: all of them end, one of them speaks."""

from __future__ import annotations

import torch

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports import Transport

__all__ = ["SilencedError", "raise_together", "share_text"]

_MESSAGE_BYTES = 4096


class SilencedError(Exception):
    """The configuration is wrong and process 0 says why; this process ends with the same status."""


def share_text(transport: Transport, text: str, timeout_s: float) -> list[str]:
    """Return every process's text (4,096 bytes at most each), on every process."""
    group = RankGroup(transport.processes, transport, timeout_s=timeout_s)
    data = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    row = torch.tensor([list(data)], dtype=torch.uint8, device=transport.device)
    rows = group.all_gather(row, count=False).cpu()
    return [bytes(r.tolist()).rstrip(b"\0").decode(errors="ignore") for r in rows]


def raise_together(transport: Transport, error: Exception | None, timeout_s: float) -> None:
    """Raise on every process if any has an ``error``; process 0 gets the first one's message.

    Raises:
        ConfigError: on process 0.
        SilencedError: on the others.
    """
    if transport.processes == 1:
        if error is not None:
            raise error
        return
    messages = share_text(transport, str(error) if error else "", timeout_s)
    failed = [(p, m) for p, m in enumerate(messages) if m]
    if not failed:
        return
    process, message = failed[0]
    if transport.process != 0:
        raise SilencedError
    raise ConfigError(message if process == 0 else f"{message} (on process {process})")
