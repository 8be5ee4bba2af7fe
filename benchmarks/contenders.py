"""The ways of decoding that `benchmarks.decode` compares, all over one model in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial, wraps
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.common import Batch, Prompt
from mtpdecode import DraftSchedule, ExpectedSpeedup, Metrics, MTPDecoder, MTPHead, NGramProposer
from mtpdecode.compiled import CompiledRound
from mtpdecode.schedule import Seen

PLAIN, STATIC, NATIVE, LOOKUP = "generate", "generate static compiled", "generate use_mtp", "generate prompt lookup"
PLAIN_NAMES = (PLAIN, STATIC, "mtpdecode K=0", "mtpdecode compiled K=0")
"""Plain decoding in all its forms: what nobody may be slower than."""
NO_TOKEN = -1
"""An end token that is never written."""


class Contender(NamedTuple):
    """A way of decoding.

    generate  takes what `model.generate` takes       decoder  ours, if it is one of ours
    most_rows the largest batch that it takes; None: any
    """

    name: str
    generate: Callable[..., Any]
    decoder: MTPDecoder | None = None
    most_rows: int | None = None

    def run(self, target: PreTrainedModel, rows: Sequence[Prompt], longest: int, seed: int, **options: Any) -> Batch:
        """One batch. longest: tokens of the longest text that the cell may hold, prompt included."""
        torch.manual_seed(seed)
        if self.decoder and options["do_sample"]:
            options["seed"] = seed
        if self.name == STATIC:
            options["max_cache_len"] = longest
        return common.timed_batch(target, self.generate, rows, self.decoder, **options)

    def warm_up(
        self,
        target: PreTrainedModel,
        batches: Sequence[Sequence[Prompt]],
        longest: int,
        is_known: bool = False,
        **options: Any,
    ) -> None:
        """Make every graph that the batches will want, and let "auto" know what each K costs, unless that is known."""
        schedule = self.decoder.options.schedule if self.decoder else None
        if isinstance(schedule, ExpectedSpeedup) and not is_known:
            walk = Walk(schedule)
            ends = [NO_TOKEN] * len(common.eos_ids(target))
            walking = {"max_new_tokens": walk.num_tokens, "eos_token_id": ends, "num_speculative_tokens": walk}
            self.run(target, batches[0], longest + walk.num_tokens, 0, **(options | walking))
        for rows in (batches[0], batches[-1]):  # two lengths: what was open for one is open for all
            self.run(target, rows, longest, 0, **(options | {"max_new_tokens": WARM_UP_TOKENS}))


WARM_UP_TOKENS = 8


class Walk(DraftSchedule):
    """Every K that "auto" may choose, some rounds each; what they took is told to it, the first round of each K left out.

    In the cell's own sampling, batch size and widths, so that the graphs of the walk are those that are timed later.
    """

    EACH = 4

    def __init__(self, schedule: DraftSchedule) -> None:
        self.schedule, self.choices, self._at = schedule, schedule.choices, 0

    @property
    def num_tokens(self) -> int:
        """Enough for all rounds, even if every draft is kept."""
        return sum(self.EACH * (k + 1) for k in self.choices)

    def next_length(self, metrics: Metrics) -> int:
        return self.choices[min(metrics.num_rounds // self.EACH, len(self.choices) - 1)]

    def observe(self, seen: Seen) -> None:
        if self._at % self.EACH:
            self.schedule.time(seen.num_drafted, len(seen.counts), seen.num_tokens, seen.seconds)
        self._at += 1


def contenders(decoder: MTPDecoder, drafted: Sequence[int], backend: str = "inductor") -> list[Contender]:
    """All there are. backend: of `torch.compile`."""
    target: Any = decoder.target
    assert decoder.head is not None
    heads = (decoder.head, random_head(decoder.head, target))
    return [
        Contender(PLAIN, target.generate),
        Contender(STATIC, static_compiled(target, backend)),
        Contender(NATIVE, partial(target.generate, use_mtp=True), most_rows=1),
        Contender(LOOKUP, partial(target.generate, prompt_lookup_num_tokens=3), most_rows=1),
        *_ours("mtpdecode", partial(MTPDecoder.from_model, target), *heads, drafted),
        *_ours("mtpdecode compiled", partial(_compiled, target, backend), *heads, drafted),
    ]


def _ours(name: str, made: Callable[..., MTPDecoder], head: MTPHead, dull: MTPHead, drafted: Sequence[int]) -> list[Contender]:
    lookup, fixed, suits = NGramProposer(4, min_ngram=3), made(head=head), head.num_speculative_tokens
    others = {
        "auto": made(head=head, num_speculative_tokens="auto"),
        "lookup": made(head=head, num_speculative_tokens=suits, lookup=lookup),
        "lookup auto": made(head=head, num_speculative_tokens="auto", lookup=lookup),
        "random head auto": made(head=dull, num_speculative_tokens="auto"),
    }
    return [
        *(Contender(f"{name} K={k}", partial(fixed.generate, num_speculative_tokens=k), fixed) for k in drafted),
        *(Contender(f"{name} {what}", each.generate, each) for what, each in others.items()),
    ]


def _compiled(target: PreTrainedModel, backend: str, **options: Any) -> MTPDecoder:
    decoder = MTPDecoder.from_model(target, compiled=True, **options)
    if backend != "inductor":
        decoder.step = CompiledRound(backend)
    return decoder


def static_compiled(target: Any, backend: str) -> Callable[..., Tensor]:
    """`model.generate` with a static cache and compiled steps.

    On CUDA transformers compiles the steps itself where the cache is static. On a CPU it does not (there is a private field for
    its own tests), so for windows of one token `torch.compile` of the model's forward stands in for it while the call lasts;
    the prompt runs uncompiled, as there.
    """
    if target.device.type == "cuda":
        return partial(target.generate, cache_implementation="static")
    eager = target.forward
    graph = torch.compile(eager, backend=backend, fullgraph=True, dynamic=False)

    @wraps(eager)  # transformers looks at the signature of `forward`
    def forward(*args: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        step = graph if input_ids.shape[1] == 1 else eager
        return step(*args, input_ids=input_ids, **kwargs)

    def generate(**options: Any) -> Tensor:
        with patch.object(target, "forward", forward):
            return target.generate(**options, cache_implementation="static")  # type: ignore[no-any-return]

    return generate


def random_head(head: MTPHead, target: PreTrainedModel) -> MTPHead:
    """A head of the same build that knows nothing: what it drafts is accepted by accident only."""
    dull = MTPHead(target, head.spec, head.num_layers).eval()
    dull.num_speculative_tokens = head.num_speculative_tokens
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dull.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return dull


def chosen(entries: Sequence[Contender], only: Sequence[str], compiled: bool, with_random_head: bool) -> list[Contender]:
    """Plain decoding, and whose name matches a pattern; without patterns all but what costs minutes and was not asked for."""
    return [entry for entry in entries if entry.name == PLAIN or is_chosen(entry.name, only, compiled, with_random_head)]


def is_chosen(name: str, only: Sequence[str], compiled: bool, with_random_head: bool) -> bool:
    """A pattern stands for the whole name, or for what follows "mtpdecode "."""
    if only:
        return any(fnmatch(each, pattern) for pattern in only for each in (name, name.removeprefix("mtpdecode ")))
    return (compiled or "compiled" not in name) and (with_random_head or "random head" not in name)
