"""Every way in which a request can fail, answered as problem details (RFC 9457)."""

import logging
import uuid

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contract.errors import InvalidInputError, NotFoundError, SmoothKDError
from services.contract.problems import MEDIA_TYPE, describe

log = logging.getLogger(__name__)


def answer_with_problems(app: FastAPI) -> None:
    """Makes ``app`` answer the platform's errors, its framework's, and unknown ones alike."""

    @app.exception_handler(SmoothKDError)
    async def _known(request: Request, error: SmoothKDError) -> Response:
        return problem_response(error, instance=request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        lines = [
            f"{_place(item['loc'])}: {item['msg'].removeprefix('Value error, ')}, not {item['input']!r:.80}"
            for item in error.errors()
        ]
        invalid = InvalidInputError(
            "; ".join(lines),
            fix="Correct these parameters; /v1/docs lists what they take.",
            details={f"error.{index}": line for index, line in enumerate(lines)},
        )
        return problem_response(invalid, instance=request.url.path)

    @app.exception_handler(HTTPException)
    async def _framework(request: Request, error: HTTPException) -> Response:
        response = problem_response(
            _framework_error(request, error), instance=request.url.path, status=error.status_code
        )
        response.headers.update(error.headers or {})
        return response


def problem_response(error: SmoothKDError, *, instance: str, status: int | None = None) -> Response:
    """The answer to the request for ``instance`` that met ``error``."""
    problem = describe(error, instance=instance, status=status)
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else None
    return Response(problem.model_dump_json(), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


class UnknownErrors:
    """Answers an exception that nothing else did: the traceback goes to the log, its number to the client."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception:
            if started:
                raise
            number = uuid.uuid4().hex[:12]
            log.exception("%s: %s %s failed", number, scope["method"], scope["path"])
            error = SmoothKDError(
                f"the API met an error that it does not know (number {number})",
                fix="Look for this number in the API's log and report what stands there.",
                details={"number": number},
            )
            await problem_response(error, instance=scope["path"])(scope, receive, send)


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location)


def _framework_error(request: Request, error: HTTPException) -> SmoothKDError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return NotFoundError(f"there is no {where}", fix="/v1/docs lists every path.")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return InvalidInputError(f"there is no {where}", fix=f"Use {allowed} on this path.")
    if error.status_code < 500:
        return InvalidInputError(f"{where}: {error.detail}")
    return SmoothKDError(f"{where}: {error.detail}")
