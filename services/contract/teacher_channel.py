"""The way to the teacher: where it is, how it is known, what it is shown.

Every part that asks a teacher (students, the API's preflight, health checks) opens its channel here.
"""

import ipaddress
import json
import logging
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from services.contract.errors import InvalidInputError, TeacherUnavailableError
from services.contract.settings import Settings
from services.contract.soft_labels import MAX_MESSAGE_BYTES
from services.contract.teacher.v1.teacher_service_pb2_grpc import TeacherServiceStub
from services.contract.tls import read_authorities, read_identity

logger = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str]]

TLS_PREFIX = "tls://"
REPLICA_KEY = "smoothkd-replica"
"""Initial metadata of every answer: which of several replicas gives it, as its own host name and port."""
CLIENT_KEY = "smoothkd-client"
"""Metadata in which a client names itself; the teacher shares its time fairly between those named differently."""
SERVICE_NAME = "teacher.v1.TeacherService"
_HOST_PORT = re.compile(r"(?:\[(?P<bracketed>[0-9A-Fa-f:.%]+)\]|(?P<host>[^:/\[\]\s]+)):(?P<port>\d{1,5})")
_GRPC_SCHEMES = ("ipv4:", "ipv6:", "dns:", "unix:", "unix-abstract:", "vsock:", "xds:")

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A teacher that restarts is back within seconds; the channel's own backoff would grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, kw_only=True)
class TeacherAccess:
    """``token`` is sent with every call where it is not empty; ``tls`` None speaks plain text to plain addresses.

    ``own_files``: certificate and key that ``tls`` shows, for finding out why a teacher refuses them.
    """

    token: str = field(default="", repr=False)
    tls: grpc.ChannelCredentials | None = None
    own_files: tuple[Path, Path] | None = None

    def encrypts(self, address: str) -> bool:
        """Whether what is said to the teacher at ``address`` goes through TLS."""
        return self.tls is not None or address.startswith(TLS_PREFIX)


def teacher_access(settings: Settings) -> TeacherAccess:
    """What this process shows and trusts. InvalidInputError for certificates that cannot be used.

    It trusts teacher_tls_ca; without that its own certificate, which is the server's where both share their settings.
    """
    identity = read_identity(settings)
    authorities = read_authorities(settings)
    token = settings.teacher_token.get_secret_value() if settings.teacher_token else ""
    if identity is None and authorities is None:
        return TeacherAccess(token=token)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=authorities or (identity.certificates if identity else None),
        private_key=identity.key if identity else None,
        certificate_chain=identity.certificates if identity else None,
    )
    certificate, key = settings.teacher_tls_certificate, settings.teacher_tls_key
    own_files = (certificate, key) if certificate is not None and key is not None else None
    return TeacherAccess(token=token, tls=credentials, own_files=own_files)


def open_teacher_channel(
    address: str,
    *,
    access: TeacherAccess,
    balanced: bool = True,
    authority: str = "",
    metadata: Callable[[], Metadata] | None = None,
) -> grpc.Channel:
    """A channel to ``address``: host:port, several with commas between, or a gRPC target, with or without tls://.

    A balanced channel shares its calls between the replicas that say they serve (gRPC's round_robin and health
    watch); one that is not balanced asks the first that answers, serving or not. ``authority``: the name that a
    numeric target's certificate bears. ``metadata`` is asked for more of it at each call. InvalidInputError for an
    address that is none.
    """
    encrypted = access.encrypts(address)
    address = address.removeprefix(TLS_PREFIX)
    options: list[tuple[str, Any]] = [*_OPTIONS, ("grpc.service_config", _service_config(balanced=balanced))]
    replicas = _listed_replicas(address)
    target = address
    if replicas:
        target = _numeric_target(replicas)
        # A list has no name of its own; replicas behind TLS share the first one's.
        authority = authority or replicas[0][0]
    if authority:
        options.append(("grpc.default_authority", authority))
    channel = (
        grpc.secure_channel(target, access.tls or grpc.ssl_channel_credentials(), options=options)
        if encrypted
        else grpc.insecure_channel(target, options=options)
    )
    # Registers the methods with gRPC, which else does so at a method's first call, and crashes where another thread has
    # closed the channel by then.
    TeacherServiceStub(channel)
    token = (("authorization", f"Bearer {access.token}"),) if access.token else ()

    def everything() -> Metadata:
        return (*token, *(metadata() if metadata is not None else ()))

    return grpc.intercept_channel(channel, _AddMetadata(everything))


def open_replica_channels(address: str, *, access: TeacherAccess) -> list[grpc.Channel]:
    """A channel to each machine behind ``address``, for what every replica has to be told by itself."""
    prefix = TLS_PREFIX if address.startswith(TLS_PREFIX) else ""
    target, authority = address.removeprefix(TLS_PREFIX), ""
    single = _HOST_PORT.fullmatch(target.removeprefix("dns:///"))
    replicas = [(single["bracketed"] or single["host"], int(single["port"]))] if single else _listed_replicas(target)
    if replicas:
        target, authority = _numeric_target(replicas), replicas[0][0]
    scheme, _, machines = target.partition(":")
    if scheme not in ("ipv4", "ipv6"):
        return [open_teacher_channel(address, access=access, balanced=False)]
    return [
        open_teacher_channel(f"{prefix}{scheme}:{machine}", access=access, balanced=False, authority=authority)
        for machine in machines.split(",")
    ]


def _service_config(*, balanced: bool) -> str:
    if not balanced:
        return json.dumps({"loadBalancingConfig": [{"pick_first": {}}]})
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            # A replica that loads its model, or drains, gets no calls.
            "healthCheckConfig": {"serviceName": SERVICE_NAME},
        }
    )


def _listed_replicas(address: str) -> list[tuple[str, int]]:
    """Host and port of each replica in a list with commas; empty for a single address and for gRPC targets.

    InvalidInputError for what is none of these: gRPC would look it up for ever.
    """
    if address.startswith(_GRPC_SCHEMES):
        return []
    replicas = []
    for part in address.split(","):
        match = _HOST_PORT.fullmatch(part.strip())
        if match is None or not 0 < int(match["port"]) < 65536:
            raise InvalidInputError(
                f"{part.strip()!r} in the teacher's address is not host:port",
                fix="Write SMOOTHKD_TEACHER_ADDRESS as host:port, or host:port,host:port for several, with tls:// "
                "before it for TLS; IPv6 addresses as [::1]:8442.",
            )
        replicas.append((match["bracketed"] or match["host"], int(match["port"])))
    return replicas if len(replicas) > 1 else []


def _numeric_target(replicas: Iterable[tuple[str, int]]) -> str:
    """gRPC takes a list of addresses, but not one of names; names are looked up once, here."""
    found: dict[tuple[str, int], None] = {}
    unknown = []
    for host, port in replicas:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            unknown.append(f"{host} ({error.strerror or error})")
            continue
        # One way to each machine: counted twice it would get twice its share.
        families = {info[0] for info in infos}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        found.update(dict.fromkeys((str(info[4][0]), port) for info in infos if info[0] == family))
    if unknown and not found:
        raise TeacherUnavailableError(
            f"no host of the teacher's address is known: {', '.join(unknown)}",
            fix="Correct SMOOTHKD_TEACHER_ADDRESS, or check this machine's name service.",
        )
    if unknown:
        logger.warning("going on without the teacher replicas that no name service knows: %s", ", ".join(unknown))
    if all(ipaddress.ip_address(host).version == 4 for host, _ in found):
        return "ipv4:" + ",".join(f"{host}:{port}" for host, port in found)
    # One list holds one family: IPv4 addresses go in their IPv6 spelling.
    return "ipv6:" + ",".join(f"[{_as_ipv6(host)}]:{port}" for host, port in found)


def _as_ipv6(host: str) -> str:
    return f"::ffff:{host}" if ipaddress.ip_address(host.partition("%")[0]).version == 4 else host.replace("%", "%25")


class _AddMetadata(
    grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor, grpc.StreamUnaryClientInterceptor
):
    """Adds to the metadata of every call; call credentials would not travel without TLS."""

    def __init__(self, more: Callable[[], Metadata]) -> None:
        self._more = more

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._extended(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._extended(client_call_details), request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._extended(client_call_details), request_iterator)

    def _extended(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), *self._more()))
