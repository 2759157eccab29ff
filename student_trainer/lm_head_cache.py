"""Output heads on disk, so that a worker fetches the head of a large teacher once.

A file is one line of JSON (shapes, types, scale, cap, SHA-256 of the rest), then the weight's bytes, then the bias's.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from services.contract.errors import LabelMismatchError
from services.contract.head_rows import HeadAssembly
from services.contract.lm_head import LmHead
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array, tensor_dtype


def cached_lm_head(
    fetch: Callable[[], Iterable[pb.GetLmHeadResponse]], *, fingerprint: str, cache_dir: Path | None
) -> LmHead:
    """The head with this fingerprint: from ``cache_dir`` when it lies there whole, else fetched and left there.

    The cached arrays are read-only views of the file, so that processes of one machine share its memory.
    """
    if cache_dir is None:
        return _assemble(fetch())
    path = cache_dir / f"{fingerprint}.lm_head"
    head = _load(path)
    if head is None:
        _save(_assemble(fetch()), path)
        head = _load(path)
    if head is None:
        raise LabelMismatchError(f"{path} does not hold what was written to it", fix="Check the disk; then retry.")
    return head


def _assemble(parts: Iterable[pb.GetLmHeadResponse]) -> LmHead:
    header = pb.LmHeadHeader()
    assembly: HeadAssembly | None = None
    try:
        for part in parts:
            if part.WhichOneof("part") == "header":
                header = part.header
                assembly = HeadAssembly(
                    vocab_size=header.vocab_size,
                    hidden_size=header.hidden_size,
                    dtype=tensor_dtype(header.dtype),
                    has_bias=header.has_bias,
                )
            elif assembly is None:
                raise _incomplete("its header is missing")
            else:
                assembly.add(part.rows)
        if assembly is None:
            raise _incomplete("nothing came")
        weight_VD, bias_V = assembly.whole()
    except ValueError as error:
        raise _incomplete(str(error)) from None
    return LmHead(weight_VD=weight_VD, bias_V=bias_V, logit_scale=header.logit_scale, soft_cap=header.soft_cap)


def _incomplete(why: str) -> LabelMismatchError:
    return LabelMismatchError(f"the teacher's output head is not whole: {why}", fix="Restart the teacher.")


def _save(head: LmHead, path: Path) -> None:
    arrays = [head.weight_VD] if head.bias_V is None else [head.weight_VD, head.bias_V]
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(_bytes(array))
    header = {
        "dtype": str(head.weight_VD.dtype),
        "shape": head.weight_VD.shape,
        "has_bias": head.bias_V is not None,
        "logit_scale": head.logit_scale,
        "soft_cap": head.soft_cap,
        "sha256": digest.hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(json.dumps(header).encode() + b"\n")
            for array in arrays:
                file.write(_bytes(array))
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _load(path: Path) -> LmHead | None:
    """None where the file is absent or damaged; it is then fetched again."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            start = file.tell()
        content = np.memmap(path, dtype=np.uint8, mode="r", offset=start)
        if hashlib.sha256(content.data).hexdigest() != header["sha256"]:
            return None
        dtype, (rows, width) = _dtype(header["dtype"]), header["shape"]
        weight_bytes = rows * width * dtype.itemsize
        return LmHead(
            weight_VD=content[:weight_bytes].view(dtype).reshape(rows, width),
            bias_V=content[weight_bytes:].view(dtype) if header["has_bias"] else None,
            logit_scale=header["logit_scale"],
            soft_cap=header["soft_cap"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _bytes(array: Array) -> Any:
    return np.ascontiguousarray(array).view(np.uint8).data


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
