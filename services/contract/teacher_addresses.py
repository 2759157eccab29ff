"""Where a run's teachers are: several need an address each, for a server serves one at a time."""

from services.contract.errors import InvalidInputError
from services.contract.settings import Settings
from services.contract.teacher_spec import TeacherSpec


def require_own_addresses(teacher: TeacherSpec | None, settings: Settings) -> None:
    """InvalidInputError where two teachers of a run are looked for at one address."""
    if teacher is None:
        return
    found: dict[str, str] = {}
    for model in (teacher.model, *(other.model for other in teacher.others)):
        address = settings.address_of(model)
        if address in found:
            raise InvalidInputError(
                f"the teachers {found[address]} and {model} are both looked for at {address}, which serves one at a "
                "time",
                fix="Start a server for each, and set SMOOTHKD_TEACHER_ADDRESSES to JSON that maps each model to its "
                f'address: {{"{model}": "HOST:PORT"}}.',
            )
        found[address] = model
