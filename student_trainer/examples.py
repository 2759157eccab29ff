"""What a run learns, as tokens: the same for training and for having its labels made before."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from services.contract.settings import Settings
from services.contract.spec import DatasetSpec, RunSpec
from services.datasets.reading import load_records
from student_trainer.data import Example, encode_examples
from student_trainer.decode import decode_responses
from student_trainer.readings import teacher_tokenizer, with_readings
from student_trainer.student import longest_sequence


def load_examples(
    spec: RunSpec,
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    teacher_max_length: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Example]:
    """The run's records that fit into its ``max_length``, the student and the teacher, in tokens.

    At sequence level the responses are the teacher's own, decoded now unless they are there. DatasetError where the
    data set cannot be read or none of its records fits; TeacherError where responses are to be decoded and cannot.
    """
    dataset = spec.dataset
    reader = teacher_tokenizer(spec, tokenizer=tokenizer, settings=settings)
    reads_otherwise = spec.alpha > 0 and reader is not tokenizer
    if spec.decodes:
        decoded = decode_responses(spec, tokenizer=tokenizer, settings=settings, should_stop=should_stop)
        dataset = DatasetSpec(path=str(decoded))
    records = load_records(dataset, offline=settings.offline)
    limit = longest_example(spec, settings=settings, teacher_max_length=None if reads_otherwise else teacher_max_length)
    examples = encode_examples(records, tokenizer, max_length=limit)
    if not reads_otherwise:
        return examples
    return with_readings(examples, records, tokenizer=tokenizer, teacher=reader, teacher_max_length=teacher_max_length)


def longest_example(spec: RunSpec, *, settings: Settings, teacher_max_length: int | None) -> int:
    """The most tokens of prompt and response that the run, its student and its teacher take."""
    limits = [spec.training.max_length, longest_sequence(spec.student, settings), teacher_max_length]
    return min(limit for limit in limits if limit)
