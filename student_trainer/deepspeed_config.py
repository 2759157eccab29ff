"""A DeepSpeed configuration as a run takes it: the user's own, where it does not say otherwise than the run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.contract.errors import SpecError


def load_deepspeed_config(path: str, *, of_the_run: Mapping[str, float]) -> dict[str, Any]:
    """The configuration in a JSON file, with all that ``of_the_run`` names, by DeepSpeed's own names, left to the run.

    Without them DeepSpeed would have defaults of its own: gradients would not be clipped, for one. SpecError for a file
    that cannot be read, and for values that are not the run's.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(
            f"training.deepspeed: {path} cannot be read: {error}", fix="Name a JSON file that this machine has."
        ) from None
    if not isinstance(config, dict):
        raise SpecError(f"training.deepspeed: {path} holds no JSON object", fix="See DeepSpeed's documentation.")
    for name, value in of_the_run.items():
        told = config.setdefault(name, "auto")
        if told not in ("auto", value):
            raise SpecError(
                f"training.deepspeed: {path} sets {name} to {told}, and for this run it is {value:g}",
                fix=f'Set {name} to "auto" there.',
            )
    if config.get("zero_optimization", {}).get("stage") == 3:
        # Otherwise there would be no final model, which would show only in the end.
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config
