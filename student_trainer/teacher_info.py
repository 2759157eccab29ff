"""Who the teacher is, in a student's words."""

from dataclasses import dataclass

from services.contract.sequences import Encoding
from services.contract.soft_labels import WIRE_ENCODINGS
from services.contract.teacher.v1 import teacher_service_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """Who the teacher is. ``vocab_size`` counts real tokens; ``max_length`` is in tokens.

    ``determinism_spread``: nats by which a token's log-probability varies with what is computed beside it.
    ``release``: the smoothkd that it runs, empty for one that is too old to say.
    """

    model: str
    revision: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    hidden_size: int
    max_length: int
    encodings: tuple[Encoding, ...]
    max_k: int
    max_sequences: int
    engine: str
    generates: bool
    determinism_spread: float
    release: str = ""


def teacher_info(response: pb.GetTeacherResponse) -> TeacherInfo:
    """A teacher's answer to GetTeacher, with names instead of numbers."""
    names = {number: name for name, number in WIRE_ENCODINGS.items()}
    return TeacherInfo(
        model=response.model,
        revision=response.revision,
        fingerprint=response.fingerprint,
        tokenizer_fingerprint=response.tokenizer_fingerprint,
        vocab_size=response.vocab_size,
        hidden_size=response.hidden_size,
        max_length=response.max_length,
        encodings=tuple(names[number] for number in response.encodings if number in names),
        max_k=response.max_k,
        max_sequences=response.max_sequences,
        engine=response.engine,
        generates=response.generates,
        determinism_spread=response.determinism_spread,
        release=response.release,
    )
