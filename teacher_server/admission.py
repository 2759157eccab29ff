"""How much each client may have waiting, and how much may be held for it; what is beyond is told to come back."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.contract.errors import OverloadedError

_MIB = 1024 * 1024
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_UNKNOWN_WAIT = 5.0
_RATE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of requests: those under way (``streams``), their sequences that have no labels yet, and the tokens of these.

    ``held_bytes`` bounds the memory of these requests and of labels that are being computed or wait to be read; each
    stream may have one sequence's labels beyond that. A client with nothing waiting may always send one request.
    """

    streams_per_client: int = 32
    sequences_per_client: int = 4096
    held_bytes_per_client: int = 14 * _MIB
    streams: int = 1024
    sequences: int = 65_536
    tokens: int = 2**24
    held_bytes: int = 1024 * _MIB


class Admission:
    """The books of one server; belongs to its event loop."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.streams = 0
        self.sequences = 0
        self.tokens = 0
        self.held_bytes = 0
        self.label_bytes = 0
        self._clients: dict[str, _Client] = {}
        self._done: deque[tuple[float, int, int]] = deque(maxlen=256)

    @property
    def clients(self) -> int:
        """Those with a request under way."""
        return len(self._clients)

    @contextmanager
    def stream(self, client: str, *, sequences: int, tokens: int, request_bytes: int = 0) -> Iterator["Stream"]:
        """One request, of so many sequences or prompts. OverloadedError when too many are under way."""
        account = self._clients.get(client) or _Client()
        if account.streams >= self.limits.streams_per_client or self.streams >= self.limits.streams:
            seconds = self._seconds_for(sequences=self.sequences / max(1, self.streams))
            raise _overloaded(
                f"{account.streams} requests of this client and {self.streams} in all are under way", seconds
            )
        self._clients[client] = account
        stream = Stream(self, client, account, sequences=sequences, tokens=tokens, request_bytes=request_bytes)
        account.streams += 1
        self.streams += 1
        try:
            yield stream
        finally:
            stream.close()
            account.streams -= 1
            self.streams -= 1
            if not account.streams:
                del self._clients[client]

    def require_room(self, account: "_Client", *, sequences: int, tokens: int) -> None:
        """OverloadedError where so much more may not wait."""
        limits = self.limits
        excess = account.sequences + sequences - limits.sequences_per_client
        if account.sequences and excess > 0:
            # The client only gets its share of what the engine does.
            share = sum(1 for other in self._clients.values() if other.sequences)
            raise _overloaded(
                f"{account.sequences} sequences of this client are waiting, and at most "
                f"{limits.sequences_per_client} may",
                self._seconds_for(sequences=excess * share),
            )
        excess, excess_tokens = self.sequences + sequences - limits.sequences, self.tokens + tokens - limits.tokens
        if self.sequences and (excess > 0 or excess_tokens > 0):
            raise _overloaded(
                f"{self.sequences} sequences with {self.tokens} tokens are waiting for this teacher",
                max(self._seconds_for(sequences=excess), self._seconds_for(tokens=excess_tokens)),
            )

    def note_done(self, *, tokens: int) -> None:
        """A sequence has its labels: what the engine does per second follows from these."""
        self._done.append((time.monotonic(), 1, tokens))

    def _seconds_for(self, *, sequences: float = 0, tokens: float = 0) -> float:
        """How long so much work takes at the rate of the last half minute."""
        now = time.monotonic()
        recent = [done for done in self._done if now - done[0] < _RATE_SECONDS]
        if not recent:
            return _UNKNOWN_WAIT
        elapsed = max(now - recent[0][0], 0.1)
        per_sequence = elapsed / sum(done[1] for done in recent)
        per_token = elapsed / sum(done[2] for done in recent)
        return max(sequences * per_sequence, tokens * per_token)


class Stream:
    """One request's part of the books. ``client`` is whom it counts for."""

    def __init__(
        self,
        admission: Admission,
        client: str,
        account: "_Client",
        *,
        sequences: int,
        tokens: int,
        request_bytes: int,
    ) -> None:
        self.client = client
        self._admission = admission
        self._account = account
        self._sequences = sequences
        self._tokens = tokens
        self._reserved = False
        self._refusal: OverloadedError | None = None
        self._request_bytes = request_bytes
        self._label_bytes = 0
        self._count(request_bytes)

    def reserve(self) -> None:
        """Count what this request still lacks as waiting; OverloadedError where there was no room for it."""
        if self._reserved:
            return
        if self._refusal is None:
            try:
                self._admission.require_room(self._account, sequences=self._sequences, tokens=self._tokens)
            except OverloadedError as error:
                self._refusal = error
        if self._refusal is not None:
            raise self._refusal.with_traceback(None)
        self._reserved = True
        self._wait_for(sequences=self._sequences, tokens=self._tokens)

    def finish(self, *, tokens: int) -> None:
        """One sequence waits no longer."""
        self._sequences -= 1
        self._tokens -= tokens
        if self._reserved:
            self._wait_for(sequences=-1, tokens=-tokens)
            self._admission.note_done(tokens=tokens)

    def may_hold(self, size: int) -> bool:
        """Whether labels of ``size`` bytes may be computed now; the stream's first always may."""
        limits = self._admission.limits
        within = self._account.held_bytes + size <= limits.held_bytes_per_client
        return not self._label_bytes or (within and self._admission.held_bytes + size <= limits.held_bytes)

    def hold(self, size: int) -> None:
        """Count labels that are being computed or wait to be read; a negative size when they have gone."""
        self._label_bytes += size
        self._admission.label_bytes += size
        self._count(size)

    def close(self) -> None:
        """Whatever was left waits no longer."""
        self.hold(-self._label_bytes)
        self._count(-self._request_bytes)
        if self._reserved:
            self._wait_for(sequences=-self._sequences, tokens=-self._tokens)

    def _count(self, size: int) -> None:
        self._account.held_bytes += size
        self._admission.held_bytes += size

    def _wait_for(self, *, sequences: int, tokens: int) -> None:
        self._account.sequences += sequences
        self._admission.sequences += sequences
        self._admission.tokens += tokens


@dataclass
class _Client:
    streams: int = 0
    sequences: int = 0
    held_bytes: int = 0


def _overloaded(what: str, seconds: float) -> OverloadedError:
    seconds = min(max(seconds, _SHORTEST_WAIT), _LONGEST_WAIT)
    return OverloadedError(
        what,
        fix=f"Ask again in {seconds:.0f} seconds, with fewer sequences at a time, or start more teachers.",
        details={"retry_after_seconds": f"{seconds:.1f}"},
    )
