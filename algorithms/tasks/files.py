"""Finding and reading data files, with errors that say what to do."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

from gossamer.runtime.errors import ConfigError

__all__ = ["DATA_VARIABLE", "find_data", "locate", "read_bytes"]

DATA_VARIABLE = "GOSSAMER_DATA"
"""Environment variable that names the folder of data sets."""


def find_data(path: str) -> Path | None:
    """Return where ``path`` lies: as it stands, or below GOSSAMER_DATA; None if nowhere."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    root = os.environ.get(DATA_VARIABLE)
    if root and not here.is_absolute() and (Path(root) / here).exists():
        return Path(root) / here
    return None


def locate(path: str, field: str) -> Path:
    """Return where ``path`` lies; see ``find_data``.

    Args:
        path: of a file or a folder.
        field: where the user wrote it, for the message (``task.path``).

    Raises:
        ConfigError: there is no such file or folder.
    """
    found = find_data(path)
    if found is not None:
        return found
    if Path(path).expanduser().is_absolute():
        raise ConfigError(f"{field}: no file or folder '{path}'; correct the path")
    root = os.environ.get(DATA_VARIABLE)
    also = f"in {DATA_VARIABLE}={root}" if root else f"{DATA_VARIABLE} is not set"
    raise ConfigError(
        f"{field}: no file or folder '{path}' (looked in {Path.cwd()}; {also}); give its path, or "
        f"set the environment variable {DATA_VARIABLE} to the folder that holds it"
    )


def read_bytes(path: Path, field: str) -> bytes:
    """Return a file's content, decompressed if its name ends in ``.gz``.

    Raises:
        ConfigError: it cannot be read, or is damaged or cut short.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(
            f"{field}: {path} is truncated or damaged ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"{field}: cannot read {path} ({error}); check the file") from error
