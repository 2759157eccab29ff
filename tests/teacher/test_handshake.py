from pathlib import Path

import pytest
from transformers import AutoTokenizer

from services.contract.errors import HandshakeError, UnsupportedError
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.models.tiny import make_tiny_model
from student_trainer.handshake import PROBE_TEXTS, require_shared_tokenizer
from student_trainer.teacher_client import TeacherClient


def test_the_teachers_own_tokenizer_passes(tiny_teacher: TeacherClient, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    info = tiny_teacher.handshake(tokenizer)
    assert (info.vocab_size, info.hidden_size, info.max_length) == (len(tokenizer), 32, 256)
    assert info.engine == "transformers"
    assert info.encodings == ("exact", "top_k", "full", "sampled", "projected")
    assert tiny_teacher.handshake(tokenizer, info.model, "top_k") == info


def test_the_mock_engine_tokenizes_as_transformers_does(mock_teacher: TeacherClient, tiny_model: Path) -> None:
    info = mock_teacher.handshake(AutoTokenizer.from_pretrained(tiny_model), str(tiny_model))
    assert info.engine == "mock"


def test_the_directory_may_be_named_in_another_way(mock_teacher: TeacherClient, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    mock_teacher.handshake(tokenizer, f"{tiny_model.parent}/./{tiny_model.name}")


def test_another_model_is_refused(tiny_teacher: TeacherClient, tiny_model: Path) -> None:
    with pytest.raises(HandshakeError, match="not Qwen/Qwen2"):
        tiny_teacher.handshake(AutoTokenizer.from_pretrained(tiny_model), "Qwen/Qwen2.5-32B-Instruct")


def test_another_tokenizer_is_refused_with_every_difference(tiny_teacher: TeacherClient, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, vocab_size=280))
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(HandshakeError) as caught:
        tiny_teacher.handshake(tokenizer)
    size = len(tokenizer)
    # 280 ids bring 21 merges: the first probe text splits otherwise than with the teacher's merges.
    first = PROBE_TEXTS[0]
    student_ids = tokenizer.encode(first, add_special_tokens=False)
    differences = caught.value.details
    assert differences["difference.0"].startswith(f"the student has {size} token ids, the teacher ")
    assert differences["difference.1"] == "the eos token is 0 for the student, 2 for the teacher"
    assert differences["difference.2"].startswith(f"{first!r} becomes {student_ids} for the student, [")
    assert all(line in caught.value.what for line in differences.values())


def test_one_different_probe_is_enough(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    teacher = pb.GetTeacherResponse(
        model="t",
        vocab_size=len(tokenizer),
        special_token_ids={"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id},
        probe_ids=[pb.TokenIds(ids=tokenizer.encode(text, add_special_tokens=False)) for text in PROBE_TEXTS],
    )
    require_shared_tokenizer(tokenizer, teacher, encoding="exact", encodings=["exact"])
    teacher.probe_ids[12].ids[0] += 1
    with pytest.raises(HandshakeError) as caught:
        require_shared_tokenizer(tokenizer, teacher, encoding="exact", encodings=["exact"])
    assert repr(PROBE_TEXTS[12]) in caught.value.what
    assert str(list(teacher.probe_ids[12].ids)) in caught.value.what


def test_an_encoding_that_is_not_offered_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UnsupportedError, match="offers no full labels, only exact, top_k"):
        require_shared_tokenizer(
            AutoTokenizer.from_pretrained(tiny_model),
            pb.GetTeacherResponse(model="t"),
            encoding="full",
            encodings=["exact", "top_k"],
        )
