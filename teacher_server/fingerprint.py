"""Fingerprints: equal fingerprints give equal labels.

The whole content of the weight files is hashed, not a sample: one changed row changes labels. That costs one
sequential read, which loading needs anyhow (the second read comes from the page cache), and about a second per
gigabyte and core; files are hashed in parallel, so a large model in shards takes a few seconds to a minute.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services.contract.errors import ModelNotFoundError

_WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
_BLOCK_BYTES = 8 * 1024 * 1024


def fingerprint_model(directory: Path, *, adapter: Path | None = None, tokenizer_fingerprint: str, dtype: str) -> str:
    """32 hex digits over config.json, every weight file, the tokenizer, and the type the weights are computed in.

    Those of a LoRA ``adapter`` enter it too.
    """
    for pattern in _WEIGHT_PATTERNS:
        files = sorted(directory.glob(pattern))
        if files:
            break
    else:
        raise ModelNotFoundError(f"{directory} holds no weights", fix="Name a directory with *.safetensors files.")
    files = [directory / "config.json", *files]
    if adapter is not None:
        files += [adapter / "adapter_config.json", *sorted(adapter.glob("adapter_model.*"))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        hashes = list(pool.map(_hash_file, files))
    digest = hashlib.sha256("\n".join([*hashes, tokenizer_fingerprint, dtype]).encode())
    return digest.hexdigest()[:32]


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
