"""What a directory says of the evaluation in it: whose outputs lie there, and who wrote and judged them."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contract.errors import InvalidInputError

SUBJECT = "evaluated.json"
OWN = "transformers"
"""Who answers where no server does."""


class Subject(BaseModel):
    """``weights``: size in bytes and time of change in nanoseconds of each file of the model's weights.

    ``judged_by``: what ``factual_rate of xsum`` depends on beside the outputs, as ``judged.judged_by`` says it.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    weights: dict[str, tuple[int, int]] = Field(default_factory=dict)
    max_new_tokens: int
    answered_by: str = OWN
    judged_by: dict[str, str] = Field(default_factory=dict)


def read_subject(folder: Path) -> Subject | None:
    """None where the directory says nothing; InvalidInputError where what it says cannot be read."""
    file = folder / SUBJECT
    try:
        return Subject.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error.strerror or type(error).__name__
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join([*(str(part) for part in first["loc"]), first["msg"]])
    raise InvalidInputError(
        f"{file} does not say whose outputs lie beside it: {why}", fix="Evaluate into another directory."
    )
