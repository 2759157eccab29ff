"""The randomness of sampled decoding: one stream per prompt, whatever shares its batch."""

import hashlib

import numpy as np

from services.contract.sequences import DecodeOptions, Prompt


def draw_generator(prompt: Prompt, options: DecodeOptions) -> np.random.Generator:
    """A token is drawn by adding its Gumbel noise to the logits and taking the largest (Gumbel, 1954), which samples
    the softmax exactly.
    """
    return np.random.Generator(np.random.Philox(key=draw_seed(prompt, options, bits=128)))


def draw_seed(prompt: Prompt, options: DecodeOptions, *, bits: int) -> int:
    """Of the request's seed, the prompt's id and its tokens."""
    digest = hashlib.sha256(f"{options.seed} {prompt.id} ".encode())
    digest.update(np.asarray(prompt.token_ids, dtype="<u4").tobytes())
    return int.from_bytes(digest.digest()[: bits // 8], "little")
