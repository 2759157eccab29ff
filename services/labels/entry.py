"""One entry of the label cache: a file that proves whose it is and that it is whole.

64 bytes of header (magic, length of the payload, key, BLAKE2b of key and payload), then the payload. Read into memory
and never mapped: a bad sector under a mapped page would kill the process.
"""

import hashlib
import os
import stat
import struct
from pathlib import Path

MAGIC = b"skdlab01"
_HEADER = struct.Struct("<8sQ32s16s")
_BLOCK_BYTES = 4096


class DamagedEntryError(Exception):
    """The file is not a whole entry of its key; the message says why."""


def read_entry(path: Path, *, key: str) -> bytes:
    """The payload; DamagedEntryError where this is no file, or one cut short, altered or another's, OSError as the disk
    has it.
    """
    # A pipe under this name would be waited for.
    with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise DamagedEntryError("it is no file")
        header = file.read(_HEADER.size)
        payload = file.readall()
    if len(header) < _HEADER.size:
        raise DamagedEntryError(f"it has only {len(header)} bytes")
    magic, length, owner, checksum = _HEADER.unpack(header)
    if magic != MAGIC:
        raise DamagedEntryError("it is no entry of a label cache")
    if owner != bytes.fromhex(key):
        raise DamagedEntryError("it holds the labels of another key")
    if length != len(payload):
        raise DamagedEntryError(f"it has {len(payload)} bytes of labels instead of {length}")
    if checksum != _checksum(owner, payload):
        raise DamagedEntryError("its checksum is wrong")
    return payload


def write_entry(path: Path, *, key: str, payload: bytes) -> None:
    """Not synchronised with the disk: a file that a power failure cuts short fails its check when it is read."""
    owner = bytes.fromhex(key)
    header = _HEADER.pack(MAGIC, len(payload), owner, _checksum(owner, payload))
    with path.open("wb", buffering=0) as file:
        for part in (header, payload):
            left = memoryview(part)
            while left:
                left = left[file.write(left) :]


def bytes_on_disk(payload_bytes: int) -> int:
    """What the entry of a payload takes up."""
    return whole_blocks(_HEADER.size + payload_bytes)


def whole_blocks(file_bytes: int) -> int:
    """What a file of this length takes up on disk."""
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _checksum(owner: bytes, payload: bytes) -> bytes:
    digest = hashlib.blake2b(owner, digest_size=16)
    digest.update(payload)
    return digest.digest()
