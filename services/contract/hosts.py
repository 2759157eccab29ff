"""Hosts that servers bind to."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone; ``host`` comes without its port."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
