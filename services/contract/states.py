"""States of sweeps, runs and stages.

    queued -> running -> succeeded | failed | cancelled | skipped

A sweep and a run also carry ``cancel_requested`` while work that was already running winds down.
``skipped`` marks a stage or run whose prerequisite failed or was cancelled.
"""

from collections.abc import Iterable
from enum import StrEnum


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.SKIPPED})


class StageKind(StrEnum):
    """What a stage does; ``smoothkd stage`` runs one of them in a process of its own."""

    FINETUNE_TEACHER = "finetune_teacher"
    DECODE = "decode"
    TRAIN = "train"
    EVALUATE = "evaluate"


def combined_state(parts: Iterable[State]) -> State:
    """The state of a whole from the states of its parts (a run's stages, a sweep's runs).

    Ended once every part has ended: failed beats cancelled beats skipped beats succeeded. A whole of no
    parts is queued.
    """
    states = set(parts)
    if not states or states == {State.QUEUED}:
        return State.QUEUED
    if states <= ENDED:
        for state in (State.FAILED, State.CANCELLED, State.SKIPPED):
            if state in states:
                return state
        return State.SUCCEEDED
    return State.RUNNING
