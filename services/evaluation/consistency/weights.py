"""The consistency model on disk: the encoder, the trained network, and a card that says how it came about."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from services.contract.errors import InvalidInputError
from services.evaluation.consistency.encoding import Encoder
from services.evaluation.consistency.network import ConsistencyNetwork

SHIPPED = Path(__file__).parent / "shipped"
WEIGHTS = "network.safetensors"
CARD = "card.json"


def read_model(folder: Path) -> tuple[ConsistencyNetwork, Encoder, dict[str, Any]]:
    """Network, encoder and card. InvalidInputError for a folder without them, or with those of another version."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        network = ConsistencyNetwork()
        network.load_state_dict(load_file(folder / WEIGHTS))
        encoder = Encoder(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(
            f"{folder} holds no consistency model of this version: {error}",
            fix="Name a folder that python -m services.evaluation.consistency.train wrote with this version.",
        ) from None
    return network.eval(), encoder, card


def write_network(network: ConsistencyNetwork, folder: Path, *, card: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / WEIGHTS)
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
