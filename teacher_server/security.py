"""Who may use the teacher: TLS, mutual TLS, bearer tokens."""

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from grpc_health.v1 import health

from services.contract.errors import AuthenticationError, InvalidInputError
from services.contract.hosts import is_loopback
from services.contract.settings import Settings
from services.contract.tls import read_authorities, read_identity
from teacher_server.status import abort

logger = logging.getLogger(__name__)


def require_safe_binding(settings: Settings, *, host: str) -> None:
    """AuthenticationError when other machines could use the teacher without a token or a certificate.

    Warns when a token would cross the network in plain text.
    """
    if is_loopback(host):
        return
    encrypted = settings.teacher_tls_certificate is not None
    if not teacher_token(settings) and not (encrypted and settings.teacher_tls_ca is not None):
        raise AuthenticationError(
            f"the teacher would serve {host}, which other machines can reach, to anybody",
            fix="Set SMOOTHKD_TEACHER_TOKEN, or demand certificates of students with SMOOTHKD_TEACHER_TLS_CERTIFICATE, "
            "_KEY and _CA, or bind to this machine alone with SMOOTHKD_TEACHER_HOST=127.0.0.1.",
        )
    if not encrypted:
        logger.warning(
            "serving %s without encryption: token and labels can be read on the way; set "
            "SMOOTHKD_TEACHER_TLS_CERTIFICATE and SMOOTHKD_TEACHER_TLS_KEY, or keep this port in a private network",
            host,
        )


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS, demanding certificates of students where teacher_tls_ca is set; None for plain text.

    InvalidInputError for files that cannot be used.
    """
    identity, authorities = read_identity(settings), read_authorities(settings)
    if identity is None:
        if authorities is not None:
            raise InvalidInputError(
                "SMOOTHKD_TEACHER_TLS_CA is set, but the teacher has no certificate of its own",
                fix="Set SMOOTHKD_TEACHER_TLS_CERTIFICATE and SMOOTHKD_TEACHER_TLS_KEY too, or unset it.",
            )
        return None
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificates)],
        root_certificates=authorities,
        require_client_auth=authorities is not None,
    )


def teacher_token(settings: Settings) -> str:
    """Empty where no token is demanded, as also where the variable is set to nothing."""
    return settings.teacher_token.get_secret_value() if settings.teacher_token else ""


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Demands ``authorization: Bearer TOKEN`` of every call but those to the health service, which probes need."""

    def __init__(self, token: str) -> None:
        self._expected = token.encode()
        self._missing = _refusal(
            AuthenticationError(
                "this teacher wants a token and the call has none",
                fix="Set SMOOTHKD_TEACHER_TOKEN to the teacher's own on every student, worker and API.",
            )
        )
        self._wrong = _refusal(
            AuthenticationError(
                "the token is not the one that this teacher wants", fix="Correct SMOOTHKD_TEACHER_TOKEN."
            )
        )

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        if handler_call_details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return await continuation(handler_call_details)
        given = dict(handler_call_details.invocation_metadata).get("authorization")
        if given is None:
            return self._missing
        scheme, _, token = str(given).partition(" ")
        # Equal running time for every wrong token, so that its characters cannot be found one by one.
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._expected):
            return self._wrong
        return await continuation(handler_call_details)


def _refusal(error: AuthenticationError) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    # The call's kind does not matter: it ends before a message is read or sent.
    return grpc.stream_stream_rpc_method_handler(refuse)
