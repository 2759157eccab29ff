"""Where the fine-tuned teacher of a run lies, for who makes it, serves it and learns from it."""

from pathlib import Path

from services.contract.settings import Settings
from services.contract.spec import RunSpec


def finetuned_directory(spec: RunSpec, settings: Settings) -> Path | None:
    """The directory of the run that makes the teacher; its ``model`` is the teacher. None where it is used as it is."""
    return settings.data_dir / "teachers" / spec.finetune_key if spec.finetune_key is not None else None
