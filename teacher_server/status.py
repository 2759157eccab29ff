"""The error tree as gRPC carries it: google.rpc.Status with an ErrorInfo and, where it helps, RetryInfo."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.contract.errors import OverloadedError, SmoothKDError
from teacher_server.calls import note_status

logger = logging.getLogger(__name__)

DOMAIN = "smoothkd"
_MOST_CHARACTERS = 1000
"""Of one value: trailing metadata beyond 8 KiB in all does not reach every client."""


@asynccontextmanager
async def translated_errors(context: Any) -> AsyncIterator[None]:
    """End the call with the status of whatever error comes out of the block."""
    try:
        yield
    except SmoothKDError as error:
        await abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except grpc.aio.InternalError:
        # What a write raises once nobody is there to read.
        logger.info("a client left before it had its whole answer")
    except Exception as error:
        logger.exception("a request failed")
        unknown = SmoothKDError(f"the teacher failed: {error}", fix="Look at the teacher's log.")
        await abort(context, unknown)


async def abort(context: Any, error: SmoothKDError) -> None:
    """End the call with the status of ``error``, raising as gRPC does."""
    note_status(error.grpc_code)
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


def to_status(error: SmoothKDError) -> status_pb2.Status:
    """The message is what happened; ErrorInfo's metadata holds what to do (``fix``) and the particulars.

    OverloadedError comes with google.rpc.RetryInfo.
    """
    metadata = {key: value[:_MOST_CHARACTERS] for key, value in {**error.details, "fix": error.fix}.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(1000 * float(error.details.get("retry_after_seconds", "1"))))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=code_pb2.Code.Value(error.grpc_code),
        message=error.what[:_MOST_CHARACTERS],
        details=[_packed(detail) for detail in details],
    )


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
