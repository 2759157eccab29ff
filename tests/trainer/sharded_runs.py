"""Runs of two processes that share weights, one after the other: started with the directories that hold them.

Each directory has a ``spec.yaml``; the run goes to ``run`` beside it, and what was measured of it to ``measured.json``.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from services.contract.records import MetricPoint
from services.contract.settings import Settings
from services.contract.spec_reading import load_run
from student_trainer.launch import in_processes
from student_trainer.train import train
from student_trainer.trainer import DistillationTrainer

_trained: list[DistillationTrainer] = []


def main(directories: list[str]) -> None:
    publishing = DistillationTrainer.whole_weights

    def whole_weights(trainer: DistillationTrainer) -> Any:
        _trained.append(trainer)
        return publishing(trainer)

    DistillationTrainer.whole_weights = whole_weights  # type: ignore[method-assign]
    command = ["tests.trainer.sharded_runs", *directories]
    in_processes(partial(run_all, directories), command=command, processes=2)


def run_all(directories: list[str]) -> None:
    for directory in map(Path, directories):
        run(directory)


def run(directory: Path) -> None:
    points: list[MetricPoint] = []
    train(load_run(directory / "spec.yaml"), out=directory / "run", settings=Settings(), on_metrics=points.extend)
    if points:
        measured = {"metrics": {f"{point.name} {point.step}": point.value for point in points}}
        (directory / "measured.json").write_text(json.dumps(measured | sharded(_trained[-1])))


def sharded(trainer: DistillationTrainer) -> dict[str, object]:
    """What part of the model's weights this process held when it had trained, and how gradients were added up."""
    weights = [weight.detach() for weight in trainer.model.parameters()]
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    policy = plugin and plugin.mixed_precision_policy
    return {
        "share": sum(weight.numel() for weight in own) / sum(weight.numel() for weight in weights),
        "reduced_in": str(policy.reduce_dtype) if policy else None,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
