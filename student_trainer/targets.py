"""What the soft term of the loss is taken against: a batch's labels as tensors beside the student.

Shape suffixes: N response positions, E the teacher's hidden size, D the student's, V the vocabulary, K kept tokens, M
distinct drawn tokens of all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from student_trainer.output_head import OutputHead


@dataclass(frozen=True, kw_only=True, eq=False)
class ExactTargets:
    """The teacher's final hidden states and the head that turns them into its logits."""

    hidden_NE: Tensor
    head: OutputHead


@dataclass(frozen=True, kw_only=True, eq=False)
class FullTargets:
    """The teacher's log-probabilities of the whole vocabulary at temperature 1."""

    logprobs_NV: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class TopKTargets:
    """The teacher's likeliest tokens at the loss's temperature and the mass of all others, one ghost bucket.

    ``ids_NK`` int64; ``logprobs_NK`` under the full softmax; ``tail_mass_N``.
    """

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_mass_N: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class SampledTargets:
    """Tokens drawn from the teacher's distribution at the loss's temperature, ragged.

    Position n has the entries from ``offsets[n]`` to ``offsets[n + 1]`` of ``ids_M`` (int64, each once) and
    ``weights_M`` (counts divided by the number of draws); ``offsets`` has N + 1 and stays on the host.
    """

    ids_M: Tensor
    weights_M: Tensor
    offsets: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectedTargets:
    """The mean row of the student's own, frozen output head under the teacher's distribution at the loss's
    temperature, and the mean of its bias, None for a head without one.
    """

    embedding_ND: Tensor
    bias_N: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class UniversalTargets:
    """Labels of a teacher with another tokenizer: one at each of the positions ``rows``, which ascend and stay on the
    host. Its vocabulary is its own.
    """

    labels: ExactTargets | FullTargets | TopKTargets
    rows: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedTargets:
    """Several teachers: the mean of their distributions at the loss's temperature by ``weights``, which add up to 1."""

    parts: Sequence[ExactTargets | FullTargets]
    weights: Sequence[float]


SoftTargets = (
    ExactTargets | FullTargets | TopKTargets | SampledTargets | ProjectedTargets | UniversalTargets | MixedTargets
)
