"""A whole optimizer step with soft labels that have been made before, against one of supervised fine-tuning.

SmolLM2-135M-Instruct learns from itself: exact labels from a teacher's cache through gRPC, the same from files, and
none. All three train the same batches in real runs, whose own logs are the measurement.

    SMOOTHKD_DATA_DIR=... python -m benchmarks.kd_step --records 12
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.report import report
from benchmarks.serving import REPOSITORY, model_directory, teacher_process
from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec import RunSpec
from services.contract.spec_reading import parse_run
from student_trainer.train import train

BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=12)
    arguments = parser.parse_args()
    model = model_directory()
    with tempfile.TemporaryDirectory() as folder, teacher_process("--model", str(model)) as (address, _):
        settings = Settings(data_dir=Path(folder) / "data", teacher_address=address, offline=True)
        runs = {"SFT": make_run(model, arguments.records, alpha=0.0)}
        runs["KD, labels from the cache"] = make_run(model, arguments.records, alpha=1.0)
        files = Path(folder) / "labels"
        export(runs["KD, labels from the cache"], files, settings=settings)
        runs["KD, labels from files"] = make_run(model, arguments.records, alpha=1.0, labels={"path": str(files)})
        rows: list[dict[str, Any]] = []
        for number, (name, spec) in enumerate(runs.items()):
            points: list[MetricPoint] = []
            train(spec, out=Path(folder) / str(number), settings=settings, on_metrics=points.extend)
            rows.append(measured(name, points))
    for row in rows:
        row["times SFT"] = rows[0]["tokens/s"] / row["tokens/s"]
    report("kd_step", title=f"SmolLM2-135M, {arguments.records} records, batches of {BATCH_SIZE}", rows=rows)


def make_run(model: Path, records: int, *, alpha: float, labels: dict[str, str] | None = None) -> RunSpec:
    """Two epochs over the first records of the shipped instructions."""
    return parse_run(
        {
            "student": {"model": str(model)},
            "teacher": {"model": str(model)} if alpha else None,
            "dataset": {"path": "demo_instructions", "limit": records},
            "distillation": {"labels": {"encoding": "exact", **(labels or {})}},
            "alpha": alpha,
            "batch_size": BATCH_SIZE,
            "training": {
                "epochs": 2,
                "max_length": 512,
                "precision": "bf16" if torch.cuda.is_available() else "fp32",
            },
        }
    )


def export(spec: RunSpec, directory: Path, *, settings: Settings) -> None:
    """Make the labels' files, and so fill the teacher's cache."""
    run_file = directory.with_suffix(".yaml")
    run_file.write_text(yaml.safe_dump(spec.model_dump(mode="json")), encoding="utf-8")
    environment = {
        "PATH": "/usr/bin:/bin",
        "SMOOTHKD_DATA_DIR": str(settings.data_dir),
        "SMOOTHKD_TEACHER_ADDRESS": settings.teacher_address,
        "SMOOTHKD_OFFLINE": "true",
    }
    command = [sys.executable, "-m", "services.cli.main", "labels", "export", str(run_file), "--out", str(directory)]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def measured(name: str, points: Sequence[MetricPoint]) -> dict[str, Any]:
    """Of the steps after the first, which loads what later steps have."""
    values = {
        metric: [point.value for point in points if point.name == metric and point.step > 1]
        for metric in ("tokens_per_second", "label_wait_seconds", "label_cache_hits", "peak_memory_gib")
    }
    hits = values["label_cache_hits"]
    return {
        "run": name,
        "tokens/s": statistics.median(values["tokens_per_second"]),
        "waiting for labels, s": sum(values["label_wait_seconds"]),
        "labels from cache": f"{statistics.mean(hits):.0%}" if hits else "-",
        "peak GiB": max(values["peak_memory_gib"]),
    }


if __name__ == "__main__":
    main()
