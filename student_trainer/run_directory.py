"""What a run leaves on disk: ``run.yaml``, ``checkpoints/`` while it trains, ``model/`` once it has ended.

A checkpoint counts only with its mark, which is written last and says how long each of its files is: a process killed
while saving leaves none, and files that were cut short afterwards are noticed.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from services.contract.errors import SpecError, TrainingError
from services.contract.spec import RunSpec, content_key
from services.contract.spec_reading import load_run

log = logging.getLogger(__name__)

MARK = "whole.json"


class RunDirectory:
    """The directory of one run. ``model`` is where the final model appears, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec_file = path / "run.yaml"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def require_free(self, spec: RunSpec) -> None:
        """TrainingError when the directory belongs to a run that trains otherwise.

        What a student is evaluated on may differ: it decides no weight.
        """
        if self.spec_file.exists():
            try:
                earlier = load_run(self.spec_file)
            except SpecError as error:
                raise TrainingError(
                    f"{self.spec_file} is not readable: {error.what}", fix="Choose another directory for this run."
                ) from None
            if _what_trains(earlier) != _what_trains(spec):
                raise TrainingError(
                    f"{self.path} holds another run ({earlier.method}, key {earlier.key[:8]}); "
                    f"this one is {spec.method}, key {spec.key[:8]}",
                    fix="Choose another directory, or remove this one to start anew.",
                )
        elif self.model.exists() or self.checkpoints.exists():
            raise TrainingError(
                f"{self.path} holds a model or checkpoints, but no run.yaml that says of which run",
                fix="Choose another directory, or remove this one to start anew.",
            )

    def claim(self, spec: RunSpec) -> None:
        """Make the directory this run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.spec_file, spec_text(spec))

    def newest_checkpoint(self, spec: RunSpec) -> Path | None:
        """The newest whole checkpoint; what was cut short is removed aloud.

        TrainingError for a checkpoint of another run.
        """
        for path in sorted(self.checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
            mark = _mark(path)
            damage = "was not saved whole" if mark is None else _damage(path, mark)
            if mark is None or damage:
                log.warning("%s %s; it is removed", path, damage)
                shutil.rmtree(path)
            elif mark.get("run") != _training_key(spec):
                raise TrainingError(
                    f"{path} is a checkpoint of another run",
                    fix="Choose another directory for this run, or remove the checkpoint to start anew.",
                )
            else:
                return path
        return None

    def mark_checkpoint(self, step: int, spec: RunSpec) -> None:
        """Say that the checkpoint of this step is whole, once its bytes are on the disk, and drop the oldest ones."""
        checkpoint = self.checkpoints / f"checkpoint-{step}"
        sizes = {}
        for file in _files(checkpoint):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
        write_whole(checkpoint / MARK, json.dumps({"step": step, "run": _training_key(spec), "bytes": sizes}))
        # Only now may earlier ones go: until its mark, this one counts for nothing.
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=_step)
        for earlier in found[: -spec.training.keep_checkpoints]:
            (earlier / MARK).unlink(missing_ok=True)
            shutil.rmtree(earlier)

    def publish(self, save: Callable[[Path], None], *, before_rename: Callable[[], None]) -> None:
        """Let ``save`` write the model beside its place, ask ``before_rename``, move it there; drop the checkpoints."""
        unfinished = self.path / "model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        before_rename()
        os.replace(unfinished, self.model)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def spec_text(spec: RunSpec) -> str:
    """The specification as ``smoothkd train`` reads it."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all of its text or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _what_trains(spec: RunSpec) -> dict[str, object]:
    bookkeeping = {"checkpoint_steps", "keep_checkpoints", "report_to"}
    return spec.model_dump(mode="json", exclude={"evaluation": True, "training": bookkeeping})


def _training_key(spec: RunSpec) -> str:
    return content_key(_what_trains(spec))


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK)


def _mark(checkpoint: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return mark if isinstance(mark, dict) and isinstance(mark.get("bytes"), dict) else None


def _damage(checkpoint: Path, mark: dict[str, Any]) -> str:
    for name, size in mark["bytes"].items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"lacks {name}" if found is None else f"has {found:,} of {size:,} bytes of {name}"
    return ""
