"""Which weights one student has had its teacher load, and has again when the teacher went over to others."""

import logging
from collections.abc import Callable

import grpc

from services.contract.errors import HandshakeError
from services.contract.teacher.v1 import teacher_service_pb2 as pb
from student_trainer.teacher_errors import told_by_server

log = logging.getLogger(__name__)


class LoadedWeights:
    """``load``: has every replica serve the weights of a name, empty for those at their start."""

    def __init__(self, load: Callable[[str], pb.LoadModelResponse]) -> None:
        self._load = load
        self._name = ""
        self._loaded: pb.LoadModelResponse | None = None

    def load(self, name: str) -> str:
        """From now on these and no others; returns what the teacher calls them."""
        self._loaded = self._load(name)
        self._name = name
        return self._loaded.model

    def are_served(self, response: pb.GetTeacherResponse) -> bool:
        """Whether the teacher that says this serves them, or any would do."""
        return self._loaded is None or response.fingerprint == self._loaded.fingerprint

    def load_again(self) -> None:
        """HandshakeError when they are no longer what they were."""
        assert self._loaded is not None
        again = self._load(self._name)
        if again.fingerprint != self._loaded.fingerprint:
            raise HandshakeError(
                f"the weights of {again.model} have changed while they were in use: their fingerprint is "
                f"{again.fingerprint} and was {self._loaded.fingerprint}",
                fix="Start the run again; write other weights to another directory.",
            )

    def are_back(self, error: grpc.RpcError) -> bool:
        """Whether a request failed with ``error`` because the teacher went over to others, and they are back now."""
        told = told_by_server(error)
        if self._loaded is None or not isinstance(told, HandshakeError):
            return False
        log.info("%s; having %s loaded again", told.what, self._loaded.model)
        self.load_again()
        return True
