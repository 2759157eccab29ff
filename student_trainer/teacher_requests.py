"""Requests to the teacher as they travel: what is asked for, how, and of which weights."""

import itertools
from collections.abc import Iterable
from typing import TypeVar

from services.contract.errors import LabelMismatchError
from services.contract.sequences import Continuation, DecodeOptions, LabelOptions, Prompt, TokenSequence
from services.contract.soft_labels import MAX_REQUEST_BYTES, WIRE_ENCODINGS
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from student_trainer.teacher_info import TeacherInfo

Item = TypeVar("Item", TokenSequence, Prompt)

_REQUEST_OVERHEAD_BYTES = 1024
"""Of one sequence: its id of up to 200 characters, and field headers."""


def score_request(
    sequences: Iterable[TokenSequence], *, info: TeacherInfo, options: LabelOptions
) -> pb.ScoreSequencesRequest:
    """For the labels of ``sequences`` by the very weights that ``info`` tells of."""
    return pb.ScoreSequencesRequest(
        model=info.model,
        fingerprint=info.fingerprint,
        options=pb.LabelOptions(
            encoding=WIRE_ENCODINGS[options.encoding],
            k=options.k,
            temperature=options.temperature,
            draws=options.draws,
            seed=options.seed,
            student_head=options.student_head,
        ),
        sequences=[
            pb.ScoreSequence(id=item.id, token_ids=item.token_ids, label_positions=item.label_positions)
            for item in sequences
        ],
    )


def generate_request(
    prompts: Iterable[Prompt], *, info: TeacherInfo, options: DecodeOptions
) -> pb.GenerateSequencesRequest:
    """For the continuations of ``prompts`` by the very weights that ``info`` tells of."""
    return pb.GenerateSequencesRequest(
        model=info.model,
        fingerprint=info.fingerprint,
        prompts=[pb.GeneratePrompt(id=prompt.id, token_ids=prompt.token_ids) for prompt in prompts],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        stop_token_ids=options.stop_token_ids,
    )


def read_continuation(message: pb.GenerateSequencesResponse, prompt: Prompt) -> Continuation:
    """The teacher's answer for one prompt."""
    stopped = message.finish_reason == pb.FINISH_REASON_STOP
    return Continuation(id=prompt.id, token_ids=tuple(message.token_ids), finish_reason="stop" if stopped else "length")


def one_request(missing: dict[str, Item], *, max_sequences: int) -> dict[str, Item]:
    """The first of what is missing, as much as the teacher takes at a time."""
    asked: dict[str, Item] = {}
    room = MAX_REQUEST_BYTES
    for id, item in itertools.islice(missing.items(), max_sequences):
        # Ids and positions below two million take up to 3 bytes each.
        room -= _REQUEST_OVERHEAD_BYTES + 3 * (len(item.token_ids) + len(getattr(item, "label_positions", ())))
        if asked and room < 0:
            break
        asked[id] = item
    return asked


def unexpected_answer(sequence_id: str, *, missing: bool) -> LabelMismatchError:
    """The error for a teacher that says more, or less, than it was asked."""
    what = "left out" if missing else "answered unasked, or twice,"
    return LabelMismatchError(f"the teacher {what} sequence {sequence_id!r}", fix="Restart the teacher.")
