"""Whatever order things happen in, the store agrees with a few lines of plain Python."""

import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.contract.errors import StaleAttemptError
from services.contract.records import Problem
from services.contract.states import ENDED, State, combined_state
from services.store.store import Attempt, Store
from tests.store.examples import example_sweep, stage_ids

MAX_ATTEMPTS = 2
NUMBERS = st.integers(0, 100)
_template: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def migrated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every example copies one migrated database instead of migrating its own."""
    path = tmp_path_factory.mktemp("template") / "store.db"
    Store(f"sqlite:///{path}").close()
    _template[:] = [path]


class StoreMachine(RuleBasedStateMachine):
    """The model: a state per stage, what each needs, losses, and every attempt ever begun."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        shutil.copy(_template[0], self.folder / "store.db")
        self.store = Store(f"sqlite:///{self.folder / 'store.db'}")
        self.cancelled = False
        self.attempts: list[Attempt] = []

    @initialize(level=st.sampled_from(["word", "word+sequence"]), benchmarks=st.sampled_from([[], ["demo_news"]]))
    def create(self, level: str, benchmarks: list[str]) -> None:
        spec = example_sweep(
            distillation={"level": level},
            evaluation={"benchmarks": benchmarks},
            grid={"alpha": [0.1, 1]},
        )
        self.sweep = self.store.create_sweep(spec)
        self.chains = [stage_ids(self.store, self.sweep, run=run) for run in range(2)]
        self.needs = {later: earlier for chain in self.chains for earlier, later in pairwise(chain)}
        self.ids = sorted({stage for chain in self.chains for stage in chain})
        self.states = dict.fromkeys(self.ids, State.QUEUED)
        self.losses = dict.fromkeys(self.ids, 0)
        self.current: dict[str, Attempt | None] = dict.fromkeys(self.ids)

    @rule(number=NUMBERS)
    def begin(self, number: int) -> None:
        stage = self.ids[number % len(self.ids)]
        attempt = self.store.begin_attempt(stage, worker="worker", lease_seconds=60)
        assert (attempt is not None) == self._is_ready(stage)
        if attempt:
            assert attempt.number == 1 + sum(old.stage_id == stage for old in self.attempts)
            self.attempts.append(attempt)
            self.current[stage] = attempt
            self.states[stage] = State.RUNNING

    @precondition(lambda self: self.attempts)
    @rule(number=NUMBERS, state=st.sampled_from([State.SUCCEEDED, State.SUCCEEDED, State.FAILED, State.CANCELLED]))
    def end(self, number: int, state: State) -> None:
        attempt = self.attempts[-1 - number % len(self.attempts)]
        if self._refuses(attempt, lambda: self.store.end_attempt(attempt, state)):
            return
        self._ended(attempt.stage_id, state)

    @precondition(lambda self: self.attempts)
    @rule(number=NUMBERS)
    def lose(self, number: int) -> None:
        attempt = self.attempts[-1 - number % len(self.attempts)]
        problem = Problem(reason="process_killed", what="killed")
        if not self._refuses(
            attempt, lambda: self.store.lose_attempt(attempt, max_attempts=MAX_ATTEMPTS, problem=problem)
        ):
            self._lost(attempt.stage_id)

    @precondition(lambda self: self.attempts)
    @rule(number=NUMBERS)
    def release(self, number: int) -> None:
        attempt = self.attempts[-1 - number % len(self.attempts)]
        if not self._refuses(attempt, lambda: self.store.release_attempt(attempt)):
            self._requeued(attempt.stage_id)

    @rule(expire=st.sets(NUMBERS, max_size=3))
    def reclaim(self, expire: set[int]) -> None:
        expired = {self.ids[number % len(self.ids)] for number in expire}
        expired = {stage for stage in expired if self.states[stage] == State.RUNNING}
        for stage in expired:
            self.store.heartbeat(self.current[stage], lease_seconds=-1)
        assert {stage.id for stage in self.store.reclaim_expired(max_attempts=MAX_ATTEMPTS)} == expired
        for stage in expired:
            self._lost(stage)

    @precondition(lambda self: len(self.attempts) > 3)
    @rule()
    def cancel(self) -> None:
        self.store.request_cancel(self.sweep.id)
        self.cancelled = True
        for stage, state in self.states.items():
            if state == State.QUEUED:
                self.states[stage] = State.CANCELLED

    @invariant()
    def agrees(self) -> None:
        runs = self.store.runs(self.sweep.id).items
        for run, chain in zip(runs, self.chains, strict=True):
            states = [self.states[stage] for stage in chain]
            assert [stage.state for stage in run.stages] == states
            assert run.state == combined_state(states)
            assert run.progress == sum(state in ENDED for state in states) / len(states)
        sweep = self.store.sweep(self.sweep.id)
        assert sweep.state == combined_state(run.state for run in runs)
        assert sweep.runs == {run.state: sum(other.state == run.state for other in runs) for run in runs}
        assert sweep.cancel_requested == self.cancelled
        assert {stage.id for stage in self.store.ready_stages()} == set(filter(self._is_ready, self.ids))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def _is_ready(self, stage: str) -> bool:
        needed = self.needs.get(stage)
        return self.states[stage] == State.QUEUED and (needed is None or self.states[needed] == State.SUCCEEDED)

    def _refuses(self, attempt: Attempt, write: object) -> bool:
        stale = self.current[attempt.stage_id] != attempt or self.states[attempt.stage_id] != State.RUNNING
        try:
            write()
        except StaleAttemptError:
            assert stale
            return True
        assert not stale
        return False

    def _lost(self, stage: str) -> None:
        self.losses[stage] += 1
        if self.losses[stage] >= MAX_ATTEMPTS:
            self._ended(stage, State.FAILED)
        else:
            self._requeued(stage)

    def _requeued(self, stage: str) -> None:
        if self.cancelled:
            self._ended(stage, State.CANCELLED)
        else:
            self.states[stage] = State.QUEUED

    def _ended(self, stage: str, state: State) -> None:
        self.states[stage] = state
        if state != State.SUCCEEDED:
            for later, needed in self.needs.items():
                if needed == stage and self.states[later] == State.QUEUED:
                    self._ended(later, State.SKIPPED)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_the_store_agrees_with_the_model = StoreMachine.TestCase
