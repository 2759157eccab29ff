"""Sentences as MiniLM's hidden states, read in the context of their neighbours.

Shapes: N chunks, T word pieces, D the encoder's hidden size times the number of layers kept.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from services.evaluation.consistency.eight_bits import read_eight_bits, write_eight_bits
from services.evaluation.consistency.text import Word

WEIGHTS = "encoder.safetensors"
CONFIG = "encoder.json"
TOKENIZER = "tokenizer.json"

CHUNK_PIECES = 254
LAYERS = (2, 6)
"""A low layer, which knows the word, and the last one, which knows what the sentence says of it."""

HIDDEN = 384 * len(LAYERS)
_CLS, _SEP = 101, 102


def write_encoder(source: Path, folder: Path) -> None:
    """The published encoder in the directory ``source`` as the files that ``Encoder`` reads, 23 MB.

    OSError or SafetensorError for a source that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(source / "model.safetensors")
    # The file also holds a pooler, and positions that the library makes itself.
    names = BertModel(BertConfig.from_pretrained(source), add_pooling_layer=False).state_dict()
    write_eight_bits({name: weights[name] for name in names}, folder / WEIGHTS)
    shutil.copyfile(source / "config.json", folder / CONFIG)
    shutil.copyfile(source / "tokenizer.json", folder / TOKENIZER)


@dataclass(frozen=True, slots=True)
class EncodedSentence:
    """``states_TD`` in float16; ``word_of_piece``: the index of the word a piece belongs to, -1 for punctuation."""

    states_TD: torch.Tensor
    word_of_piece: list[int]


@dataclass(frozen=True, slots=True)
class Text:
    """A text's sentences, the words of each, and the indices of those whose states are wanted."""

    sentences: Sequence[str]
    words: Sequence[list[Word]]
    wanted: set[int]


class Encoder:
    """The frozen encoder. Texts are lists of sentences; neighbours are read together, up to CHUNK_PIECES pieces."""

    def __init__(self, folder: Path, *, precision: torch.dtype = torch.float32) -> None:
        """From what ``write_encoder`` left in ``folder``.

        bfloat16 is several times faster on processors that have it, and much slower on others. OSError, ValueError,
        RuntimeError or SafetensorError for a folder without an encoder.
        """
        self._precision = precision
        self._tokenizer = Tokenizer.from_buffer((folder / TOKENIZER).read_bytes())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = BertConfig.from_json_file(folder / CONFIG)
        self._model = BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)
        self._model.load_state_dict(read_eight_bits(folder / WEIGHTS))

    def encode(self, texts: Sequence[Text], *, batch_size: int = 16) -> list[dict[int, EncodedSentence]]:
        """For each text at least the wanted sentences, by index.

        A chunk's borders depend on the text alone, so that a sentence's states do not depend on what else is wanted.
        """
        chunks = []
        for index, text in enumerate(texts):
            encodings = self._tokenizer.encode_batch(list(text.sentences), add_special_tokens=False)
            pieces = [encoding.ids[:CHUNK_PIECES] for encoding in encodings]
            offsets = [encoding.offsets[:CHUNK_PIECES] for encoding in encodings]
            owners = [_owners(own, words) for own, words in zip(offsets, text.words, strict=True)]
            for chunk in _chunks(pieces):
                if text.wanted & set(chunk):
                    chunks.append((index, chunk, pieces, owners))
        found: list[dict[int, EncodedSentence]] = [{} for _ in texts]
        order = sorted(range(len(chunks)), key=lambda index: sum(len(chunks[index][2][s]) for s in chunks[index][1]))
        for first in range(0, len(order), batch_size):
            batch = [chunks[index] for index in order[first : first + batch_size]]
            states_NTD = self._states([[piece for s in chunk for piece in pieces[s]] for _, chunk, pieces, _ in batch])
            for row, (owner, chunk, pieces, owners) in enumerate(batch):
                place = 1
                for sentence in chunk:
                    end = place + len(pieces[sentence])
                    found[owner][sentence] = EncodedSentence(states_NTD[row, place:end].clone(), owners[sentence])
                    place = end
        return found

    @torch.no_grad()
    def _states(self, rows: list[list[int]]) -> torch.Tensor:
        longest = max(map(len, rows)) + 2
        ids_NT = np.zeros((len(rows), longest), dtype=np.int64)
        mask_NT = np.zeros_like(ids_NT)
        for index, row in enumerate(rows):
            ids_NT[index, : len(row) + 2] = [_CLS, *row, _SEP]
            mask_NT[index, : len(row) + 2] = 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self._precision == torch.bfloat16):
            output = self._model(
                input_ids=torch.from_numpy(ids_NT), attention_mask=torch.from_numpy(mask_NT), output_hidden_states=True
            )
        return torch.cat([output.hidden_states[layer] for layer in LAYERS], dim=-1).half()


def _chunks(pieces: list[list[int]]) -> list[list[int]]:
    chunks: list[list[int]] = []
    size = CHUNK_PIECES + 1
    for index, sentence in enumerate(pieces):
        if size + len(sentence) > CHUNK_PIECES:
            chunks.append([])
            size = 0
        chunks[-1].append(index)
        size += len(sentence)
    return chunks


def _owners(offsets: list[tuple[int, int]], words: list[Word]) -> list[int]:
    owners = []
    word = 0
    for start, _ in offsets:
        while word < len(words) and words[word].end <= start:
            word += 1
        owners.append(word if word < len(words) and words[word].start <= start else -1)
    return owners
