"""Finding and reading data files, with errors that say what to do."""

from __future__ import annotations

import glob
import gzip
import os
import sysconfig
import zlib
from pathlib import Path

from gossamer.runtime.errors import ConfigError

__all__ = [
    "DATA_VARIABLE",
    "expand",
    "find_data",
    "locate",
    "read_bytes",
    "standard_library",
    "suffix_of",
]

DATA_VARIABLE = "GOSSAMER_DATA"
"""Environment variable that names the folder of data sets."""
_NOT_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}


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


def expand(path: str, field: str) -> list[Path]:
    """Return the files that a path stands for, in the order of their names.

    Args:
        path: of a file or a folder (all files below), or a pattern; a relative one is looked for
            here and in GOSSAMER_DATA.
        field: where the user wrote it, for the message (``task.path``).

    Raises:
        ConfigError: it names no file.
    """
    # glob, not pathlib: absolute patterns, and hidden files are left out.
    if glob.has_magic(path):
        roots = ["", os.environ.get(DATA_VARIABLE, "")]
        patterns = [os.path.join(root, path) for root in roots]  # noqa: PTH118 - no path yet
    else:
        start = str(locate(path, field))
        patterns = [glob.escape(start), f"{glob.escape(start)}/**/*"]
    matches = [sorted(glob.glob(pattern, recursive=True)) for pattern in patterns]  # noqa: PTH207
    found = [[Path(name) for name in names if Path(name).is_file()] for names in matches]
    if not any(found):
        raise ConfigError(f"{field}: '{path}' names no file; correct the path")
    return next(filter(None, found))


def suffix_of(path: Path) -> str:
    """Return a file's ending, such as ``.json``; of ``.json.gz`` too."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


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


def standard_library() -> list[Path]:
    """Return the source files of Python's standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.rglob("*.py"))
    return [file for file in files if not _NOT_SOURCE & set(file.relative_to(root).parts)]
