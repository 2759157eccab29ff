"""Errors as HTTP carries them: problem details, RFC 9457. The API writes them, its clients read them."""

from pydantic import Field

from services.contract.errors import SmoothKDError
from services.contract.records import Record

MEDIA_TYPE = "application/problem+json"


class ProblemDetails(Record):
    """The body of every HTTP error: RFC 9457's members, then the error tree's."""

    type: str = Field(description="urn:smoothkd:problem:<reason>; stable.")
    title: str = Field(description="What kind of problem this is.")
    status: int
    detail: str = Field(description="What happened, with the names and values involved.")
    instance: str = Field(description="Path of the request that failed.")
    reason: str = Field(description="A stable word out of services/contract/errors.py.")
    fix: str = Field(default="", description="What to do about it.")
    details: dict[str, str] = Field(default_factory=dict, description="Machine-readable particulars.")


def describe(error: SmoothKDError, *, instance: str, status: int | None = None) -> ProblemDetails:
    """The problem details of an error; ``status`` where HTTP has a more exact one than the error's own."""
    return ProblemDetails(
        type=f"urn:smoothkd:problem:{error.reason}",
        title=(error.__doc__ or "").splitlines()[0].rstrip("."),
        status=status or error.http_status,
        detail=error.what,
        instance=instance,
        reason=error.reason,
        fix=error.fix,
        details=error.details,
    )


def revive(problem: ProblemDetails) -> SmoothKDError:
    """The error that ``describe`` was given; a SmoothKDError where the reason is not one of this release."""
    return _error_class(problem.reason)(problem.detail, fix=problem.fix, details=problem.details)


def _error_class(reason: str) -> type[SmoothKDError]:
    classes = [SmoothKDError]
    for error_class in classes:
        if error_class.reason == reason:
            return error_class
        classes.extend(error_class.__subclasses__())
    return SmoothKDError
