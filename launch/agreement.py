"""Errors that some processes meet and others do not: all of them end, one of them speaks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from gossamer.runtime.collectives import RankGroup
from gossamer.runtime.errors import ConfigError
from gossamer.runtime.transports import Transport

__all__ = [
    "LateError",
    "SilencedError",
    "raise_together",
    "require_same_configuration",
    "share_text",
]

_MESSAGE_BYTES = 4096


class SilencedError(Exception):
    """The configuration is wrong and process 0 says why; this process ends with the same status."""


class LateError(Exception):
    """A ConfigError of one process after training began: a failure, for which others wait."""


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


def require_same_configuration(
    transport: Transport, sections: Mapping[str, Mapping[str, Any]], timeout_s: float
) -> None:
    """Refuse to run when processes were given different configurations.

    Raises:
        ConfigError: on process 0; names a process and the fields that differ there.
        SilencedError: on the others.
    """
    if transport.processes == 1:
        return
    flat = {f"{k}.{f}".lstrip("."): v for k, fields in sections.items() for f, v in fields.items()}
    spelled = {key: json.dumps(v, sort_keys=True, default=str) for key, v in flat.items()}
    whole = hashlib.sha256(json.dumps(spelled, sort_keys=True).encode()).hexdigest()
    digests = {k: hashlib.sha256(v.encode()).hexdigest()[:8] for k, v in spelled.items()}
    text = "\n".join([whole, *(f"{key} {digest}" for key, digest in sorted(digests.items()))])
    rows = [row.splitlines() for row in share_text(transport, text, timeout_s)]
    error = None
    for process, row in enumerate(rows):
        if row[0] != rows[0][0]:
            names = {line.rpartition(" ")[0] for line in set(row) ^ set(rows[0]) if " " in line}
            error = ConfigError(
                f"configuration: process {process} holds another than process 0: "
                f"{', '.join(sorted(names)) or 'a field'} differ; start all with the same file "
                "and settings"
            )
            break
    raise_together(transport, error, timeout_s)
