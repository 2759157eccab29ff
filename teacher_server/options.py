"""What ``smoothkd teacher`` is told to serve."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from services.contract.errors import InvalidInputError
from teacher_server.admission import Limits
from teacher_server.vllm_options import VllmOptions

EngineName = Literal["auto", "transformers", "vllm", "mock"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """``model``: a directory or hub id; for the mock engine also a vocabulary size in digits. ``engine`` auto is vLLM
    where it is installed beside a GPU, else transformers; ``vllm`` only counts for that engine.

    ``dtype`` auto computes in float32 on a CPU and in the checkpoint's own type on a GPU. ``label_dtype`` is the
    type in which hidden states travel: auto is the computing type when that has 16 bits, else bfloat16; float32 is
    exact at twice the bytes. ``host`` and ``port`` default to the settings'; port 0 takes a free one.
    ``base`` names the model of a LoRA adapter given as ``model``. Other weights may be loaded later, from directories
    below the data directory and ``allow_models_below``. ``mock_seconds`` is how long the mock engine pretends to
    compute each sequence; ``limits`` is what one client and all of them may have under way. ``metrics_port`` defaults
    to the settings'; ``drain_seconds`` is how long a stopping server lets calls under way finish. Code that
    comes with a model runs only with ``trust_remote_code``. InvalidInputError for a word that is none of those allowed.
    """

    model: str
    revision: str | None = None
    base: str | None = None
    allow_models_below: tuple[Path, ...] = ()
    engine: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    label_dtype: str = "auto"
    host: str | None = None
    port: int | None = None
    mock_seconds: float = 0.0
    metrics_port: int | None = None
    drain_seconds: float = 20.0
    trust_remote_code: bool = False
    vllm: VllmOptions = field(default_factory=VllmOptions)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _require(self.engine, get_args(EngineName), name="engine")
        _require(self.dtype, get_args(DtypeName), name="dtype")
        _require(self.label_dtype, get_args(DtypeName), name="label_dtype")
        if self.max_length is not None and self.max_length < 2:
            raise InvalidInputError(f"max_length {self.max_length} leaves nothing to predict", fix="Use at least 2.")

    def resolved_label_dtype(self, weights_dtype: str) -> DtypeName:
        """The type of hidden states on the wire for weights held in ``weights_dtype``."""
        if self.label_dtype != "auto":
            return cast(DtypeName, self.label_dtype)
        return cast(DtypeName, weights_dtype) if weights_dtype in ("bfloat16", "float16") else "bfloat16"


def _require(value: str, allowed: tuple[str, ...], *, name: str) -> None:
    if value not in allowed:
        raise InvalidInputError(f"{name} {value!r} is unknown", fix=f"Choose one of {', '.join(allowed)}.")
