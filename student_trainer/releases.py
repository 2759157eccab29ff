"""Teacher and student of different releases: whether they can work together, and what to do where not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from services.contract.errors import HandshakeError, LabelMismatchError
from services.contract.release import LABEL_FORMAT, UNKNOWN_RELEASE, release
from services.contract.teacher.v1 import teacher_service_pb2 as pb

log = logging.getLogger(__name__)

_UNTOLD_FORMAT = 1
"""Of labels from servers that are too old to say."""


def require_readable_labels(teacher: pb.GetTeacherResponse) -> None:
    """HandshakeError where the teacher's labels have another format than this release reads; says which side is older.

    Releases that differ otherwise work together.
    """
    told = teacher.label_format or _UNTOLD_FORMAT
    if told == LABEL_FORMAT:
        if teacher.release != release():
            log.info("the teacher runs smoothkd %s, this student %s", _named(teacher.release), release())
        return
    older = "the teacher" if told < LABEL_FORMAT else "this student"
    update = (
        f"Start the teacher with smoothkd {release()}"
        if told < LABEL_FORMAT
        else f"Install smoothkd {_wanted(teacher.release)} for the student, its workers and the API"
    )
    raise HandshakeError(
        f"teacher and student run releases of smoothkd that cannot work together: the teacher {teacher.model} runs "
        f"smoothkd {_named(teacher.release)} and sends labels of format {told}, this student runs {release()} and "
        f"reads format {LABEL_FORMAT}; {older} is the older one",
        fix=f"{update}; or let both run the older one. Label files and caches of the other format are not read.",
        details={"teacher_release": teacher.release, "student_release": release()},
    )


@contextmanager
def blaming_releases(teacher_release: str) -> Iterator[None]:
    """Around the reading of an answer: a LabelMismatchError says what to do where the two run different releases."""
    try:
        yield
    except LabelMismatchError as error:
        if teacher_release == release():
            raise
        raise LabelMismatchError(
            error.what,
            fix=f"The teacher runs smoothkd {_named(teacher_release)}, this student {release()}: let both run the "
            f"newer release. If that does not help: {error.fix}",
            details={**error.details, "teacher_release": teacher_release, "student_release": release()},
        ) from error


def _named(teacher_release: str) -> str:
    return teacher_release or "(a release too old to say which)"


def _wanted(teacher_release: str) -> str:
    # A teacher that runs from a checkout does not know its own.
    return "in the teacher's release" if teacher_release in ("", UNKNOWN_RELEASE) else teacher_release
