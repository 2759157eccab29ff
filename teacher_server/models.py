"""What a server serves now, and the switch to other weights while it does.

A request belongs to the weights that it began with: it ends on them, or in an error that says to ask again.
"""

import asyncio
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from services.contract.errors import (
    HandshakeError,
    OverloadedError,
    TeacherError,
    TeacherUnavailableError,
    UnsupportedError,
)
from services.contract.settings import Settings
from teacher_server.determinism import determinism_spread
from teacher_server.engine import ENGINE_FAILED, Engine, TeacherCard
from teacher_server.engines import EngineSource, engine_source
from teacher_server.former import FormerEngine
from teacher_server.in_thread import in_daemon_thread
from teacher_server.options import TeacherOptions
from teacher_server.self_check import self_check
from teacher_server.served import Checked, Served
from teacher_server.tokenizer import require_same_tokenizer
from teacher_server.weights import Weights, find_replacement

logger = logging.getLogger(__name__)

IDLE_SECONDS = 5.0
"""Weights that nobody has used for so long may give way at once."""

LEAST_SECONDS = 30.0
"""How long weights in use are served before others may take their place, or five times as long as they took to load:
students of two teachers then take turns instead of loading all the time."""

SUSPECT_SPREAD = 0.1
"""Nats; 16-bit arithmetic gives hundredths."""


class Models:
    """Answers TeacherUnavailableError until ``start`` has ended. All methods belong to one event loop."""

    def __init__(self, settings: Settings, options: TeacherOptions) -> None:
        self._settings = settings
        self._options = options
        self._roots = [settings.data_dir, *options.allow_models_below]
        self._source: EngineSource | None = None
        self._started_with: Checked | None = None
        self._served: Served | None = None
        self._paused = False
        self._switching = asyncio.Lock()
        self._former: dict[str, Served] = {}

    async def start(self) -> Checked:
        """Load and check the weights that the options name."""
        settings, options = self._settings, self._options
        self._source = await in_daemon_thread(lambda: engine_source(settings, options), name="teacher-load")
        served = await self._checked(self._source, self._source.start_weights())
        self._started_with = served.checked
        self._replace(served)
        return served.checked

    def close(self) -> None:
        """Stop the engine, if one is serving."""
        if self._served is not None:
            self._served.engine.close()
        if self._source is not None:
            self._source.close()

    @property
    def current(self) -> Served:
        """What is served. TeacherUnavailableError while nothing is."""
        if self._served is None:
            raise TeacherUnavailableError("the teacher is still loading its model", fix="Ask again in a while.")
        if self._paused:
            raise TeacherUnavailableError("the teacher is loading other weights", fix="Ask again in a while.")
        return self._served

    @contextmanager
    def in_use(self, fingerprint: str = "") -> Iterator[Served]:
        """What is served, around a request that computes: its weights stay as they are until the block ends.

        With the ``fingerprint`` of weights that were served before: an engine that computes nothing, for what is in
        the label cache.
        """
        served = self._former.get(fingerprint) or self.current
        with served.in_use():
            yield served

    def named(self, model: str) -> Checked:
        """What ``model`` means: what is served, also where it is empty, or what the server was started with.

        HandshakeError for a name of neither.
        """
        served = self.current.checked
        assert self._started_with is not None
        for candidate in (served, self._started_with):
            if not model or candidate.weights.is_called(model):
                return candidate
        raise HandshakeError(
            f"this teacher serves {served.card.model}, not {model}",
            fix=f"Start the teacher with --model {model}, or name {served.card.model} as teacher.model.",
            details={"served": served.card.model, "asked": model[:200]},
        )

    async def load(self, model: str) -> Checked:
        """Serve the weights that ``model`` names from now on; empty goes back to those at the start.

        Whatever is wrong with them, what was served before is served on. OverloadedError while students use weights
        that were loaded a moment ago.
        """
        # A caller that goes away must not leave half a switch behind.
        return await asyncio.shield(asyncio.ensure_future(self._load(model)))

    async def _load(self, model: str) -> Checked:
        async with self._switching:
            before = self.current
            assert self._source is not None
            assert self._started_with is not None
            start = self._started_with.weights
            weights = await asyncio.to_thread(
                find_replacement, model, start=start, roots=self._roots, settings=self._settings
            )
            if weights == before.checked.weights:
                return before.checked
            if weights.directory != start.directory:
                tokenizers = [await asyncio.to_thread(self._source.tokenizer, each) for each in (weights, start)]
                require_same_tokenizer(tokenizers[0], tokenizers[1], name=weights.name)
            _require_turn(before)
            logger.info("loading %s", weights.name)
            if self._source.in_place:
                served = await self._load_in_place(self._source, weights, before=before)
            else:
                served = await self._checked(self._source, weights)
            self._replace(served)
            return served.checked

    async def _load_in_place(self, source: EngineSource, weights: Weights, *, before: Served) -> Served:
        self._paused = True
        try:
            await before.drain()
            try:
                return await self._checked(source, weights)
            except Exception:
                await self._restore(source, before.checked)
                raise
        finally:
            self._paused = False

    async def _restore(self, source: EngineSource, before: Checked) -> None:
        logger.warning("going back to %s", before.card.model)
        try:
            restored = await self._checked(source, before.weights)
            if restored.checked.card.fingerprint != before.card.fingerprint:
                raise TeacherError(
                    f"the files of {before.card.model} have changed since they were loaded",
                    fix="Start the teacher again; write other weights to another directory.",
                )
        except Exception:
            logger.critical("the former weights cannot be loaded again; ending so that the supervisor starts anew")
            os.kill(os.getpid(), ENGINE_FAILED)
            raise
        self._replace(restored)

    async def _checked(self, source: EngineSource, weights: Weights) -> Served:
        """Weights loaded, and their labels compared with the model's own distribution."""
        began = time.monotonic()
        engine = await _load_engine(source, weights)
        try:
            card = engine.describe()
            self._require_same_size(card)
            label_dtype = self._options.resolved_label_dtype(card.weights_dtype)
            check = await self_check(engine, label_dtype=label_dtype)
            spread = await determinism_spread(engine)
        except BaseException:
            engine.close()
            raise
        logger.info(
            "checked %s (%s, %s, fingerprint %s): logits within %.1e; labels in %s add a KL divergence of %.1e nats; "
            "the make-up of batches changes log-probabilities by up to %.1e nats",
            card.model,
            card.engine,
            card.weights_dtype,
            card.fingerprint,
            check.logit_error,
            label_dtype,
            check.label_divergence,
            spread,
        )
        if not spread <= SUSPECT_SPREAD:
            logger.warning("a token's log-probability varies by %.2f nats with what is computed beside it", spread)
        checked = Checked(
            weights=weights,
            card=card,
            label_dtype=label_dtype,
            determinism_spread=spread,
            load_seconds=time.monotonic() - began,
        )
        return Served(engine, checked)

    def _require_same_size(self, card: TeacherCard) -> None:
        start = self._started_with.card if self._started_with else card
        if (card.vocab_size, card.hidden_size) != (start.vocab_size, start.hidden_size):
            raise HandshakeError(
                f"{card.model} has {card.vocab_size} tokens and {card.hidden_size} hidden units, the model that this "
                f"teacher was started with {start.vocab_size} and {start.hidden_size}",
                fix=f"Start a teacher of its own with --model {card.model}.",
            )

    def _replace(self, served: Served) -> None:
        before, self._served = self._served, served
        self._former.pop(served.checked.card.fingerprint, None)
        if before is None:
            return
        if before.checked.card.fingerprint != served.checked.card.fingerprint:
            former = FormerEngine(before.engine, current=lambda: self.current.engine)
            self._former[before.checked.card.fingerprint] = Served(former, before.checked)
        before.retire()


def _require_turn(before: Served) -> None:
    least = max(LEAST_SECONDS, 5 * before.checked.load_seconds)
    left = before.began + least - time.monotonic()
    if left > 0 and before.idle_seconds() < IDLE_SECONDS:
        raise OverloadedError(
            f"students are using {before.checked.card.model}, which was loaded a moment ago",
            fix=f"Ask again in {left:.0f} seconds, or start a teacher for each model.",
            details={"retry_after_seconds": f"{min(left, IDLE_SECONDS):.1f}"},
        )


async def _load_engine(source: EngineSource, weights: Weights) -> Engine:
    try:
        return await source.load(weights)
    except (MemoryError, RuntimeError, ValueError, OSError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "trust_remote_code" in str(error):
            raise UnsupportedError(
                f"{weights.name} brings code of its own, which the teacher does not run unasked",
                fix="Read that code; if you trust it, start the teacher with --trust-remote-code.",
            ) from error
        if "AutoModelForCausalLM" in reason:
            raise UnsupportedError(
                f"{weights.name} is no causal language model, and only these can teach",
                fix="Serve a decoder such as Llama, Qwen or Gemma.",
            ) from error
        raise TeacherError(
            f"{weights.name} cannot be loaded: {reason}",
            fix="If memory ran out, there is no room for two models: start the teacher again with --model. Otherwise "
            "the files are damaged or of another architecture.",
        ) from error
