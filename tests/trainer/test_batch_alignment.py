"""Labels of batches that do not fit what the teacher tells of the tokens, one kind at a time, and those that do."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from services.contract.errors import LabelMismatchError
from services.contract.sequences import TokenSequence
from services.contract.settings import Settings
from services.contract.soft_labels import ExactLabels, ScoredSequence, checked_positions, hash_sequence
from student_trainer.batch_alignment import require_aligned
from student_trainer.output_head import OutputHead
from student_trainer.targets import ExactTargets
from student_trainer.train import train
from tests.trainer.misaligned import ENCODINGS, go_wrong, stopped
from tests.trainer.runs import MakeRun

VOCAB, WIDTH = 500, 64
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Batch:
    """Sequences of several lengths with a teacher's states, what it tells of them in float64, and its head."""

    def __init__(self, *, logit_scale: float = 1.0, soft_cap: float = 0.0, label_dtype: str = "float32") -> None:
        rng = np.random.default_rng(5)
        self.weight_VD, self.bias_V = rng.normal(size=(VOCAB, WIDTH)), rng.normal(size=VOCAB)
        self.logit_scale, self.soft_cap = logit_scale, soft_cap
        self.sequences, self.scored = [], []
        for number, length in enumerate((40, 5, 1, 23)):
            sequence = TokenSequence(
                id=f"sequence {number}",
                token_ids=rng.integers(0, VOCAB, length + 3),
                label_positions=range(3, length + 3),
            )
            hidden_ND = rng.normal(size=(length, WIDTH))
            told = checked_positions(length, "exact")
            self.sequences.append(sequence)
            self.scored.append(
                ScoredSequence(
                    id=sequence.id,
                    sequence_hash=hash_sequence(sequence.token_ids, sequence.label_positions),
                    token_logprobs_P=self.logprobs(hidden_ND, sequence)[told].astype(np.float32),
                    labels=ExactLabels(hidden_ND=hidden_ND.astype(DTYPES[label_dtype])),
                )
            )

    def logprobs(self, hidden_ND: np.ndarray, sequence: TokenSequence) -> np.ndarray:
        """Float64 [N], from a formula of its own."""
        logits_NV = (hidden_ND @ self.weight_VD.T + self.bias_V) * self.logit_scale
        if self.soft_cap:
            logits_NV = self.soft_cap * np.tanh(logits_NV / self.soft_cap)
        tokens_N = np.asarray(sequence.token_ids)[np.asarray(sequence.label_positions)]
        logsumexp_N = np.log(np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True)).sum(axis=1)) + logits_NV.max(
            axis=1
        )
        return logits_NV[np.arange(len(tokens_N)), tokens_N] - logsumexp_N

    def check(self, *, states: list[np.ndarray] | None = None, head_dtype: torch.dtype = torch.float32) -> None:
        states = states or [scored.labels.hidden_ND for scored in self.scored]
        joined = torch.cat([_tensor(part) for part in states])
        head = OutputHead(
            weight_RD=torch.from_numpy(self.weight_VD).to(head_dtype),
            bias_R=torch.from_numpy(self.bias_V).to(head_dtype),
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )
        require_aligned(ExactTargets(hidden_NE=joined, head=head), self.scored, self.sequences)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("label_dtype", DTYPES)
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("logit_scale", "soft_cap"), [(1.0, 0.0), (0.125, 0.0), (1.0, 30.0)])
def test_rounding_stops_no_run(label_dtype: str, head_dtype: torch.dtype, logit_scale: float, soft_cap: float) -> None:
    Batch(logit_scale=logit_scale, soft_cap=soft_cap, label_dtype=label_dtype).check(head_dtype=head_dtype)


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damaged", range(4))
def test_states_of_another_position_are_noticed(damaged: int, head_dtype: torch.dtype) -> None:
    batch = Batch(label_dtype="bfloat16" if head_dtype == torch.bfloat16 else "float32")
    states = [scored.labels.hidden_ND for scored in batch.scored]
    # The only position of the shortest gets states of another sequence.
    states[damaged] = np.roll(states[damaged], 1, axis=0) if len(states[damaged]) > 1 else states[0][:1]
    with pytest.raises(LabelMismatchError, match=f"of sequence 'sequence {damaged}' the labels give token"):
        batch.check(states=states, head_dtype=head_dtype)


def test_the_position_is_named() -> None:
    batch = Batch()
    states = [scored.labels.hidden_ND.copy() for scored in batch.scored]
    states[3][-1] *= -1
    token = batch.sequences[3].token_ids[25]
    with pytest.raises(
        LabelMismatchError, match=rf"position 25 of sequence 'sequence 3' the labels give token {token} "
    ):
        batch.check(states=states)


def test_nan_is_no_agreement() -> None:
    batch = Batch()
    states = [scored.labels.hidden_ND.copy() for scored in batch.scored]
    states[0][0, 0] = np.nan
    with pytest.raises(LabelMismatchError, match="nan"):
        batch.check(states=states)


def test_mixed_precision_around_it_rounds_nothing() -> None:
    """As within a model's forward pass; the tolerance of float32 labels leaves no room for 16 bits."""
    batch = Batch()
    with torch.autocast("cpu", torch.bfloat16):
        batch.check()


def test_a_token_that_cannot_come_is_no_mismatch_and_hides_none() -> None:
    batch = Batch()
    token = batch.sequences[0].token_ids[3]
    batch.bias_V[token] = -np.inf
    for scored, sequence in zip(batch.scored, batch.sequences, strict=True):
        told = checked_positions(len(sequence.label_positions), "exact")
        with np.errstate(over="ignore"):
            exact_N = batch.logprobs(scored.labels.hidden_ND.astype(np.float64), sequence)
        scored.token_logprobs_P[:] = exact_N[told]
    assert np.isneginf(batch.scored[0].token_logprobs_P[0])
    batch.check()
    states = [scored.labels.hidden_ND for scored in batch.scored]
    states[0] = np.concatenate([states[0][:1], np.roll(states[0][1:], 1, axis=0)])
    with pytest.raises(LabelMismatchError, match="'sequence 0'"):
        batch.check(states=states)


def test_no_labelled_position_is_no_mismatch() -> None:
    nothing = TokenSequence(id="none", token_ids=[1, 2], label_positions=[])
    scored = ScoredSequence(
        id="none",
        sequence_hash=b"",
        token_logprobs_P=np.empty(0, np.float32),
        labels=ExactLabels(hidden_ND=np.empty((0, WIDTH), np.float32)),
    )
    head = OutputHead(weight_RD=torch.ones(VOCAB, WIDTH))
    require_aligned(ExactTargets(hidden_NE=torch.empty(0, WIDTH), head=head), [scored], [nothing])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_teacher_that_goes_wrong_in_mid_run_stops_it(
    encoding: str,
    make_run: MakeRun,
    kd_settings: Settings,
    teacher_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_wrong(monkeypatch, at=kd_settings.teacher_address)
    distillation = {"labels": ENCODINGS[encoding]}
    spec = make_run(alpha=1.0, distillation=distillation, training={"checkpoint_steps": 1})
    with stopped(tmp_path / "run", teacher=teacher_model):
        train(spec, out=tmp_path / "run", settings=kd_settings)
