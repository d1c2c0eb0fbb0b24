"""Generation token by token with a KV cache, for a batch of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nestlm.errors import ConfigError, DataError
from nestlm.generation.sampling import Sampling
from nestlm.nn.decoder import Decoder
from nestlm.nn.kv_cache import KVCache
from nestlm.nn.policy import Policy

PADDING = -1  # document number of padding, to which no token attends


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    policy: Policy,
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: Set[int],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[list[int | None]]:
    """Yield the next token of every row, step by step; None for rows that have ended.

    Shorter prompts are padded on the left. Rotary positions are relative, so padding shifts nothing. No token attends
    to it, and no token bucket counts it.

    Args:
        decoder: in eval mode.
        prompts: token ids, at least one a row.
        policy: policy of the batch, see `batch_policy`.
        max_tokens: number of tokens after the prompt, for each row.
        sampling: how tokens are drawn.
        stop: token ids that end a row; they are not yielded.
        precision: returns the context in which the model runs, such as autocast.

    Raises:
        ConfigError: `max_tokens` is below 1.
        DataError: a prompt leaves no room for `max_tokens` in the model's context.
    """
    check_lengths([len(prompt) for prompt in prompts], max_tokens=max_tokens, context=decoder.config.context_length)
    device = decoder.embed.weight.device
    tokens_BL, documents_BL = left_padded(prompts, device=device)
    batch, length = tokens_BL.shape
    going_on = [True] * batch
    with precision():
        cache = KVCache(
            decoder.config,
            batch_size=batch,
            length=length + max_tokens,
            device=device,
            dtype=torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else decoder.embed.weight.dtype,
        )
    for number in range(max_tokens):
        with precision():
            output = decoder(tokens_BL, policy, documents_BL=documents_BL, cache=cache, last=1)
        chosen_B = sampling.pick(output.logits_BLV[:, -1].float(), number=number)
        picked = chosen_B.tolist()
        going_on = [going and token not in stop for going, token in zip(going_on, picked, strict=True)]
        if not any(going_on):
            return
        yield [token if going else None for going, token in zip(going_on, picked, strict=True)]
        tokens_BL = chosen_B[:, None]
        documents_BL = None if documents_BL is None else torch.zeros_like(tokens_BL)


def left_padded(prompts: Sequence[Sequence[int]], *, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad prompts on the left.

    Returns:
        Tokens (B, L), and document numbers (B, L), PADDING where padded; None where no prompt is padded.
    """
    length = max(map(len, prompts))
    tokens_BL = torch.zeros(len(prompts), length, dtype=torch.long)
    documents_BL = torch.full_like(tokens_BL, PADDING)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, length - len(prompt) :] = torch.tensor(prompt)
        documents_BL[row, length - len(prompt) :] = 0
    padded = min(map(len, prompts)) < length
    return tokens_BL.to(device), documents_BL.to(device) if padded else None


def check_lengths(lengths: Sequence[int], *, max_tokens: int, context: int) -> None:
    """Raise ConfigError or DataError unless prompts and `max_tokens` new tokens fit into a context of a length."""
    if max_tokens <= 0:
        raise ConfigError(f"max_tokens: got {max_tokens}, wanted 1 or more")
    longest, total = max(lengths), max(lengths) + max_tokens
    if total > context:
        cure = f"ask for at most {context - longest} tokens, or " if longest < context else ""
        raise DataError(
            f"prompt: has {longest} tokens, with max_tokens={max_tokens} that is {total}, wanted at most "
            f"model.context_length={context}; {cure}shorten it by {total - context}"
        )
