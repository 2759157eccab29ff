"""An evaluation in a directory: its generations as they come, and its scores when it is done."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from transformers import AutoConfig

from services.contract.errors import ConflictError, DatasetError, InvalidInputError
from services.contract.evaluation_spec import MULTIPLE_CHOICE, QUESTIONS, SUMMARISATION, BenchmarkSpec, EvaluationSpec
from services.contract.metric_words import measured_on
from services.contract.records import Generation, Score
from services.contract.settings import Settings
from services.datasets.choices import check_choices
from services.datasets.questions import check_questions
from services.datasets.reading import check_items, load_items
from services.datasets.sources import is_local
from services.evaluation.evaluate import evaluate
from services.evaluation.judged import judged_by
from services.evaluation.lookback.fingerprint import architecture_of
from services.evaluation.model_server import ModelServer
from services.evaluation.subject import OWN, SUBJECT, Subject, read_subject
from services.models.resolve import resolve_model
from services.reports.folder import make_folder

GENERATIONS = "generations.jsonl"
SCORES = "scores.json"


def evaluate_to_directory(
    model: str, spec: EvaluationSpec, out: Path, settings: Settings, *, server: str | None = None
) -> list[Score]:
    """The scores of a model, also in ``out`` beside the generations, one JSON object a line.

    A directory that an interrupted evaluation of the same model left is carried on, also with further metrics;
    ConflictError when it is another model's, its outputs had another length, or others wrote or judged them. A
    DatasetError of a benchmark's file comes before anything else.
    ``server``: the address of one that serves the model and writes its answers, as ``vllm serve`` does.
    """
    if not spec.benchmarks:
        raise InvalidInputError("no benchmark was named", fix="Name at least one, for example demo_news.")
    _check_files(spec)
    directory = resolve_model(model, settings=settings)
    asked = _server(server, model=model, directory=directory, settings=settings) if server else None
    make_folder(out)
    _claim(out, directory=Path(directory), spec=spec, server=asked, settings=settings)
    known = _read_generations(out / GENERATIONS)
    with (
        (out / GENERATIONS).open("a", encoding="utf-8") as file,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("Evaluating", total=1.0)

        def keep(generations: Sequence[Generation]) -> None:
            known.extend(generations)
            file.writelines(f"{generation.model_dump_json()}\n" for generation in generations)
            file.flush()

        scores = evaluate(
            model,
            spec=spec,
            settings=settings,
            known=list(known),
            on_generations=keep,
            on_progress=lambda share: progress.update(task, completed=share),
            server=asked,
        )
    newest = {(generation.benchmark, generation.item_id): generation for generation in known}
    _replace(out / GENERATIONS, (newest[key].model_dump_json() for key in sorted(newest)))
    _replace(out / SCORES, [json.dumps([score.model_dump() for score in scores], indent=2)])
    return scores


def _check_files(spec: EvaluationSpec) -> None:
    """Raises DatasetError for a benchmark's file before hours are spent on the benchmarks in front of it."""
    for benchmark in spec.benchmarks:
        if benchmark.path is None or not is_local(benchmark.path):
            continue
        if benchmark.name in MULTIPLE_CHOICE:
            check_choices(benchmark)
        elif benchmark.name in QUESTIONS:
            check_questions(benchmark, limit=spec.limit)
        else:
            check_items(benchmark, limit=spec.limit)


def _server(url: str, *, model: str, directory: str, settings: Settings) -> ModelServer:
    key = settings.model_server_key.get_secret_value() if settings.model_server_key else None
    return ModelServer(url, directory=directory, name=model, key=key)


def _claim(out: Path, *, directory: Path, spec: EvaluationSpec, server: ModelServer | None, settings: Settings) -> None:
    """Notes whose outputs these are: the weights by size and time, which is quick and changes when they do."""
    weights = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    # Not a server's address, which may change; articles are cut to its window.
    answered_by = f"a server with a window of {server.window} tokens" if server else OWN
    subject = Subject(
        model=str(directory),
        weights={file.name: ((stat := file.stat()).st_size, stat.st_mtime_ns) for file in weights},
        max_new_tokens=spec.max_new_tokens,
        answered_by=answered_by,
        judged_by=_judges(spec, directory=directory, settings=settings),
    )
    before = read_subject(out)
    if before is not None:
        _check_same(out, before, subject)
        subject = subject.model_copy(update={"judged_by": {**before.judged_by, **subject.judged_by}})
    elif (out / GENERATIONS).exists():
        raise ConflictError(
            f"{out / GENERATIONS} exists, and nothing says which model wrote it", fix="Choose another directory."
        )
    _replace(out / SUBJECT, [subject.model_dump_json(indent=2)])


def _judges(spec: EvaluationSpec, *, directory: Path, settings: Settings) -> dict[str, str]:
    """Who will judge, of every benchmark whose items can be read; what goes wrong is told when it is carried out."""
    try:
        architecture = architecture_of(AutoConfig.from_pretrained(directory))
    except (OSError, ValueError):
        return {}
    found: dict[str, str] = {}
    for benchmark in (one for one in spec.benchmarks if one.name in SUMMARISATION):

        def references(benchmark: BenchmarkSpec = benchmark) -> list[str]:
            items = load_items(benchmark, limit=spec.limit, offline=settings.offline)
            return [item.reference for item in items]

        try:
            words = judged_by(benchmark.name, spec, references=references, architecture=architecture)
        except DatasetError:
            continue
        found |= {measured_on(benchmark.name, metric): judge for metric, judge in words.items()}
    return found


def _check_same(out: Path, before: Subject, now: Subject) -> None:
    if before.answered_by != now.answered_by:
        # They may round otherwise, and so write other words.
        raise ConflictError(
            f"{out} holds answers by {before.answered_by}, not by {now.answered_by}",
            fix="Choose another directory, or have the rest answered as before.",
        )
    for metric in sorted(before.judged_by.keys() & now.judged_by.keys()):
        if before.judged_by[metric] != now.judged_by[metric]:
            raise ConflictError(
                f"{out} holds a {metric} by {before.judged_by[metric]}, not by {now.judged_by[metric]}",
                fix="Choose another directory, or ask for the same judge.",
            )
    if (before.model, before.weights, before.max_new_tokens) != (now.model, now.weights, now.max_new_tokens):
        raise ConflictError(
            f"{out} holds an evaluation of {before.model} with up to {before.max_new_tokens} tokens an output, "
            "or of other weights there",
            fix="Choose another directory, or remove this one.",
        )


def _read_generations(file: Path) -> list[Generation]:
    """What was written before; a last line that was cut short is removed."""
    if not file.exists():
        return []
    generations = []
    whole = 0
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            generations.append(Generation.model_validate_json(line))
        except ValidationError:
            raise ConflictError(
                f"{file}, line {number} is not a generation",
                fix="Remove that line, and its item is answered again; or choose another directory.",
            ) from None
        whole += len(line)
    os.truncate(file, whole)
    return generations


def _replace(file: Path, lines: Iterable[str]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(file)
