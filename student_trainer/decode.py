"""Sequence-level distillation: the teacher's own responses to the data set's prompts, decoded once."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from services.contract.errors import CancelledError, DatasetError
from services.contract.prompt import encode_prompt
from services.contract.sequences import Continuation, DecodeOptions, Prompt
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.datasets.reading import load_records
from student_trainer.progress import Progress
from student_trainer.readings import teacher_tokenizer
from student_trainer.run_directory import write_whole
from student_trainer.teacher import open_client
from student_trainer.teacher_client import TeacherClient

log = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 64


def decode_responses(
    spec: RunSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    on_progress: Callable[[float], None] = lambda share: None,
    should_stop: Callable[[], bool] = lambda: False,
    before_rename: Callable[[], None] = lambda: None,
) -> Path:
    """A .jsonl file of the data set's records with the teacher's greedy responses; made unless it is there.

    Its name is ``RunSpec.decode_key``, so that runs which differ in nothing that matters share it. Records whose
    response does not end within ``max_length`` tokens, or is empty, are left out with a warning. Raises TeacherError,
    and DatasetError when no response is usable.
    """
    assert spec.decode_key is not None
    path = settings.data_dir / "decodes" / f"{spec.decode_key}.jsonl"
    if path.exists():
        return path
    records = load_records(spec.dataset, offline=settings.offline)
    teacher = open_client(spec, tokenizer=tokenizer, settings=settings)
    tokenizer = teacher_tokenizer(spec, tokenizer=tokenizer, settings=settings)
    responses: dict[int, str] = {}
    try:
        with Progress("decode", unit="prompts", total=len(records)) as progress:
            for done, (index, response) in enumerate(_responses(teacher, records, tokenizer, spec), start=1):
                responses[index] = response
                progress.update(done)
                on_progress(done / len(records))
                if should_stop():
                    raise CancelledError("stopped while the teacher decoded responses")
    finally:
        teacher.close()
    lines = [
        json.dumps({**record, "response": responses[index]}, ensure_ascii=False)
        for index, record in enumerate(records)
        if responses.get(index)
    ]
    if not lines:
        raise DatasetError(
            f"the teacher ended none of its {len(records)} responses within {spec.training.max_length} tokens",
            fix="Raise training.max_length, or choose a teacher that is tuned to answer.",
        )
    if len(lines) < len(records):
        log.warning(
            "left out %d of %d records: the teacher's response was empty or did not end within %d tokens",
            len(records) - len(lines),
            len(records),
            spec.training.max_length,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    before_rename()
    write_whole(path, "".join(f"{line}\n" for line in lines))
    return path


def _responses(
    teacher: TeacherClient, records: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, spec: RunSpec
) -> Iterator[tuple[int, str]]:
    """Index and response of each record, the shortest prompts first; empty text for one that did not end in time."""
    longest = teacher.describe().max_length
    room = min(spec.training.max_length, longest)
    prompts = {index: _prompt_ids(tokenizer, record) for index, record in enumerate(records)}
    by_length = sorted(prompts, key=lambda index: len(prompts[index]))
    fitting = [index for index in by_length if len(prompts[index]) < room]
    yield from ((index, "") for index in by_length[len(fitting) :])
    for start in range(0, len(fitting), PROMPTS_AT_ONCE):
        chosen = fitting[start : start + PROMPTS_AT_ONCE]
        # One budget for the request: no prompt may outgrow the teacher, and answers beyond their own room are dropped.
        budget = min(spec.training.max_length - len(prompts[chosen[0]]), longest - len(prompts[chosen[-1]]))
        asked = [Prompt(id=str(index), token_ids=prompts[index]) for index in chosen]
        for continuation in teacher.generate(asked, DecodeOptions(max_new_tokens=budget)):
            index = int(continuation.id)
            fits = len(prompts[index]) + len(continuation.token_ids) <= spec.training.max_length
            yield index, _text(continuation, tokenizer) if fits else ""


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, record: Mapping[str, str]) -> list[int]:
    return encode_prompt(tokenizer, instruction=record["instruction"], context=record["context"])


def _text(continuation: Continuation, tokenizer: PreTrainedTokenizerBase) -> str:
    if continuation.finish_reason != "stop":
        return ""
    return str(tokenizer.decode(list(continuation.token_ids[:-1]), skip_special_tokens=True)).strip()
