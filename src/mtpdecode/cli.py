"""The command line: decode prompts plainly and with the MTP head, show both as they come, then a card."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from .decoder import MTPDecoder
from .errors import GenerationError, MTPDecodeError
from .metrics import Metrics
from .parity import Divergence, first_divergence
from .presets import DEFAULT, PRESETS, load

PROMPTS = (
    "Explain what a hash table is, in two sentences.",
    "Write a Python function that returns the prime numbers up to n.",
    "Why does the sky turn red in the evening?",
)
WARM_UP_TOKENS = 8
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Decoding:
    """What one way of decoding gave for one prompt.

    tokens   the new token ids        seconds  wall clock, the prompt included
    """

    tokens: list[int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, decoded both ways. divergence: None where the texts are equal, or were sampled and so cannot be compared."""

    prompt: str
    plain: Decoding
    mtp: Decoding
    metrics: Metrics
    divergence: Divergence | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. -> exit status: 0, 2 for what the user can put right (with a message), 130 after an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except MTPDecodeError as error:
        print(f"mtpdecode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmtpdecode: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"Loading {options.model} ...", flush=True)
    decoder, tokenizer = load(options.model, dtype=options.dtype, device_map=options.device)
    prompts = [(prompt, _encode(tokenizer, prompt, options.raw)) for prompt in options.prompts or PROMPTS]
    # The first calls pay for allocations and kernels, and a request that cannot be honoured is refused before any text comes.
    for decode in (_decode_mtp, _decode_plain):
        decode(decoder, prompts[0][1], options, WARM_UP_TOKENS, None)
    comparisons = [_compare(decoder, tokenizer, prompt, ids, options) for prompt, ids in prompts]
    _show_card(comparisons, decoder, lambda token: repr(tokenizer.decode([token])), options)
    if options.json:
        print(json.dumps(_report(comparisons, decoder, options)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mtpdecode", description="Plain and MTP decoding of a model, side by side.")
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what to answer or, with --raw, to continue (default: three built-in ones)")
    add("--model", default=DEFAULT, help=f"preset ({', '.join(PRESETS)}), folder or hub repo (default: %(default)s)")
    add("--max-new-tokens", type=_number(int, 1), default=128, metavar="N", help="default: %(default)s")
    add("--num-speculative-tokens", type=_number(int, 0), default=3, metavar="K", help="drafted a round (default: %(default)s)")
    add("--temperature", type=_number(float, 0), default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=_number(int, 0), default=0, metavar="N", help="when sampling (default: off)")
    add("--top-p", type=_number(float, 0, 1), default=1.0, metavar="P", help="when sampling (default: off)")
    add("--seed", type=_number(int, 0), default=0, help="when sampling (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 for a preset, else the checkpoint's own")
    add("--device", type=_device, metavar="NAME", help="cuda, cuda:1, cpu, auto ... (default: where the model loads, the CPU)")
    add("--threads", type=_number(int, 1), metavar="N", help="CPU threads (default: torch's choice)")
    add("--raw", action="store_true", help="continue the prompt as it stands, without the chat template")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def _number(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more" + (f", up to {high}" if math.isfinite(high) else ""))
        return value

    parse.__name__ = kind.__name__  # argparse's own word for what is not a number at all
    return parse


def _device(text: str) -> str:
    try:
        if text != "auto":
            torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return text


# ── decoding ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> Tensor:
    """(1, P) the prompt's tokens, as a user's turn where the tokenizer has a chat template."""
    if raw or not tokenizer.chat_template:
        ids = tokenizer(prompt)["input_ids"]
    else:
        # As text first: the template writes its own special tokens, and the tokenizer must not add a second pair.
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise GenerationError(f"The prompt {prompt!r} has no tokens. Give some text to continue.")
    return torch.tensor([ids])


def _compare(
    decoder: MTPDecoder, tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Tensor, options: argparse.Namespace
) -> Comparison:
    print(f"\n═══ {prompt}")
    print("\n── plain decoding", flush=True)
    plain = _decode_plain(
        decoder, ids, options, options.max_new_tokens, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    print(f"── MTP decoding, {options.num_speculative_tokens} draft tokens a round", flush=True)
    mtp = _decode_mtp(
        decoder, ids, options, options.max_new_tokens, TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    metrics, parted = decoder.metrics, None
    assert metrics is not None  # a call has just ended
    if not options.temperature:
        parted = first_divergence(decoder.target, ids[0].tolist(), plain.tokens, mtp.tokens)
    return Comparison(prompt, plain, mtp, metrics, parted)


def _decode_plain(decoder: MTPDecoder, ids: Tensor, options: argparse.Namespace, num_tokens: int, streamer: Any) -> Decoding:
    torch.manual_seed(options.seed)
    generate: Callable[..., Any] = decoder.target.generate  # type: ignore[assignment]  # nn.Module's attributes are untyped
    return _timed(generate, decoder, ids, num_tokens, streamer=streamer, **_sampling(options))


def _decode_mtp(decoder: MTPDecoder, ids: Tensor, options: argparse.Namespace, num_tokens: int, streamer: Any) -> Decoding:
    ours = {"num_speculative_tokens": options.num_speculative_tokens}
    if options.temperature:
        ours["seed"] = options.seed
    return _timed(decoder.generate, decoder, ids, num_tokens, streamer=streamer, **_sampling(options), **ours)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The same for both ways, and nothing but what was asked: transformers would cut to 50 tokens without a word."""
    if not options.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}


def _timed(generate: Callable[..., Any], decoder: MTPDecoder, ids: Tensor, num_tokens: int, **keywords: Any) -> Decoding:
    ids = ids.to(decoder.target.device)
    start = time.perf_counter()
    output = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **keywords)
    tokens = output[0, ids.shape[1] :].tolist()  # waits for the device
    return Decoding(tokens, time.perf_counter() - start)


# ── reporting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _speed(texts: Sequence[Decoding]) -> float:
    """Tokens per second."""
    return sum(len(text.tokens) for text in texts) / sum(text.seconds for text in texts)


def _verdict(comparisons: Sequence[Comparison], spell: Callable[[int], str], sampled: bool) -> list[str]:
    if sampled:
        return ["sampled: the same law, not the same text (the two draw different random numbers)"]
    parted = [(number, c.divergence) for number, c in enumerate(comparisons, 1) if c.divergence]
    if not parted:
        return [f"yes: every token of {len(comparisons)} greedy text{'s' * (len(comparisons) > 1)}"]
    lines = [f"prompt {number}, {divergence.describe(spell)}" for number, divergence in parted]
    # Several tokens in one pass round differently from one; in float32 the difference is too small to decide anything.
    hint = ["every other text is; --dtype float32 rounds more finely"] if all(d.is_tie for _, d in parted) else []
    return lines + hint


def _show_card(
    comparisons: Sequence[Comparison], decoder: MTPDecoder, spell: Callable[[int], str], options: argparse.Namespace
) -> None:
    metrics = Metrics.pooled([c.metrics for c in comparisons])
    plain, mtp = (_speed(texts) for texts in ([c.plain for c in comparisons], [c.mtp for c in comparisons]))
    manner = f"temperature {options.temperature:g}" if options.temperature else "greedy"
    place = f"{torch.get_num_threads()} CPU threads" if decoder.target.device.type == "cpu" else str(decoder.target.device)
    dtype = str(decoder.target.dtype).removeprefix("torch.")
    print(f"\n═══ {options.model}, {manner}, {dtype}, {place}, K = {options.num_speculative_tokens}")
    rows = {
        "identical": _verdict(comparisons, spell, bool(options.temperature)),
        "tau": [f"{metrics.tau:.2f} tokens per target forward ({metrics.num_tokens} tokens, {metrics.num_rounds} rounds)"],
        "acceptance": [_bar(k, rate) for k, rate in enumerate(metrics.acceptance_rate(), 1)] or ["nothing was drafted"],
        "tokens/second": [f"plain {plain:.1f}   MTP {mtp:.1f}   {mtp / plain:.2f} times"],
        "a round": [_round_time(metrics)],
    }
    for name, lines in rows.items():
        for index, line in enumerate(lines):
            print(f"  {name if index == 0 else '':<15}{line}")


def _bar(position: int, rate: float) -> str:
    if math.isnan(rate):
        return f"draft {position}  never reached"
    filled = round(rate * BAR_WIDTH)
    return f"draft {position}  {'█' * filled}{'·' * (BAR_WIDTH - filled)}  {rate:.0%}"


def _round_time(metrics: Metrics) -> str:
    """Where the time of a round went; the prompt is apart, because there is one a text."""
    parts = {name: seconds for name, seconds in metrics.seconds.items() if name != "prefill" and seconds}
    total = sum(parts.values())
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    return f"{1000 * total / metrics.num_rounds:.1f} ms: {shares}"


def _report(comparisons: Sequence[Comparison], decoder: MTPDecoder, options: argparse.Namespace) -> dict[str, Any]:
    metrics = Metrics.pooled([c.metrics for c in comparisons])
    return {
        "model": options.model,
        "dtype": str(decoder.target.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "num_speculative_tokens": options.num_speculative_tokens,
        "temperature": options.temperature,
        "num_prompts": len(comparisons),
        "identical": None if options.temperature else not any(c.divergence for c in comparisons),
        "tau": round(metrics.tau, 4),
        "acceptance": [None if math.isnan(rate) else round(rate, 4) for rate in metrics.acceptance_rate()],
        "plain_tokens_per_second": round(_speed([c.plain for c in comparisons]), 2),
        "mtp_tokens_per_second": round(_speed([c.mtp for c in comparisons]), 2),
        "seconds": {part: round(seconds, 4) for part, seconds in metrics.seconds.items()},
    }
