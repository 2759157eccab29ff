"""A DeepSpeed configuration as a run takes it: the user's own, where it does not say otherwise than the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.contract.errors import SpecError

_SETTINGS_INSTEAD = {
    "optimizer": "learning_rate and training.weight_decay",
    "scheduler": "training.lr_scheduler and training.warmup_ratio",
    "amp": "training.precision",
}
"""Sections with which DeepSpeed would replace settings that a run's results stand under, and these settings."""


def load_deepspeed_config(path: str, *, of_the_run: Mapping[str, float], precision: str) -> dict[str, Any]:
    """The configuration in a JSON file, with all that ``of_the_run`` names, by DeepSpeed's own names, left to the run.

    Without them DeepSpeed would have defaults of its own: gradients would not be clipped, for one. SpecError for a file
    that cannot be read, for sections that would replace the run's settings, and for values that are not the run's.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"training.deepspeed: {path} cannot be read: {error}", fix="Name a JSON file that this machine has."
        ) from None
    if not isinstance(config, dict):
        raise SpecError(f"training.deepspeed: {path} holds no JSON object", fix="See DeepSpeed's documentation.")
    for section, settings in _SETTINGS_INSTEAD.items():
        if section in config:
            raise SpecError(
                f"training.deepspeed: {path} has a section {section}, which would replace settings of the run",
                fix=f"Remove it; {settings} say what it would.",
            )
    for name, value in of_the_run.items():
        told = config.setdefault(name, "auto")
        if told not in ("auto", value):
            raise SpecError(
                f"training.deepspeed: {path} sets {name} to {json.dumps(told)}, and for this run it is {value:g}",
                fix=f'Set {name} to "auto" there.',
            )
    for name in ("bf16", "fp16"):
        told = _section(config, name, path=path).get("enabled", "auto")
        if told not in ("auto", precision == name):
            raise SpecError(
                f"training.deepspeed: {path} sets {name}.enabled to {json.dumps(told)}, and the run's "
                f"training.precision is {precision}",
                fix=f'Set {name}.enabled to "auto" there.',
            )
    if _section(config, "zero_optimization", path=path).get("stage") == 3:
        # Otherwise there would be no final model, which would show only in the end.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def _section(config: Mapping[str, Any], name: str, *, path: str) -> Mapping[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise SpecError(
            f"training.deepspeed: {path} sets {name} to {json.dumps(section)}, which is no section of settings",
            fix=f"Write an object, as DeepSpeed's documentation has it, or leave {name} out.",
        )
    return section
