"""Why no call reaches a teacher: what gRPC's words about a failed connection mean, and what to do about it."""

import re
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import unquote

from services.contract.teacher_channel import TeacherAccess

_PROBE_SECONDS = 3.0
_FAILED_ADDRESS = re.compile(r"ipv[46]:\[?(?P<host>[0-9A-Fa-f:.]+)\]?:(?P<port>\d+): ")


@dataclass(frozen=True, kw_only=True)
class ConnectionProblem:
    """``what`` the teacher does, and what to do. ``lasting``: waiting does not help."""

    words: tuple[str, ...] = ()
    what: str
    fix: str
    lasting: bool = True


def connection_problem(
    details: str | None, *, address: str, access: TeacherAccess | None = None
) -> ConnectionProblem | None:
    """What ``details``, gRPC's own, mean for a call to ``address``; None where they say no more than that it failed.

    With ``access`` a teacher that hangs up is asked once more, in a connection of its own, whether it does so because
    it wants TLS or a certificate: gRPC does not tell that from a teacher that is being killed.
    """
    details = details or ""
    problem = next((each for each in _PROBLEMS if all(word in details for word in each.words)), None)
    if access is None or problem not in (_HANGS_UP, _NO_TEACHER):
        return problem
    failed = _FAILED_ADDRESS.search(unquote(details))
    if failed is None:
        return problem
    host, port = failed["host"], int(failed["port"])
    if not access.encrypts(address):
        return _WANTS_TLS if _handshake(host, port, access=access) else problem
    # gRPC has got through the handshake of TLS 1.3, in which a student's certificate is judged only afterwards and in
    # silence. In that of TLS 1.2 it is judged within.
    if problem is not _HANGS_UP or _handshake(host, port, access=access, within=True) is not False:
        return problem
    return _WANTS_CERTIFICATE if access.own_files is None else _WANTS_OTHER_CERTIFICATE


def _handshake(host: str, port: int, *, access: TeacherAccess, within: bool = False) -> bool | None:
    """Whether a TLS handshake with this side's certificate succeeds there; None where nobody can be reached.

    ``within``: with a TLS that judges certificates before it ends. The teacher's own certificate is not looked at.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if within:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if access.own_files is not None:
        context.load_cert_chain(*access.own_files)
    try:
        connection = socket.create_connection((host, port), timeout=_PROBE_SECONDS)
    except OSError:
        return None
    try:
        with connection, context.wrap_socket(connection):
            return True
    except TimeoutError:
        return None
    except OSError:
        return False


STARTING = ConnectionProblem(
    words=("backend unhealthy",),
    what="is starting or stopping",
    fix="Wait until it serves; its log says how far it is.",
    lasting=False,
)
_HANGS_UP = ConnectionProblem(
    # "Handshake read failed (Socket closed)" is another matter: no TLS came about.
    words=("last error", ": Socket closed"),
    what="hangs up before a call can be made, as one does that wants TLS or a student's certificate",
    fix="Where the teacher uses TLS, set SMOOTHKD_TEACHER_TLS_CA here; where it demands certificates of students, "
    "SMOOTHKD_TEACHER_TLS_CERTIFICATE and _KEY too, signed by an authority that it trusts.",
    # So does one that is just being killed.
    lasting=False,
)
_NO_TEACHER = ConnectionProblem(
    words=("Expected SETTINGS frame",),
    what="is none: something else listens there",
    fix="Correct SMOOTHKD_TEACHER_ADDRESS; teachers listen on port 8442, or where SMOOTHKD_TEACHER_PORT says.",
)
_WANTS_TLS = ConnectionProblem(
    what="speaks TLS, and this side does not",
    fix="Set SMOOTHKD_TEACHER_TLS_CA on this side to the certificate of the authority that signed the teacher's, or "
    "write tls:// before the address where the system trusts it.",
)
_WANTS_CERTIFICATE = ConnectionProblem(
    what="hangs up: it demands certificates of students, and this side shows none",
    fix="Set SMOOTHKD_TEACHER_TLS_CERTIFICATE and _KEY on this side, signed by an authority that the teacher trusts.",
)
_WANTS_OTHER_CERTIFICATE = ConnectionProblem(
    what="hangs up: it does not accept this side's certificate",
    fix="Have SMOOTHKD_TEACHER_TLS_CERTIFICATE signed by an authority that the teacher trusts: its own "
    "SMOOTHKD_TEACHER_TLS_CA.",
)
_PROBLEMS = (
    STARTING,
    ConnectionProblem(
        words=("CERTIFICATE_VERIFY_FAILED", "expired"),
        what="shows a certificate that has expired",
        fix="Renew the teacher's certificate and start it again.",
    ),
    ConnectionProblem(
        words=("CERTIFICATE_VERIFY_FAILED",),
        what="shows a certificate that no authority trusted here has signed",
        fix="Set SMOOTHKD_TEACHER_TLS_CA on this side to the certificate of the authority that signed the teacher's.",
    ),
    ConnectionProblem(
        words=("Hostname Verification",),
        what="shows a certificate for another name",
        fix="Ask for the teacher by a name in its certificate, or issue one that names this host or address.",
    ),
    ConnectionProblem(
        words=("WRONG_VERSION_NUMBER",),
        what="speaks no TLS, but this side wants it",
        fix="Start the teacher with SMOOTHKD_TEACHER_TLS_CERTIFICATE and _KEY, or unset tls:// and the certificates "
        "here.",
    ),
    _HANGS_UP,
    _NO_TEACHER,
)
