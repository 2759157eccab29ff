"""Every error that a user of smoothkd can meet, as one tree.

    SmoothKDError
    ├── InvalidInputError            the request or file is wrong; change it
    │   ├── SpecError                a sweep or run specification does not hold together
    │   ├── UnsupportedError         well-formed, but this release cannot do it
    │   ├── DatasetError             a data set is missing, unreadable or lacks columns or rows
    │   ├── ModelNotFoundError       a model is neither a directory, nor on the hub, nor embedded
    │   └── LimitExceededError       a request is larger than the server accepts
    ├── AuthenticationError          no API key, or a wrong one
    ├── NotFoundError                no such sweep, run, stage or artifact
    ├── ConflictError                the request contradicts what is stored
    │   ├── StaleAttemptError        a newer attempt holds the stage; this one must stop writing
    │   └── StudentHeadMissingError  the teacher has no such student head (any more); send it
    ├── OverloadedError              the server has too much to do; ask again later
    ├── TeacherError
    │   ├── TeacherUnavailableError  no teacher answers at the address
    │   ├── HandshakeError           teacher and student do not share tokenizer or vocabulary
    │   └── LabelMismatchError       soft labels belong to other tokens than those asked for
    ├── TrainingError                training cannot go on (non-finite loss, bad checkpoint)
    ├── EvaluationError              a benchmark, or every one of a run, could not be carried out
    ├── CancelledError               stopped because the user asked for it
    ├── ApiUnavailableError          no API answers at the address
    ├── QueueUnavailableError        Redis or Valkey does not answer
    ├── StoreUnavailableError        the database does not answer
    ├── PortInUseError               another process listens on the port
    └── MissingExtraError            an optional part of the installation is absent

Edges translate and never invent: HTTP answers problem+json (RFC 9457), gRPC answers google.rpc.Status with
ErrorInfo, the command line prints ``error: ...`` and exits with ``exit_code``.
"""

from typing import ClassVar


class SmoothKDError(Exception):
    """An error that its reader can act on.

    ``reason`` is a stable, machine-readable word; ``what`` says what happened with the names and values
    involved; ``fix`` says what to do; ``details`` carries machine-readable particulars, values as text.
    """

    reason: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, fix: str = "", details: dict[str, str] | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.what}\n  {self.fix}" if self.fix else self.what


class InvalidInputError(SmoothKDError):
    """The request or file is wrong; the same request will fail again."""

    reason = "invalid_input"
    http_status = 422
    grpc_code = "INVALID_ARGUMENT"
    exit_code = 2


class SpecError(InvalidInputError):
    """A sweep or run specification does not hold together."""

    reason = "invalid_spec"


class UnsupportedError(InvalidInputError):
    """The specification is well-formed, but this release cannot carry it out."""

    reason = "unsupported"


class DatasetError(InvalidInputError):
    """A data set is missing, unreadable, lacks columns, or holds a row that cannot be used."""

    reason = "invalid_dataset"


class ModelNotFoundError(InvalidInputError):
    """A model name is neither a local directory, nor reachable on the hub, nor embedded."""

    reason = "model_not_found"


class LimitExceededError(InvalidInputError):
    """A request is larger than the server accepts."""

    reason = "limit_exceeded"


class AuthenticationError(SmoothKDError):
    """No API key was sent, or a wrong one."""

    reason = "unauthenticated"
    http_status = 401
    grpc_code = "UNAUTHENTICATED"
    exit_code = 2


class NotFoundError(SmoothKDError):
    """No such sweep, run, stage or artifact."""

    reason = "not_found"
    http_status = 404
    grpc_code = "NOT_FOUND"
    exit_code = 2


class ConflictError(SmoothKDError):
    """The request contradicts what is stored."""

    reason = "conflict"
    http_status = 409
    grpc_code = "FAILED_PRECONDITION"


class StaleAttemptError(ConflictError):
    """A newer attempt holds the stage, or the stage has ended; the caller must stop writing."""

    reason = "stale_attempt"


class StudentHeadMissingError(ConflictError):
    """The teacher does not hold the student's output head that projected labels need."""

    reason = "student_head_missing"


class OverloadedError(SmoothKDError):
    """The server, or this client's share of it, is full; the same request will succeed later.

    ``details["retry_after_seconds"]`` says when; it travels as google.rpc.RetryInfo too.
    """

    reason = "overloaded"
    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    exit_code = 3


class TeacherError(SmoothKDError):
    """The teacher cannot be used."""

    reason = "teacher"
    http_status = 502
    grpc_code = "FAILED_PRECONDITION"
    exit_code = 3


class TeacherUnavailableError(TeacherError):
    """No teacher answers at the address."""

    reason = "teacher_unavailable"
    grpc_code = "UNAVAILABLE"


class HandshakeError(TeacherError):
    """Teacher and student do not share model, tokenizer or vocabulary."""

    reason = "handshake"


class LabelMismatchError(TeacherError):
    """Soft labels belong to other tokens than those asked for, or are not finite."""

    reason = "label_mismatch"


class TrainingError(SmoothKDError):
    """Training cannot go on: a non-finite loss, a checkpoint of another run, no memory."""

    reason = "training"


class EvaluationError(SmoothKDError):
    """None of the benchmarks could be carried out; one that can keeps its scores."""

    reason = "evaluation"


class CancelledError(SmoothKDError):
    """Stopped because the user asked for it."""

    reason = "cancelled"
    http_status = 409
    grpc_code = "CANCELLED"
    exit_code = 130


class ApiUnavailableError(SmoothKDError):
    """No API answers at the address."""

    reason = "api_unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"
    exit_code = 3


class QueueUnavailableError(SmoothKDError):
    """Redis or Valkey does not answer."""

    reason = "queue_unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"
    exit_code = 3


class StoreUnavailableError(SmoothKDError):
    """The database does not answer."""

    reason = "store_unavailable"
    http_status = 503
    grpc_code = "UNAVAILABLE"
    exit_code = 3


class PortInUseError(SmoothKDError):
    """Another process listens on the port."""

    reason = "port_in_use"
    exit_code = 3


class MissingExtraError(SmoothKDError):
    """An optional part of the installation is absent."""

    reason = "missing_extra"
    exit_code = 3


def error_class(reason: str) -> type[SmoothKDError]:
    """The class that carries ``reason`` over the wire; SmoothKDError for one that this release does not know."""
    waiting = [SmoothKDError]
    while waiting:
        candidate = waiting.pop()
        if candidate.reason == reason:
            return candidate
        waiting.extend(candidate.__subclasses__())
    return SmoothKDError
