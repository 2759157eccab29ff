"""Certificate authorities of the test's own, and files that they signed."""

from datetime import datetime
from pathlib import Path

import trustme


class Authority:
    """Writes its certificates to ``folder``."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._ca = trustme.CA(organization_name=name)
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def files(self, *names: str, not_after: datetime | None = None) -> dict[str, Path]:
        """Settings of a side that calls itself ``names``; the same files every time."""
        stem = self._folder / f"{self._name}-{names[0]}"
        certificate, key = stem.with_suffix(".cert"), stem.with_suffix(".key")
        made = {"teacher_tls_certificate": certificate, "teacher_tls_key": key}
        if certificate.exists():
            return made
        issued = self._ca.issue_cert(*names, not_after=not_after)
        for index, pem in enumerate(issued.cert_chain_pems):
            pem.write_to_path(certificate, append=index > 0)
        issued.private_key_pem.write_to_path(key)
        return made
