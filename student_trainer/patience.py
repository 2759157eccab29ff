"""How long a student goes on asking a teacher that does not answer as it should."""

import logging
import random
import threading
import time

import grpc

from services.contract.connection_problems import STARTING, connection_problem
from services.contract.errors import HandshakeError
from services.contract.teacher_channel import TeacherAccess
from student_trainer.teacher_errors import is_worth_another_try, seconds_told_to_wait, translate

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_SILENT_SECONDS = 5.0
"""A wait that lasts longer is told of."""
_LOADING_FACTOR = 15
"""A teacher that says it is loading is waited for that much longer than one that says nothing."""


class Patience:
    """Decides whether a failed request is made again, and waits before it is: as long as the teacher says, or 0.1 s,
    doubling to 5 s.

    ``seconds`` bounds the time without any progress or word of a teacher that loads. ``known_model`` is empty until a
    teacher has introduced itself: from then on another one at the address is one replica gone astray, and the others
    are asked. ``warned`` remembers for all requests of a client which replicas were reported. Setting ``closed`` ends a
    wait. ``misses``: requests in a row that found the student's head missing.
    """

    def __init__(
        self,
        *,
        seconds: float,
        address: str,
        access: TeacherAccess,
        known_model: str,
        closed: threading.Event,
        warned: set[str],
    ) -> None:
        self._seconds = seconds
        self._address = address
        self._access = access
        self._known_model = known_model
        self._closed = closed
        self._warned = warned
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._pause = _SHORTEST_PAUSE
        self._progressed = True
        self._since: float | None = None
        self._absent_since: float | None = None
        self._said = False
        self.misses = 0

    def wait_or_raise(self, error: grpc.RpcError) -> None:
        """Returns when the request is to be made again; else raises what ``error`` means."""
        met_before = bool(self._known_model)
        problem = connection_problem(
            error.details(), address=self._address, access=None if met_before else self._access
        )
        meaning = translate(error, address=self._address, problem=problem, model=self._known_model)
        astray = isinstance(meaning, HandshakeError) and met_before
        told = seconds_told_to_wait(error)
        again = (
            astray
            or told is not None
            or is_worth_another_try(error, problem=problem, progressed=self._progressed, met_before=met_before)
        )
        self._progressed = False
        pause = self._next_pause(told, astray=astray)
        now, ends = time.monotonic(), self._ends(starting=problem is STARTING)
        if not again or now + pause > ends:
            raise meaning from error
        if astray:
            self._warn_once(meaning.what, replica=meaning.details.get("replica", self._address))
        elif not self._said and self._since is not None and now - self._since >= _SILENT_SECONDS:
            self._said = True
            logger.warning("%s; asking again for %.0f seconds", meaning.what, ends - now)
        self._closed.wait(pause)

    def _ends(self, *, starting: bool) -> float:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        loaded_at_last = self._since + _LOADING_FACTOR * self._seconds
        if starting:
            # One that dies while it loads is waited for again from then on.
            self._absent_since = None
            return loaded_at_last
        self._absent_since = now if self._absent_since is None else self._absent_since
        return min(self._absent_since + self._seconds, loaded_at_last)

    def _next_pause(self, told: float | None, *, astray: bool) -> float:
        if astray:
            # Another replica may answer at once.
            return _SHORTEST_PAUSE
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        # Those told the same must not all come back at the same moment.
        return pause if told is None else told * random.uniform(1.0, 1.1)

    def _warn_once(self, what: str, *, replica: str) -> None:
        if replica not in self._warned:
            self._warned.add(replica)
            logger.warning("%s; asking the other replicas", what)
