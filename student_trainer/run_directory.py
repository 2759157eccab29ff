"""What a run leaves on disk: ``run.yaml``, ``checkpoints/`` while it trains, ``model/`` once it has ended.

A checkpoint counts only with its mark, which is written last, so that a process killed while saving leaves none.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from services.contract.errors import SpecError, TrainingError
from services.contract.spec import RunSpec
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
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_whole(self.spec_file, text)

    def newest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; what was cut short is removed aloud."""
        found: dict[int, Path] = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            step = _marked_step(path)
            if step is None:
                log.warning("%s was not saved whole; it is removed", path)
                shutil.rmtree(path)
            else:
                found[step] = path
        return found[max(found)] if found else None

    def mark_checkpoint(self, step: int) -> None:
        """Say that the checkpoint of this step is whole."""
        write_whole(self.checkpoints / f"checkpoint-{step}" / MARK, json.dumps({"step": step}))

    def publish(self, save: Callable[[Path], None], *, before_rename: Callable[[], None]) -> None:
        """Let ``save`` write the model beside its place, ask ``before_rename``, move it there; drop the checkpoints."""
        unfinished = self.path / "model.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        before_rename()
        os.replace(unfinished, self.model)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """A file that is there with all of its text or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _what_trains(spec: RunSpec) -> dict[str, object]:
    return spec.model_dump(mode="json", exclude={"evaluation"})


def _marked_step(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / MARK).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
