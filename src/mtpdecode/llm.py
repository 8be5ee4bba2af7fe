"""vLLM's offline interface over our decoder, so that its example runs with only the import line changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .assistant import is_assistant
from .decoder import MTPDecoder, MTPOutput
from .errors import GenerationError
from .proposer import NoDraft

CLUSTER = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
NEVER = -1
"""An end token that no model says."""


@dataclass(frozen=True)
class SamplingParams:
    """vLLM's sampling parameters, as far as they are honoured here. temperature 0 is greedy; top_k 0 or -1 is off.

    Raises GenerationError for values out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("temperature", 0), ("max_tokens", 1), ("min_tokens", 0)):
            if getattr(self, name) < least:
                raise GenerationError(f"SamplingParams({name}={getattr(self, name)}) was asked for; it must be at least {least}.")

    def ends(self, eos_ids: Sequence[int]) -> list[int]:
        """The tokens that end a text."""
        return [*([] if self.ignore_eos else eos_ids), *self.stop_token_ids]

    def options(self, eos_ids: Sequence[int]) -> dict[str, Any]:
        """The same in the words of `MTPDecoder.generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_tokens,
            "repetition_penalty": float(self.repetition_penalty),
            "num_return_sequences": self.n,
            "eos_token_id": self.ends(eos_ids) or [NEVER],
            "do_sample": self.temperature > 0,
        }
        if self.min_tokens:
            options["min_new_tokens"] = self.min_tokens
        if self.temperature > 0:
            options |= {
                "temperature": float(self.temperature),
                "top_p": self.top_p,
                "top_k": max(self.top_k, 0),
                "seed": self.seed,
            }
            options |= {"min_p": self.min_p} if self.min_p else {}
        return options


@dataclass
class CompletionOutput:
    """One text. finish_reason: "stop" at an end token or stop string, "length" at max_tokens."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    """What became of one prompt: n texts."""

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    """`LLM(model=..., speculative_config={"method": "mtp", "num_speculative_tokens": 1}).generate(prompts, SamplingParams(...))`.

    model                a folder or repository with a native MTP head and a tokenizer
    speculative_config   method "mtp"; num_speculative_tokens, by default what suits the head; model, where the head is not in the
                         target's own checkpoint, as Gemma 4's assistants. None: plain decoding
    dtype                as in transformers' from_pretrained: "auto" is the checkpoint's own

    What vLLM does for a cluster is vLLM's: its sizes must be 1. Raises GenerationError for options that are not honoured.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        speculative_config: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        _check_single_process(others)
        remote: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
        self.decoder = MTPDecoder.from_pretrained(model, dtype=dtype, **remote, **_drafting(speculative_config))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer or model, **remote)

    def generate(self, prompts: str | Sequence[str], sampling_params: SamplingParams | None = None) -> list[RequestOutput]:
        """One RequestOutput a prompt, in their order; all prompts are one batch."""
        params, texts = sampling_params or SamplingParams(), [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.tokenizer(text)["input_ids"] for text in texts]
        strings = {"stop_strings": params.stop, "tokenizer": self.tokenizer} if params.stop else {}
        inputs = _left_padded(ids, self.decoder.target.device)
        options = params.options(self._eos_ids()) | strings
        out = self.decoder.generate(**inputs, **options, pad_token_id=0, return_dict_in_generate=True)
        assert isinstance(out, MTPOutput)
        rows = [
            self._completion(row, at % params.n, params) for at, row in enumerate(_new_tokens(out, inputs["input_ids"].shape[1]))
        ]
        return [RequestOutput(str(at), text, ids[at], rows[at * params.n : (at + 1) * params.n]) for at, text in enumerate(texts)]

    def _eos_ids(self) -> list[int]:
        config: Any = self.decoder.target.generation_config
        ids = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def _completion(self, tokens: list[int], index: int, params: SamplingParams) -> CompletionOutput:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        stops = [params.stop] if isinstance(params.stop, str) else params.stop or []
        cuts = [text.find(stop) for stop in stops if stop in text]
        stopped = bool(cuts) or tokens[-1] in params.ends(self._eos_ids())
        return CompletionOutput(index, text[: min(cuts, default=len(text))], tokens, "stop" if stopped else "length")


def _check_single_process(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in CLUSTER:
            raise GenerationError(
                f"LLM({name}=...) was asked for; mtpdecode.LLM does not know it. Leave it out, or use vllm.LLM."
            )
        if value != 1:
            raise GenerationError(f"LLM({name}={value}) was asked for; one process decodes here. Use vllm.LLM for a cluster.")


def _drafting(config: dict[str, Any] | None) -> dict[str, Any]:
    """vLLM's speculative_config -> our keywords. model: an assistant of Gemma's, or where else the head is."""
    if config is None:
        return {"num_speculative_tokens": 0, "proposer": NoDraft()}
    unknown = sorted(set(config) - {"method", "num_speculative_tokens", "model"})
    if config.get("method", "mtp") != "mtp" or unknown:
        raise GenerationError(
            f"speculative_config={config} was asked for; only method 'mtp', model and num_speculative_tokens are known here. "
            'Type {"method": "mtp", "num_speculative_tokens": 1}.'
        )
    said = {name: value for name, value in config.items() if name == "num_speculative_tokens"}
    return said | ({"assistant" if is_assistant(config["model"]) else "head": config["model"]} if "model" in config else {})


def _left_padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _new_tokens(out: MTPOutput, width: int) -> list[list[int]]:
    """Per row, what was appended to prompts of `width` tokens, without the padding behind it."""
    assert out.metrics is not None
    sequences: Any = out.sequences
    return [row[width : width + sum(rounds)] for row, rounds in zip(sequences.tolist(), out.metrics.history, strict=True)]
