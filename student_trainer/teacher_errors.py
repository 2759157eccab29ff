"""From gRPC's errors to the error tree."""

from typing import Any, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from services.contract.connection_problems import ConnectionProblem
from services.contract.errors import (
    HandshakeError,
    LimitExceededError,
    SmoothKDError,
    TeacherError,
    TeacherUnavailableError,
    error_class,
)
from services.contract.teacher_channel import REPLICA_KEY


def translate(
    error: grpc.RpcError, *, address: str, problem: ConnectionProblem | None, model: str = ""
) -> SmoothKDError:
    """The error that the server raised where it said so with ErrorInfo, else what the failure of the call means.

    ``problem``: of the connection, where one is known.
    """
    told = told_by_server(error)
    if told is not None:
        return told
    code = error.code()
    fix = (
        f"Start one with: smoothkd teacher --model {model or 'MODEL'}; "
        "or point SMOOTHKD_TEACHER_ADDRESS at a running one."
    )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        details = {"address": address, "grpc": str(error.details())}
        if problem is not None:
            return TeacherUnavailableError(f"the teacher at {address} {problem.what}", fix=problem.fix, details=details)
        return TeacherUnavailableError(f"no teacher answers at {address}", fix=fix, details=details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TeacherUnavailableError(
            f"the teacher at {address} answered nothing in time", fix=fix, details={"address": address}
        )
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in str(error.details()):
        return LimitExceededError(
            f"a message to or from the teacher at {address} is too large: {error.details()}",
            fix="Ask for fewer or shorter sequences, or for fewer labels of each; the same would fail again.",
            details={"address": address},
        )
    return TeacherError(
        f"the teacher at {address} failed: {code.name}: {error.details()}",
        fix="Look at the teacher's log; if it serves another release of smoothkd, update the older one.",
        details={"address": address, "grpc_code": code.name},
    )


def told_by_server(error: grpc.RpcError) -> SmoothKDError | None:
    """The error that the server itself raised and sent with ErrorInfo; None where the call failed otherwise."""
    for detail in _details(error):
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == "smoothkd":
            details = dict(info.metadata)
            fix = details.pop("fix", "")
            kind, what = error_class(info.reason), str(error.details())
            replica = dict(cast(grpc.Call, error).initial_metadata() or ()).get(REPLICA_KEY)
            if replica:
                details["replica"] = str(replica)
                what = f"{what} (replica {details['replica']})" if kind is HandshakeError else what
            return kind(what, fix=fix, details=details)
    return None


def is_worth_another_try(
    error: grpc.RpcError, *, problem: ConnectionProblem | None, progressed: bool, met_before: bool
) -> bool:
    """Whether the same request may succeed later: the teacher is away, or ran out of time while it was answering.

    Certificates that do not fit stay so, unless the teacher has been reached before: then one replica of several is
    wrong while the others are away.
    """
    code = error.code()
    if problem is not None and problem.lasting and not met_before:
        return False
    # A teacher that stops cancels its streams; the client's own cancellation never comes back as an error.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return True
    return progressed and code is grpc.StatusCode.DEADLINE_EXCEEDED


def seconds_told_to_wait(error: grpc.RpcError) -> float | None:
    """When a teacher that is overloaded wants to be asked again; None for every other failure."""
    for detail in _details(error):
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


def _details(error: grpc.RpcError) -> list[Any]:
    """Of the google.rpc.Status that came with the error; empty where none did."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:
        return []
    return list(status.details) if status is not None else []
