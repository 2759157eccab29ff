"""Labels from files instead of a teacher: no server is asked, and all that one would be asked is checked."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from services.contract.errors import HandshakeError, InvalidInputError
from services.contract.lm_head import LmHead
from services.contract.sequences import LabelOptions, TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ScoredSequence, hash_sequence
from services.contract.spec import RunSpec
from services.labels.files import LabelFiles
from services.labels.manifest import Manifest
from student_trainer.alignment import check_scored
from student_trainer.data import Example
from student_trainer.handshake import PROBE_TEXTS, StudentTokenizer, require_shared_tokenizer
from student_trainer.labels import label_request
from student_trainer.readings import teacher_tokenizer
from student_trainer.student_head import StudentHead
from student_trainer.teacher import Teacher, label_options
from student_trainer.teacher_info import teacher_info

log = logging.getLogger(__name__)


def teacher_in_files(spec: RunSpec, *, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Teacher:
    """The teacher whose labels lie in ``distillation.labels.path``, once it is certain that they are this run's.

    InvalidInputError where the directory holds no labels, or labels made in another way; HandshakeError where they are
    another teacher's, or the teacher's tokenizer is not the student's.
    """
    assert spec.teacher is not None
    assert spec.distillation.labels.path is not None
    files = LabelFiles(Path(spec.distillation.labels.path).expanduser())
    options = label_options(spec.distillation)
    _require_teacher(files, spec)
    _require_options(files, options)
    _require_tokenizer(files.manifest, teacher_tokenizer(spec, tokenizer=tokenizer, settings=settings))
    log.info("labels of %d sequences lie in %s; no teacher is asked", len(files), files.directory)
    return Teacher(
        name=spec.teacher.model,
        source=FileLabels(files),
        info=teacher_info(files.manifest.teacher),
        options=options,
        lm_head=files.lm_head(),
    )


class FileLabels:
    """A LabelSource that reads label files."""

    def __init__(self, files: LabelFiles) -> None:
        self._files = files
        self._student_head: StudentHead | None = None

    def score(
        self, sequences: Iterable[TokenSequence], options: LabelOptions | None = None
    ) -> Iterator[ScoredSequence]:
        """Labels of every sequence in the order given. InvalidInputError where a sequence is not in the files, or its
        row is damaged; LabelMismatchError where it holds other labels than it should.
        """
        teacher = self._files.manifest.teacher
        for sequence in sequences:
            labelled = self._files.read(hash_sequence(sequence.token_ids, sequence.label_positions))
            if labelled is None:
                raise _missing(f"sequence {sequence.id!r} has", self._files.directory)
            scored = replace(labelled.scored, id=sequence.id, from_cache=True)
            check_scored(
                scored,
                sequence,
                options=options or LabelOptions(),
                vocab_size=teacher.vocab_size,
                hidden_size=teacher.hidden_size,
                student_head=self._student_head,
            )
            yield scored

    def use_student_head(self, head: LmHead) -> str:
        """The head's fingerprint. InvalidInputError where the projected labels are means of another head."""
        self._student_head = StudentHead(head)
        stored = self._files.manifest.options.student_head
        if stored != self._student_head.fingerprint:
            raise InvalidInputError(
                f"the projected labels in {self._files.directory} were made for another student: output head "
                f"{stored[:8]}, not {self._student_head.fingerprint[:8]}",
                fix="Export labels for this student, or choose the encoding exact, which fits any.",
            )
        return stored

    def require(self, examples: Sequence[Example]) -> None:
        """InvalidInputError names the first record that has no labels here, and how many there are."""
        missing = [example for example in examples if _hash(example) not in self._files]
        if missing:
            others = f", nor have {len(missing) - 1} of the others" if len(missing) > 1 else ""
            raise _missing(
                f"record {missing[0].index} of the data set, counted from 0, has", self._files.directory, others
            )

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def _require_teacher(files: LabelFiles, spec: RunSpec) -> None:
    assert spec.teacher is not None
    wanted, found = spec.teacher, files.manifest.teacher
    same = wanted.model == found.model or Path(wanted.model).absolute() == Path(found.model).absolute()
    if not same or (wanted.revision and found.revision and wanted.revision != found.revision):
        shown = " of revision ".join(filter(None, (wanted.model, wanted.revision)))
        raise HandshakeError(
            f"{files.directory} holds the labels of {found.model}"
            f"{f' of revision {found.revision}' if found.revision else ''}, not of {shown}",
            fix="Name that teacher in the run, or another directory as distillation.labels.path.",
        )


def _require_options(files: LabelFiles, options: LabelOptions) -> None:
    stored = files.manifest.options
    # Which head projected labels belong to is known once the student is loaded.
    wanted = replace(files.manifest, options=replace(options, student_head=stored.student_head))
    if wanted.identity != files.manifest.identity:
        raise InvalidInputError(
            f"{files.directory} holds labels of another kind: {_shown(stored)}; the run asks for {_shown(options)}",
            fix="Change distillation.labels and temperature to fit, or export such labels into another directory.",
        )


def _require_tokenizer(manifest: Manifest, tokenizer: StudentTokenizer) -> None:
    if manifest.probe_texts != PROBE_TEXTS:
        raise HandshakeError(
            "these label files were written by a release that compares tokenizers by other texts",
            fix="Export the labels again with this release; what the teacher has cached is not computed again.",
        )
    encoding = manifest.options.encoding
    require_shared_tokenizer(tokenizer, manifest.teacher, encoding=encoding, encodings=[encoding])


def _missing(which: str, directory: Path, others: str = "") -> InvalidInputError:
    return InvalidInputError(
        f"{which} no labels in {directory}{others}",
        fix=f"`smoothkd labels export RUN.yaml --out {directory}` adds what is missing, once the teacher serves.",
    )


def _hash(example: Example) -> bytes:
    request = label_request(example, id="")
    return hash_sequence(request.token_ids, request.label_positions)


def _shown(options: LabelOptions) -> str:
    parts: list[str] = [options.encoding]
    parts += [f"k={options.k}"] if options.encoding == "top_k" else []
    parts += [f"draws={options.draws}", f"seed={options.seed}"] if options.encoding == "sampled" else []
    if options.encoding not in ("exact", "full"):
        parts.append(f"temperature={options.temperature:g}")
    return " ".join(parts)
