"""Labels from the cache against labels computed: tokens per second over the same requests, in one run."""

import statistics
import time

from benchmarks.report import report
from benchmarks.serving import model_directory, teacher_process
from benchmarks.teacher_labels import ask_teacher, records
from services.contract.sequences import LabelOptions
from student_trainer.teacher_client import TeacherClient

ROUNDS = 5


def main() -> None:
    model = model_directory()
    sequences = records(model, count=96)
    tokens = sum(len(sequence.token_ids) for sequence in sequences)
    rows = []
    with (
        teacher_process("--model", str(model), "--engine", "transformers") as (address, _),
        TeacherClient(address) as client,
    ):
        for options in (LabelOptions(), LabelOptions(encoding="top_k", k=64)):
            computed = seconds(client, sequences, options)
            cached = statistics.median(seconds(client, sequences, options) for _ in range(ROUNDS))
            rows.append(
                {
                    "encoding": options.encoding,
                    "computed tokens/s": tokens / computed,
                    "cached tokens/s": tokens / cached,
                    "times faster": computed / cached,
                    "ms per cached sequence": 1000 * cached / len(sequences),
                }
            )
    report("label_cache", title=f"{len(sequences)} records, {tokens:,} tokens", rows=rows)


def seconds(client: TeacherClient, sequences: list, options: LabelOptions) -> float:
    """Of one pass over all sequences."""
    started = time.perf_counter()
    ask_teacher(client, sequences, options)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
