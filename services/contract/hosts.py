"""Hosts and ports that servers bind to."""

import errno
import ipaddress

from services.contract.errors import InvalidInputError, PortInUseError, SmoothKDError


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone; ``host`` comes without its port."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def bind_error(error: OSError, *, host: str, port: int, setting: str) -> SmoothKDError:
    """What a socket's refusal to bind means for whoever chose ``host`` and ``port``; ``setting`` names the port's."""
    if error.errno == errno.EADDRINUSE:
        return PortInUseError(
            f"another process listens on {host}:{port}",
            fix=f"Stop it, or set {setting} to a free port.",
            details={"host": host, "port": str(port)},
        )
    if isinstance(error, PermissionError):
        return InvalidInputError(f"port {port} may not be used", fix=f"Set {setting} to a port from 1024 on.")
    return InvalidInputError(
        f"cannot listen on {host}:{port}: {error.strerror}", fix="Choose an address of this machine."
    )
