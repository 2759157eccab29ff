"""Trains the consistency model and measures it on documents it has not seen.

    python -m services.evaluation.consistency.train --data DIR --out DIR

The recipe, in order; every random choice follows from ``--seed``:

1. Sentences of Dolly's closed-question, extraction and summarisation answers, of their contexts, and of XSum articles
   that share no text with a labelled one are taken as supported; each is also made wrong twice. The network's members
   are first fitted to these, each from a start and in an order of its own.
2. It is fitted further to XSumFaith (majority word labels), DeFacto (candidates; the words that the corrections
   changed; the corrections as supported) and BUMP (edits; the words they changed; the references as supported), each
   set and each side of its labels with the same weight. SummEval is never trained on.
3. Step 2 is done for each of FOLDS folds by document, each time from step 1's network, and the outputs of the left-out
   documents are scored: ``held_out.json``. The network that is kept then learns from all of them.

``--data`` holds dolly/train_large.jsonl.gz, xsum/test.jsonl, xsum_hallucination/{documents,spans}.jsonl,
defacto/xsum.jsonl, bump/edits.jsonl, cnn_dailymail/{test,test_tokenised}.jsonl and summeval/system_scores.jsonl, with
the columns that ``labelled`` and ``made`` read.
"""

import functools
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.progress import TaskID
from sklearn.metrics import precision_recall_curve

from services.contract.settings import Settings
from services.evaluation.consistency.encoding import Encoder, write_encoder
from services.evaluation.consistency.folds import Course, Report, fit_copy, score_held_out
from services.evaluation.consistency.held_out import Judgement, write_held_out
from services.evaluation.consistency.labelled import Example, read_labelled
from services.evaluation.consistency.made import make_examples, read_material
from services.evaluation.consistency.network import ConsistencyNetwork, Member
from services.evaluation.consistency.training import LabelledClaim, fit, label_claims
from services.evaluation.consistency.weights import write_network
from services.models.minilm import NAME, encoder_directory

FIRST_EPOCHS, FIRST_RATE = 2, 2e-3
EPOCHS, RATE = 3, 1e-3


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def main(
    data: Annotated[Path, typer.Option(help="Folder of the labelled sets.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, their card and the held-out scores.")],
    seed: Annotated[int, typer.Option(help="All random choices follow from it.")] = 0,
    precision: Annotated[Precision, typer.Option(help="In which the encoder reads the texts.")] = Precision.FLOAT32,
) -> None:
    """Train the consistency model, and score every labelled document by a network that has not seen it."""
    torch.use_deterministic_algorithms(True)
    write_encoder(encoder_directory(Settings()), out)
    encoder = Encoder(out, precision=getattr(torch, precision.value))
    console = Console(stderr=True)
    examples = read_labelled(data)
    made = make_examples(read_material(data, apart_from=examples), seed=seed)
    console.print(f"{len(examples)} labelled outputs, {len(made)} made ones; encoding them")
    with ProgressBar(console=console) as bar:
        report = _reporter(bar)
        first = fit_first(label_claims(made, encoder=encoder), seed=seed, report=report)
        course = Course(
            examples=examples,
            claims=label_claims(examples, encoder=encoder),
            epochs=EPOCHS,
            learning_rate=RATE,
            seed=seed,
        )
        held_out = score_held_out(first, course, report=report)
        everything = {example.group for example in examples}
        network = fit_copy(first, course, groups=everything, title="all documents", report=report)
    card = {
        "encoder": NAME,
        "precision": precision.value,
        "seed": seed,
        "made_outputs": len(made),
        "labelled_claims": sum(item.label is not None for item in course.claims),
        "word_threshold": best_word_threshold(examples, held_out),
    }
    write_network(network, out, card=card)
    write_held_out(out, held_out)
    console.print(f"wrote {out}")


def fit_first(claims: Sequence[LabelledClaim], *, seed: int, report: Report) -> ConsistencyNetwork:
    """A new network fitted to made claims alone."""
    network = ConsistencyNetwork()
    for number, member in enumerate(network.members):
        torch.manual_seed(seed + number)
        member.load_state_dict(Member().state_dict())
    progress = functools.partial(report, "made contradictions")
    fit(network, claims, epochs=FIRST_EPOCHS, learning_rate=FIRST_RATE, seed=seed, progress=progress)
    return network


def _reporter(bar: ProgressBar) -> Report:
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=of)
        bar.update(tasks[what], completed=done)

    return report


def best_word_threshold(examples: Sequence[Example], judgements: Sequence[Judgement]) -> float:
    """Where marking words agrees best with people (F1) on held-out documents, each set weighing the same."""
    thresholds = []
    for origin in ("xsumfaith", "defacto", "bump"):
        labels, scores = [], []
        for example, judgement in zip(examples, judgements, strict=True):
            if example.origin != origin or example.spans is None:
                continue
            for start, end, score in judgement.ranges:
                labels.append(any(first < end and start < last for first, last in example.spans))
                scores.append(score)
        precision, recall, cuts = precision_recall_curve(labels, scores)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        thresholds.append(cuts[min(int(f1.argmax()), len(cuts) - 1)])
    return round(float(np.mean(thresholds)), 3)


if __name__ == "__main__":
    typer.run(main)
