"""Commands with many options: one dataclass holds them, and the command takes that."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Options = TypeVar("Options")


def taking(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Let a function of one argument be a command of typer, with the fields of the dataclass as its options.

    Typer reads options off a function's signature; so this one has that of the dataclass. Its doc string stays.
    """

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def from_options(**values: Any) -> None:
            command(options(**values))

        from_options.__signature__ = inspect.signature(options)  # type: ignore[attr-defined]
        return from_options

    return decorate
