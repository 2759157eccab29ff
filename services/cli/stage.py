"""The process that a worker starts for one stage."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from services.contract.errors import SmoothKDError
from services.contract.settings import Settings
from services.contract.states import StageKind
from services.store.stages import Attempt
from services.store.store import Store


def run_stage(stage_id: str, *, attempt_number: int, settings: Settings) -> None:
    """Carry out a begun attempt. An error of the platform's own is left for the worker in SMOOTHKD_PROBLEM_FILE."""
    store = Store(settings.resolved_database_url)
    attempt = Attempt(stage_id=stage_id, number=attempt_number)
    try:
        kind = store.stage(stage_id).kind
        if kind == StageKind.TRAIN:
            from student_trainer.stage import run_train

            _in_processes(lambda: run_train(store, attempt, settings), store, attempt)
        elif kind == StageKind.DECODE:
            from student_trainer.stage import run_decode

            run_decode(store, attempt, settings)
        elif kind == StageKind.FINETUNE_TEACHER:
            from student_trainer.stage import run_finetune

            _in_processes(lambda: run_finetune(store, attempt, settings), store, attempt)
        elif kind == StageKind.EVALUATE:
            from services.evaluation.stage import run_evaluate

            run_evaluate(store, attempt, settings)
        else:
            raise AssertionError(f"nothing carries out a {kind} stage")
    except SmoothKDError as error:
        problem_file = os.environ.get("SMOOTHKD_PROBLEM_FILE")
        if problem_file:
            problem = {"reason": error.reason, "what": error.what, "fix": error.fix}
            Path(problem_file).write_text(json.dumps(problem), encoding="utf-8")
        raise
    finally:
        store.close()


def _in_processes(work: Callable[[], None], store: Store, attempt: Attempt) -> None:
    """As many as the sweep's training wants; each carries out this very stage."""
    from student_trainer.launch import in_processes

    processes = store.sweep(store.stage(attempt.stage_id).sweep_id).spec.training.processes
    command = ["services.cli.main", "stage", attempt.stage_id, "--attempt", str(attempt.number)]
    in_processes(work, command=command, processes=processes)
