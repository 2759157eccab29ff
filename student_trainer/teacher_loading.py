"""Having teachers serve other weights: each replica behind an address by itself, for they share no memory."""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

from services.contract.errors import (
    CancelledError,
    HandshakeError,
    InvalidInputError,
    OverloadedError,
    SmoothKDError,
    TeacherUnavailableError,
)
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.contract.teacher_channel import TeacherAccess, open_replica_channels
from student_trainer.patience import Patience
from student_trainer.teacher_errors import told_by_server

log = logging.getLogger(__name__)

LOAD_SECONDS = 3600.0
"""How long one replica may take to load."""

TURN_SECONDS = 3600.0
"""How long students of another teacher are waited for."""

ABSENT_SECONDS = 5.0
"""One replica of several that does not answer for so long is left out: the others do its work."""


def load_on_every_replica(
    address: str, model: str, *, access: TeacherAccess, patience_seconds: float, closed: threading.Event
) -> pb.LoadModelResponse:
    """What the replicas behind ``address`` serve from now on; ``model`` empty is what they were started with.

    Waits while students use a teacher that was loaded a moment ago. One that does not answer, or refuses the weights
    that others serve, is passed over with a warning. Raises what replicas say against the weights where all refuse
    them, HandshakeError where replicas differ in them, TeacherUnavailableError when none answers, CancelledError once
    ``closed`` is set.
    """
    channels = open_replica_channels(address, access=access)
    seconds = patience_seconds if len(channels) == 1 else min(patience_seconds, ABSENT_SECONDS)

    def load(channel: grpc.Channel) -> pb.LoadModelResponse | SmoothKDError:
        try:
            return _load(channel, model, address=address, access=access, patience_seconds=seconds, closed=closed)
        except (TeacherUnavailableError, HandshakeError, InvalidInputError) as error:
            return error

    try:
        with ThreadPoolExecutor(len(channels)) as threads:
            answers = list(threads.map(load, channels))
    finally:
        for channel in channels:
            channel.close()
    absent = [answer for answer in answers if isinstance(answer, TeacherUnavailableError)]
    served = [answer for answer in answers if isinstance(answer, pb.LoadModelResponse)]
    refused = [answer for answer in answers if isinstance(answer, HandshakeError | InvalidInputError)]
    if not served:
        raise (refused or absent)[0]
    for refusal in refused:
        log.warning("going on without the replica %s: %s", refusal.details.get("replica", "that says"), refusal.what)
    if absent:
        log.warning("%d of %d teacher replicas do not answer; the others serve %s", len(absent), len(answers), model)
    if len({answer.fingerprint for answer in served}) > 1:
        raise HandshakeError(
            f"the teacher replicas at {address} hold different weights as {model or 'their own model'}: "
            f"{', '.join(sorted({answer.fingerprint for answer in served}))}",
            fix="Let them share one directory, or copy it to each again.",
        )
    return served[0]


def _load(
    channel: grpc.Channel,
    model: str,
    *,
    address: str,
    access: TeacherAccess,
    patience_seconds: float,
    closed: threading.Event,
) -> pb.LoadModelResponse:
    stub = TeacherServiceStub(channel)
    patience = Patience(
        seconds=patience_seconds, address=address, access=access, known_model="", closed=closed, warned=set()
    )
    ends = time.monotonic() + TURN_SECONDS
    waits = False
    while not closed.is_set():
        try:
            answer: pb.LoadModelResponse = stub.LoadModel(pb.LoadModelRequest(model=model), timeout=LOAD_SECONDS)
            return answer
        except grpc.RpcError as error:
            meaning = told_by_server(error)
            if not isinstance(meaning, OverloadedError) or time.monotonic() > ends:
                patience.wait_or_raise(error)
                continue
            if not waits:
                log.info("%s; waiting for a turn", meaning.what)
            waits = True
            closed.wait(float(meaning.details.get("retry_after_seconds", 5.0)))
    raise CancelledError("stopped while waiting for the teacher to load its weights")
