"""Requests, read and checked as a whole before anything is computed for them."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from services.contract.errors import (
    HandshakeError,
    InvalidInputError,
    LimitExceededError,
    UnsupportedError,
)
from services.contract.sequences import DecodeOptions, Encoding, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import MAX_MESSAGE_BYTES, WIRE_ENCODINGS
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from services.contract.tensors import Array
from services.models.directory import same_directory
from teacher_server.engine import MAX_DRAWS, MAX_K, TeacherCard
from teacher_server.sizes import label_bytes
from teacher_server.student_heads import StudentHeads

MAX_SEQUENCES = 1024
MAX_ID_CHARACTERS = 200
MAX_PROBE_TEXTS = 64
MAX_PROBE_CHARACTERS = 4096
MAX_STOP_TOKENS = 64
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
"""Beyond these, logits divided by the temperature overflow or no longer differ."""

_ENVELOPE_BYTES = 64 * 1024
_ENCODINGS: dict[int, Encoding] = {number: name for name, number in WIRE_ENCODINGS.items()}


def check_model(model: str, fingerprint: str, card: TeacherCard) -> None:
    """HandshakeError when the request is meant for another teacher; empty names match any.

    A fingerprint says more than a name: the same weights have several where directories are mounted.
    """
    if model and fingerprint != card.fingerprint and model != card.model and not same_directory(model, card.model):
        raise HandshakeError(
            f"this teacher serves {card.model}, not {model}",
            fix=f"Start the teacher with --model {model}, or name {card.model} as teacher.model.",
            details={"served": card.model, "asked": model[:MAX_ID_CHARACTERS]},
        )
    if fingerprint and fingerprint != card.fingerprint:
        raise HandshakeError(
            f"the teacher's weights or tokenizer have the fingerprint {card.fingerprint}, not {fingerprint[:64]}",
            fix="The teacher has gone over to other weights; start the run again, or load the former ones.",
            details={"served": card.fingerprint, "asked": fingerprint[:64]},
        )


def check_probe_texts(texts: Iterable[str]) -> None:
    """LimitExceededError for too many or too long texts."""
    texts = list(texts)
    if len(texts) > MAX_PROBE_TEXTS or any(len(text) > MAX_PROBE_CHARACTERS for text in texts):
        raise LimitExceededError(
            f"at most {MAX_PROBE_TEXTS} probe texts of {MAX_PROBE_CHARACTERS} characters are tokenized at a time",
            fix="Send fewer or shorter texts.",
        )


def read_score_request(
    request: pb.ScoreSequencesRequest, card: TeacherCard, *, student_heads: StudentHeads[Any], state_bytes: int
) -> tuple[list[TokenSequence], LabelOptions]:
    """The sequences and how to label them; the first mistake ends the whole request.

    Their numbers stay in the request's own message, at 4 bytes each: they may wait for a slow reader.

    StudentHeadMissingError for projected labels whose head is not in ``student_heads``. ``state_bytes``: of one
    component of a hidden state on the wire.
    """
    check_model(request.model, request.fingerprint, card)
    options = _read_label_options(request.options)
    student_hidden_size = student_heads.width(options.student_head) if options.encoding == "projected" else 0
    _check_ids([sequence.id for sequence in request.sequences])
    sequences = []
    for message in request.sequences:
        token_ids = _read_token_ids(message.token_ids, owner=f"sequence {message.id!r}", card=card)
        positions = np.array(message.label_positions, dtype=np.int64)
        _check_positions(positions, length=len(token_ids), sequence_id=message.id)
        size = label_bytes(
            options,
            positions=len(positions),
            vocab_size=card.vocab_size,
            hidden_size=card.hidden_size,
            student_hidden_size=student_hidden_size,
            state_bytes=state_bytes,
        )
        if size > MAX_MESSAGE_BYTES - _ENVELOPE_BYTES:
            raise LimitExceededError(
                f"the {options.encoding} labels of sequence {message.id!r} would take {size} bytes; "
                f"a message holds {MAX_MESSAGE_BYTES}",
                fix="Ask for fewer positions at a time, or for exact or top_k labels.",
            )
        sequences.append(
            TokenSequence(id=message.id, token_ids=message.token_ids, label_positions=message.label_positions)
        )
    return sequences, options


def read_generate_request(
    request: pb.GenerateSequencesRequest, card: TeacherCard
) -> tuple[list[Prompt], DecodeOptions]:
    """The prompts and how to continue them; the first mistake ends the whole request."""
    check_model(request.model, request.fingerprint, card)
    if not card.generates:
        raise UnsupportedError(
            f"this teacher ({card.engine}) does not generate", fix="Start it with smoothkd teacher --generation."
        )
    if request.max_new_tokens < 1:
        raise InvalidInputError("max_new_tokens is 0", fix="Ask for at least 1 token.")
    if request.temperature != 0 and not MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE:
        raise InvalidInputError(
            f"temperature {request.temperature} is neither 0 nor from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            fix="0 is greedy.",
        )
    if len(request.stop_token_ids) > MAX_STOP_TOKENS:
        raise LimitExceededError(f"more than {MAX_STOP_TOKENS} stop tokens", fix="Name fewer.")
    stop_ids = np.array(request.stop_token_ids, dtype=np.int64)
    _check_vocabulary(stop_ids, owner="stop_token_ids", card=card)
    _check_ids([prompt.id for prompt in request.prompts])
    prompts = []
    for message in request.prompts:
        owner = f"prompt {message.id!r}"
        token_ids = _read_token_ids(message.token_ids, owner=owner, card=card)
        if len(token_ids) + request.max_new_tokens > card.max_length:
            raise LimitExceededError(
                f"{owner} has {len(token_ids)} tokens; with {request.max_new_tokens} new ones that is beyond the "
                f"teacher's {card.max_length}",
                fix="Shorten the prompt or lower max_new_tokens.",
            )
        prompts.append(Prompt(id=message.id, token_ids=message.token_ids))
    options = DecodeOptions(
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
        stop_token_ids=tuple(request.stop_token_ids),
    )
    return prompts, options


def _read_label_options(message: pb.LabelOptions) -> LabelOptions:
    encoding = _ENCODINGS.get(message.encoding)
    if encoding is None:
        raise UnsupportedError(
            f"this teacher knows no encoding with the number {message.encoding}",
            fix=f"Ask for one of {', '.join(WIRE_ENCODINGS)}.",
        )
    _check_what_goes_together(message, encoding)
    temperature = message.temperature or 1.0
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise InvalidInputError(
            f"temperature {temperature} is not from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}",
            fix="1 leaves logits as they are.",
        )
    if encoding == "top_k":
        _check_count("k", message.k, most=MAX_K, fix=f"top_k labels keep 1 to {MAX_K} tokens.")
    elif encoding == "sampled":
        _check_count("draws", message.draws, most=MAX_DRAWS, fix=f"sampled labels take 1 to {MAX_DRAWS} draws.")
    elif encoding == "projected" and not message.student_head:
        raise InvalidInputError(
            "projected labels need a student head", fix="Send it with PutStudentHead and name its fingerprint."
        )
    return LabelOptions(
        encoding=encoding,
        k=message.k,
        temperature=temperature,
        draws=message.draws,
        seed=message.seed,
        student_head=message.student_head,
    )


def _check_what_goes_together(message: pb.LabelOptions, encoding: Encoding) -> None:
    if encoding in ("exact", "full") and message.temperature not in (0.0, 1.0):
        raise InvalidInputError(
            f"temperature does not go with {encoding} labels",
            fix="Leave it out; the receiver of exact and full labels applies the temperature.",
        )
    for name, owner in (("k", "top_k"), ("draws", "sampled"), ("seed", "sampled"), ("student_head", "projected")):
        if getattr(message, name) and encoding != owner:
            raise InvalidInputError(f"{name} only goes with {owner} labels, not with {encoding}", fix="Leave it out.")


def _check_count(name: str, value: int, *, most: int, fix: str) -> None:
    if not 1 <= value <= most:
        error = InvalidInputError if value < 1 else LimitExceededError
        raise error(f"{name} is {value}", fix=fix)


def _check_ids(ids: list[str]) -> None:
    if not ids:
        raise InvalidInputError("the request holds no sequences", fix="Send at least one.")
    if len(ids) > MAX_SEQUENCES:
        raise LimitExceededError(
            f"the request holds {len(ids)} sequences, more than {MAX_SEQUENCES}", fix="Split it into several."
        )
    seen = set()
    for sequence_id in ids:
        if not sequence_id or len(sequence_id) > MAX_ID_CHARACTERS:
            raise InvalidInputError(
                f"the id {sequence_id[:40]!r} has {len(sequence_id)} characters",
                fix=f"Ids have 1 to {MAX_ID_CHARACTERS} characters.",
            )
        if sequence_id in seen:
            raise InvalidInputError(
                f"the id {sequence_id!r} stands in the request twice", fix="Give every sequence its own id."
            )
        seen.add(sequence_id)


def _read_token_ids(values: Any, *, owner: str, card: TeacherCard) -> Array:
    if not values:
        raise InvalidInputError(f"{owner} has no tokens", fix="Send at least one token.")
    if len(values) > card.max_length:
        raise LimitExceededError(
            f"{owner} has {len(values)} tokens, more than the teacher's {card.max_length}",
            fix="Cut it, for example with training.max_length, or start the teacher with a larger --max-length.",
        )
    token_ids = np.array(values, dtype=np.int64)
    _check_vocabulary(token_ids, owner=owner, card=card)
    return token_ids


def _check_vocabulary(token_ids: Array, *, owner: str, card: TeacherCard) -> None:
    beyond = token_ids[token_ids >= card.vocab_size]
    if len(beyond):
        raise InvalidInputError(
            f"{owner} holds the token id {beyond[0]}; this teacher's ids end at {card.vocab_size - 1}",
            fix="Tokenize with the teacher's own tokenizer.",
        )


def _check_positions(positions: Array, *, length: int, sequence_id: str) -> None:
    outside = positions[(positions < 1) | (positions >= length)]
    if len(outside):
        raise InvalidInputError(
            f"sequence {sequence_id!r} has the label position {outside[0]}, outside 1 to {length - 1}",
            fix="The labels at position p predict token p from those before it, so p starts at 1.",
        )
    if (np.diff(positions) <= 0).any():
        raise InvalidInputError(
            f"the label positions of sequence {sequence_id!r} do not ascend", fix="Send each once, in order."
        )
