"""Certificates and keys of the teacher service, read and checked before anything is served or asked.

The settings have the same names on both sides. On the server, certificate and key turn TLS on and ``ca`` demands
certificates of students. On a student, any of them turns TLS on, and certificate and key are its own.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from services.contract.errors import InvalidInputError
from services.contract.settings import Settings

_CERTIFICATE = "SMOOTHKD_TEACHER_TLS_CERTIFICATE"
_KEY = "SMOOTHKD_TEACHER_TLS_KEY"
_CA = "SMOOTHKD_TEACHER_TLS_CA"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A private key and the certificate chain that belongs to it, both PEM."""

    key: bytes = field(repr=False)
    certificates: bytes


def read_identity(settings: Settings) -> Identity | None:
    """This side's own key and certificates; None where none are set.

    InvalidInputError when a file cannot be read, is no PEM, is out of date, or the key is another certificate's.
    """
    certificate, key = settings.teacher_tls_certificate, settings.teacher_tls_key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InvalidInputError(
            f"{_KEY if key is None else _CERTIFICATE} is not set, but {_CERTIFICATE if key is None else _KEY} is",
            fix="A certificate and its key go together: set both, or neither.",
        )
    certificates, secret = _read(certificate, setting=_CERTIFICATE), _read(key, setting=_KEY)
    _check_pair(certificates, secret, certificate=certificate, key=key)
    return Identity(key=secret, certificates=certificates)


def read_authorities(settings: Settings) -> bytes | None:
    """The certificates (PEM) that the other side's must be signed by; None where none are set."""
    if settings.teacher_tls_ca is None:
        return None
    pem = _read(settings.teacher_tls_ca, setting=_CA)
    _check_dates(pem, path=settings.teacher_tls_ca, setting=_CA)
    return pem


def _read(path: Path, *, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{setting}: {path} cannot be read: {error.strerror}", fix="Correct the path or its permissions."
        ) from None


def _check_pair(certificates: bytes, secret: bytes, *, certificate: Path, key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    leaf = _check_dates(certificates, path=certificate, setting=_CERTIFICATE)
    try:
        public = load_pem_private_key(secret, password=None).public_key()
    except TypeError:
        raise InvalidInputError(
            f"{_KEY}: {key} is encrypted", fix="Save the key without a passphrase, readable by this service alone."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidInputError(f"{_KEY}: {key} holds no private key in PEM", fix="Convert it to PEM.") from None
    if public != leaf.public_key():
        raise InvalidInputError(
            f"the key {key} does not belong to the certificate {certificate}",
            fix=f"Point {_CERTIFICATE} and {_KEY} at a pair; in a chain the server's own certificate comes first.",
        )


def _check_dates(pem: bytes, *, path: Path, setting: str):  # type: ignore[no-untyped-def]
    """The first certificate; every certificate of the file must be valid now."""
    from cryptography import x509

    try:
        chain = x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidInputError(
            f"{setting}: {path} holds no certificate in PEM", fix="PEM files begin with -----BEGIN CERTIFICATE-----."
        ) from None
    now = datetime.now(UTC)
    for each in chain:
        if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
            raise InvalidInputError(
                f"{setting}: a certificate in {path} ({each.subject.rfc4514_string()}) is valid from "
                f"{each.not_valid_before_utc:%Y-%m-%d %H:%M} to {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, "
                "and not now",
                fix="Renew it, and check this machine's clock.",
            )
    return chain[0]
