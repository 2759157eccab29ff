"""Where things run: addresses, directories and keys, read from the environment (prefix ``SMOOTHKD_``).

Entry points build one ``Settings`` and pass it down; nothing reads the environment elsewhere.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from services.contract.errors import InvalidInputError

Port = Annotated[int, Field(ge=1, le=65535)]


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f'not JSON ({error}); write {{"MODEL": "HOST:PORT"}}') from None


def _as_header(value: SecretStr | None) -> SecretStr | None:
    # Files and secrets often end in a line break, which belongs to no key and which no header can carry.
    text = value.get_secret_value().strip() if value is not None else ""
    if not (text.isascii() and text.isprintable()):
        raise ValueError("holds characters that cannot be sent; keys are printable ASCII")
    return SecretStr(text) if text else None


Key = Annotated[SecretStr | None, AfterValidator(_as_header)]
Addresses = Annotated[dict[str, str], NoDecode, BeforeValidator(_from_json)]


def load_settings() -> "Settings":
    """The settings of this process; InvalidInputError names each variable that cannot be used."""
    try:
        return Settings()
    except ValidationError as error:
        wrong = [f"SMOOTHKD_{str(item['loc'][0]).upper()}: {item['msg']}" for item in error.errors()]
        raise InvalidInputError("; ".join(wrong), fix="Correct or unset these environment variables.") from None


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="SMOOTHKD_", extra="ignore", frozen=True, env_ignore_empty=True)

    data_dir: Path = Field(default=Path(".smoothkd"), description="Database, models, checkpoints, logs.")
    database_url: str = Field(
        default="", description="SQLAlchemy URL; empty means SQLite in data_dir. postgresql+psycopg://user@host/db"
    )
    redis_url: str = Field(
        default="", description="Redis or Valkey that wakes the workers; empty means the embedded one on queue_port."
    )
    queue_port: Port = Field(default=8443, description="Loopback port of the embedded Valkey.")

    api_host: str = "127.0.0.1"
    api_port: Port = 8440
    api_url: str = Field(default="", description="Where clients find the API; empty means http://api_host:api_port.")
    api_key: Key = Field(default=None, description="Bearer key; required unless api_host is loopback.")

    dashboard_host: str = "127.0.0.1"
    dashboard_port: Port = 8441

    teacher_host: str = "127.0.0.1"
    teacher_port: Port = 8442
    teacher_address: str = Field(
        default="",
        description="Where students find the teacher: host:port, several with commas between, or any gRPC target; "
        "tls:// before it means TLS; empty means teacher_host:teacher_port.",
    )
    teacher_addresses: Addresses = Field(
        default={},
        description="Where each of several teachers is: JSON that maps its model to an address; a model that is not in "
        "it is looked for at teacher_address.",
    )
    teacher_token: Key = Field(
        default=None,
        description="Bearer token of the teacher service, on both sides; required off loopback where the teacher does "
        "not demand certificates of students.",
    )
    teacher_tls_certificate: Path | None = Field(
        default=None,
        description="This side's certificate chain (PEM): the server's, or a student's own. On a student any of the "
        "three files means TLS.",
    )
    teacher_tls_key: Path | None = Field(default=None, description="Private key (PEM) of teacher_tls_certificate.")
    teacher_tls_ca: Path | None = Field(
        default=None,
        description="Certificates (PEM) that the other side's must be signed by; on the server it demands them of "
        "students (mutual TLS). Without it a student trusts its own certificate, else the system's authorities.",
    )
    teacher_metrics_port: Port | None = Field(default=None, description="Serve Prometheus metrics of the teacher here.")
    label_cache_dir: Path | None = Field(
        default=None, description="Soft labels that the teacher has computed; empty means data_dir/labels."
    )
    label_cache_gib: float = Field(
        default=20.0, ge=0, allow_inf_nan=False, description="Most disk space of the label cache; 0 keeps no labels."
    )
    judge_key: Key = Field(
        default=None, description="Bearer key of the judge that labels summaries for smoothkd lens train."
    )
    model_server_key: Key = Field(
        default=None, description="Bearer key of the server that writes answers for smoothkd evaluate --server."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="How services log to stderr.")

    lease_seconds: float = Field(default=30.0, gt=0, description="A stage whose worker is silent this long is retried.")
    max_attempts: int = Field(default=3, ge=1, description="Attempts of a stage whose worker or process died.")
    offline: bool = Field(default=False, description="Never contact a model or data hub.")

    def __hash__(self) -> int:
        # What is loaded once is remembered by its settings, and a mapping among them has no hash of its own.
        return hash(self.model_dump_json())

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.absolute() / 'smoothkd.db'}"

    @property
    def resolved_redis_url(self) -> str:
        return self.redis_url or f"redis://127.0.0.1:{self.queue_port}/0"

    @property
    def resolved_api_url(self) -> str:
        return self.api_url or f"http://{self.api_host}:{self.api_port}"

    @property
    def resolved_teacher_address(self) -> str:
        return self.teacher_address or f"{self.teacher_host}:{self.teacher_port}"

    def address_of(self, teacher_model: str) -> str:
        """Where the teacher of this model is looked for."""
        return self.teacher_addresses.get(teacher_model) or self.resolved_teacher_address

    @property
    def runs_dir(self) -> Path:
        """One directory per run: checkpoints, the final model, logs."""
        return self.data_dir / "runs"

    @property
    def resolved_label_cache_dir(self) -> Path:
        return self.label_cache_dir or self.data_dir / "labels"

    @property
    def models_dir(self) -> Path:
        """Converted embedded models."""
        return self.data_dir / "models"
