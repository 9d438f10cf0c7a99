"""A fingerprint of the user's files, so that results of other files are not taken for those of these."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

LENGTH = 16  # hexadecimal digits that are kept


@cache
def fingerprint(*paths: Path) -> str:
    """The first digits of SHA-256 over what the files hold; where they lie does not matter. Read once a process.

    Args:
        paths: files, and folders with all files below them.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:LENGTH]
