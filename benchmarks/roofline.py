"""What a machine's memory allows: how fast it can be read, and what a round must read of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtpdecode
from mtpdecode.target import lm_head_of


def readers(num_bytes: int, device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (a function that goes through memory much larger than the caches, the bytes that it moves)."""
    numbers = torch.ones(num_bytes // 4, device=device)
    width = 1024
    matrix, vector = numbers[: len(numbers) // width * width].view(-1, width), torch.ones(width, device=device)
    half, other = numbers.chunk(2)[0], torch.empty_like(numbers.chunk(2)[0])
    return {
        "read: sum": (numbers.sum, numbers.nbytes),
        "read: matrix times vector": (lambda: matrix @ vector, matrix.nbytes),
        "copy": (lambda: other.copy_(half), 2 * half.nbytes),
    }


def bandwidth(entry: tuple[Callable[[], Any], int], device: torch.device) -> float:
    """Bytes a second of one of `readers`."""
    function, num_bytes = entry
    start = _now(device)
    function()
    return num_bytes / (_now(device) - start)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def round_bytes(decoder: mtpdecode.MTPDecoder, num_speculative_tokens: int, num_committed: float) -> dict[str, float]:
    """What a round reads at least, by kind, from a decoder that has decoded: every pass over weights counts, even where a cache
    may still hold them. Embedding rows, activations and what is written are left out; experts count as if all were chosen, and
    sliding layers as if they saw everything.

    num_committed  tokens in the target's cache, all rows together
    """
    steps, head = range(num_speculative_tokens), decoder.head
    slots = [_slot_bytes(decoder, index) for index in range(len(decoder.cache.layers))]
    drafted = slots[head.config.block_origin] * len(head.blocks) / head.num_layers
    return {
        "target: weights": target_bytes(decoder.target),
        "target: keys and values": num_committed * sum(slots),
        "head: weights": sum(_layer_bytes(head, head.layer_for(step)) for step in steps),
        "head: vocabulary": sum(_draft_bytes(head, head.layer_for(step)) for step in steps),
        "head: keys and values": num_committed * drafted * num_speculative_tokens,
    }


def _slot_bytes(decoder: mtpdecode.MTPDecoder, layer: int) -> int:
    """The key and the value of one token in one layer of the target."""
    return sum(tensor[0, :, 0].nbytes for tensor in decoder.cache.kept(layer) or ())


def target_bytes(model: Any) -> int:
    """All weights but the input embedding, which gives a row a token; one that is the output layer too is read as that."""
    output, given = lm_head_of(model).weight, model.get_input_embeddings()
    weights = {id(weight): weight for weight in model.parameters()}
    left_out = {id(weight) for weight in given.parameters()} - {id(output)}
    return sum(weight.nbytes for key, weight in weights.items() if key not in left_out)


def _layer_bytes(head: mtpdecode.MTPHead, layer: int) -> int:
    """A layer's weights but for tables over the vocabulary, which its block has none of."""
    names = ("embedding.", "lm_head.")
    return sum(weight.nbytes for name, weight in head.layers[layer].named_parameters() if not name.startswith(names))


def _draft_bytes(head: mtpdecode.MTPHead, layer: int) -> int:
    """The rows of the output layer that a draft step multiplies."""
    own = dict(head.layers[layer].named_children()).get("lm_head")
    weight = _weight(own) if own is not None else _weight(head._shared[0].lm_head)
    rows = len(weight) if head.draft_vocabulary is None or own is not None else len(head.draft_vocabulary)
    return rows * weight[0].nbytes


def _weight(module: nn.Module) -> Tensor:
    return dict(module.named_parameters())["weight"]
