"""The model hub: whether it answers, and fetching a model from it."""

import functools
import threading
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.contract.errors import ModelNotFoundError
from services.contract.settings import Settings
from services.models.directory import no_safetensors

PATIENCE_SECONDS = 3.0
BESIDE_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model"]
WEIGHTS = ["*.safetensors"]


def fetch_model(
    name: str,
    *,
    revision: str | None = None,
    settings: Settings,
    directory: Path | None = None,
    weights: bool = True,
) -> Path:
    """The local snapshot of a hub model, from the hub or, when that is out of reach, from the hub's cache.

    ``directory`` receives the files; without it they stay in the hub's cache. Only files that a causal language
    model loads from are fetched, not the repository's copies in other formats; without ``weights`` what is beside them.
    ModelNotFoundError says what to do, UnsupportedError for weights that are not there as safetensors.
    """
    online = hub_reachable(settings)
    try:
        patterns = [*BESIDE_WEIGHTS, *(WEIGHTS if weights else [])]
        snapshot = _snapshot(name, revision=revision, directory=directory, patterns=patterns, online=online)
        if weights and not any(snapshot.glob("*.safetensors")):
            raise no_safetensors(name)
    except (HFValidationError, ValueError):
        raise ModelNotFoundError(
            f"{name!r} is neither a directory nor a name that a model hub could know",
            fix="Name an existing model directory, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.",
        ) from None
    except GatedRepoError:
        raise ModelNotFoundError(
            f"the hub gives {name} only to those who accepted its licence",
            fix="Accept it on the model's page and set HF_TOKEN, or name a local directory.",
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFoundError(
            f"the hub's {name} has no revision {revision}", fix="Name one of its branches, tags or commits."
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f"the hub knows no model {name}, or keeps it private",
            fix="Check the spelling, set HF_TOKEN for a private model, or name a local directory.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError) as error:
        if online:
            raise ModelNotFoundError(
                f"the hub answers, but {name} could not be fetched: {error}",
                fix="Try again later, or name a local directory.",
            ) from None
        raise ModelNotFoundError(
            f"{name} is not a directory, and no model hub can be reached" + _why_offline(settings),
            fix=(
                "Name a local model directory, connect to the hub, or use HuggingFaceTB/SmolLM2-135M-Instruct, "
                "which needs no hub."
            ),
        ) from None
    return snapshot


def hub_reachable(settings: Settings) -> bool:
    """Whether the hub answers within a few seconds; asked once per process. False when told to stay offline."""
    if settings.offline or huggingface_hub.is_offline_mode():
        return False
    return _answers(huggingface_hub.constants.ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    """Asked in a thread of its own because a name look-up knows no timeout."""
    outcome: list[bool] = []

    def ask() -> None:
        try:
            status = httpx.head(endpoint, timeout=PATIENCE_SECONDS, follow_redirects=True).status_code
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return
        outcome.append(status < 500 and status not in (403, 407))

    thread = threading.Thread(target=ask, name="ask-hub", daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS + 1)
    return outcome == [True]


def _snapshot(name: str, *, revision: str | None, directory: Path | None, patterns: list[str], online: bool) -> Path:
    # Subfolders hold the same weights in other formats (original/, onnx/), often tens of gigabytes.
    return Path(
        huggingface_hub.snapshot_download(
            name,
            revision=revision,
            local_dir=directory,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],
            local_files_only=not online,
        )
    )


def _why_offline(settings: Settings) -> str:
    if settings.offline:
        return " (SMOOTHKD_OFFLINE is set)"
    return " (HF_HUB_OFFLINE is set)" if huggingface_hub.is_offline_mode() else ""
