"""Whether the process lives, and whether it can take work."""

from collections.abc import Callable

from fastapi import APIRouter

from services.api.dependencies import QueueHere, StoreHere
from services.api.document import PROBLEMS
from services.contract.errors import SmoothKDError
from services.contract.records import Readiness

router = APIRouter(tags=["health"])


class NotReadyError(SmoothKDError):
    """A part that the API depends on does not answer."""

    reason = "not_ready"
    http_status = 503


@router.get("/healthz")
async def get_health() -> dict[str, str]:
    """The process is alive; says nothing about what it depends on."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: PROBLEMS["5XX"]})
def get_readiness(store: StoreHere, queue: QueueHere) -> Readiness:
    """Store and queue answer; the problem otherwise says which does not."""
    checks = {"store": store.change_counter, "queue": queue.ping}
    failed = {name: error for name, check in checks.items() if (error := _failure(check))}
    if failed:
        raise NotReadyError(
            "; ".join(f"{name}: {error.what}" for name, error in failed.items()),
            fix=" ".join(dict.fromkeys(error.fix for error in failed.values())),
            details={name: failed[name].what if name in failed else "ok" for name in checks},
        )
    return Readiness(ready=True, store="ok", queue="ok")


def _failure(check: Callable[[], object]) -> SmoothKDError | None:
    try:
        check()
    except SmoothKDError as error:
        return error
    return None
