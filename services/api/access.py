"""Who may use the API: the bearer key, and what holds where there is none."""

import secrets
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from services.api.problems import problem_response
from services.contract.errors import AuthenticationError, InvalidInputError
from services.contract.hosts import is_loopback
from services.contract.settings import Settings

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_bearer = HTTPBearer(auto_error=False, description="The key in SMOOTHKD_API_KEY; none where the API serves loopback.")


class ForeignOriginError(InvalidInputError):
    """The request came through a name that is not this machine's."""

    http_status = 403


def require_safe_binding(settings: Settings) -> None:
    """AuthenticationError when other machines could reach the API without a key."""
    if _key(settings) is None and not is_loopback(settings.api_host):
        raise AuthenticationError(
            f"the API would serve {settings.api_host}, which other machines can reach, without a key",
            fix="Set SMOOTHKD_API_KEY, or bind to this machine alone with SMOOTHKD_API_HOST=127.0.0.1.",
        )


async def require_key(
    request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """AuthenticationError unless the request carries the key, where one is set."""
    key = _key(request.app.state.settings)
    if key is None:
        return
    if given is None:
        raise AuthenticationError(
            "this API wants a key and the request has none",
            fix="Send the header Authorization: Bearer KEY; the command line reads it from SMOOTHKD_API_KEY.",
        )
    # Equal running time for every wrong key, so that its characters cannot be found one by one.
    if not secrets.compare_digest(given.credentials.encode(), key.encode()):
        raise AuthenticationError("the key is not the one that this API wants", fix="Correct SMOOTHKD_API_KEY.")


class LoopbackOnly:
    """Refuses requests that a web page elsewhere sends to an API on loopback that has no key.

    A page may point its own name at 127.0.0.1 (DNS rebinding), which the Host header shows, or post across
    origins, which Origin shows.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings) -> None:
        self.app = app
        self.active = _key(settings) is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.active and scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = HTTPConnection(scope).headers
            origin = headers.get("origin")
            names = [f"//{headers.get('host', '')}"] + ([origin] if origin is not None else [])
            for name in names:
                if not is_loopback(_hostname(name)):
                    error = ForeignOriginError(
                        f"the request came by way of {name.removeprefix('//')!r}, which is not this machine",
                        fix="Open it as 127.0.0.1 or localhost, or set SMOOTHKD_API_KEY.",
                    )
                    await problem_response(error, instance=scope["path"])(scope, receive, send)
                    return
        await self.app(scope, receive, send)


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _key(settings: Settings) -> str | None:
    """None also for an empty key, which is how compose files and shells spell an unset one."""
    return (settings.api_key.get_secret_value() if settings.api_key else "") or None
