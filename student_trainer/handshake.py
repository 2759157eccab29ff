"""Does the student read and write the very tokens that the teacher does?"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from services.contract.errors import HandshakeError, UnsupportedError
from services.contract.sequences import Encoding
from services.contract.teacher.v1 import teacher_service_pb2 as pb

PROBE_TEXTS = (
    "The harbour master said on Tuesday that 14 ferries had been repaired.",
    " leading and trailing blanks ",
    "two  blanks,   three blanks,\ttab,\n\nempty line\r\n",
    "0123456789 3.14159 1,000,000 2026-11-23 0x1F ½ ²",
    "don't, they'll, it's; e.g. U.S.A. — “quoted” …",
    "Smørrebrød, naïve, façade, Größe, señor, Łódź",
    "cafe\u0301 and caf\u00e9 look alike",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "Η γρήγορη αλεπού πηδά πάνω από το σκυλί.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول",
    "השועל החום המהיר קופץ מעל הכלב העצלן",
    "敏捷的棕色狐狸跳过了懒狗。",
    "素早い茶色の狐がのろまな犬を飛び越える。",
    "재빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "def f(x):\n    return {k: v ** 2 for k, v in x.items() if v != 0}  # square\n",
    "SELECT * FROM runs WHERE alpha >= 0.1 AND state = 'failed';",
    "https://example.org/a_b/c?d=e&f=%20#g user@example.org C:\\dir\\file.txt",
    "👩‍🔬 found 🦊 at 🇳🇴 👍🏽",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "[INST] <<SYS>> <s> </s> <|begin_of_text|> <|eot_id|> <start_of_turn> <pad> <unk>",
)

# How pad and unk are set decides no label: padding is masked by length.
_COMPARED_ROLES = ("bos", "eos")


class StudentTokenizer(Protocol):
    """The part of a transformers tokenizer that the comparison needs, with ``bos_token_id`` and ``eos_token_id``."""

    def get_vocab(self) -> Mapping[str, int]: ...

    def encode(self, text: str, **options: Any) -> list[int]: ...


def require_shared_tokenizer(
    tokenizer: StudentTokenizer,
    teacher: pb.GetTeacherResponse,
    *,
    encoding: Encoding,
    encodings: Sequence[Encoding],
) -> None:
    """HandshakeError lists every difference in vocabulary size, special tokens and the ids of PROBE_TEXTS.

    UnsupportedError where the teacher does not offer ``encoding``.
    """
    if encoding not in encodings:
        raise UnsupportedError(
            f"the teacher {teacher.model} offers no {encoding} labels, only {', '.join(encodings)}",
            fix="Choose one of these as distillation.labels.encoding.",
        )
    differences = [
        *_vocabulary_difference(tokenizer, teacher),
        *_special_token_differences(tokenizer, teacher),
        *_probe_difference(tokenizer, teacher),
    ]
    if differences:
        raise HandshakeError(
            f"the student's tokenizer is not that of the teacher {teacher.model}: {'; '.join(differences)}",
            fix="Soft labels need one tokenizer on both sides: choose teacher and student of one model family, or set "
            "distillation.cross_tokenizer: uld to learn from the teacher's sorted probabilities.",
            details={f"difference.{index}": line for index, line in enumerate(differences)},
        )


def _vocabulary_difference(tokenizer: StudentTokenizer, teacher: pb.GetTeacherResponse) -> list[str]:
    student_size = max(tokenizer.get_vocab().values()) + 1
    if student_size == teacher.vocab_size:
        return []
    return [f"the student has {student_size} token ids, the teacher {teacher.vocab_size}"]


def _special_token_differences(tokenizer: StudentTokenizer, teacher: pb.GetTeacherResponse) -> list[str]:
    differences = []
    for role in _COMPARED_ROLES:
        student_id = getattr(tokenizer, f"{role}_token_id", None)
        teacher_id = teacher.special_token_ids.get(role, None)
        if student_id != teacher_id:
            differences.append(f"the {role} token is {student_id} for the student, {teacher_id} for the teacher")
    return differences


def _probe_difference(tokenizer: StudentTokenizer, teacher: pb.GetTeacherResponse) -> list[str]:
    if len(teacher.probe_ids) != len(PROBE_TEXTS):
        return [f"the teacher tokenized {len(teacher.probe_ids)} of {len(PROBE_TEXTS)} probe texts"]
    for text, answered in zip(PROBE_TEXTS, teacher.probe_ids, strict=True):
        student_ids = list(tokenizer.encode(text, add_special_tokens=False))
        teacher_ids = list(answered.ids)
        if student_ids != teacher_ids:
            return [f"{text!r} becomes {student_ids} for the student, {teacher_ids} for the teacher"]
    return []
