"""What is decoded: the held-out prompts in batches of any size, behind contexts of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import mtpdecode
from benchmarks import common
from benchmarks.common import Prompt
from benchmarks.prompts import PROMPTS, encode, selection

ROOT = Path(__file__).parents[1]


class Texts:
    """Prompts without end.

    context  how many tokens a prompt is to have, about: those that are shorter get text of this project put in front, code its
             source, prose and chat its documentation, each prompt from another place on. In chat it is part of the question.
             Where a text is used up it begins again, and so repeats itself. 0: the prompts as they are
    """

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.target, self.tokenizer = target, tokenizer

    def batches(self, batch_size: int, num_texts: int, context: int, room: int) -> list[list[Prompt]]:
        """As many batches as hold `num_texts` prompts, at least one. room: positions of the model to be left for what follows."""
        num_rows = max(num_texts // batch_size, 1) * batch_size
        context = min(context, int(self.target.config.max_position_embeddings) - room)
        rows = [self._lengthened(at, *each, context) for at, each in enumerate(islice(texts(), num_rows))]
        return [list(batch) for batch in common.batches(rows, batch_size)]

    def _lengthened(self, at: int, kind: str, text: str, context: int) -> Prompt:
        if self.tokenizer is None:
            return common.random_prompt(self.target, kind, max(context, 8) - at % 5, seed=at)
        prompt = Prompt(kind, text, encode(self.tokenizer, kind, text))
        missing = context - len(prompt.ids)
        if missing <= 0:
            return prompt
        filler = self._filler(kind)
        start = at * STRIDE % len(filler)
        front = list(islice(cycle(filler), start, start + missing))
        if kind == "chat":
            return prompt._replace(ids=encode(self.tokenizer, kind, self.tokenizer.decode(front) + "\n\n" + text))
        return prompt._replace(ids=front + prompt.ids)

    @cache  # noqa: B019  one object a run
    def _filler(self, kind: str) -> list[int]:
        assert self.tokenizer is not None
        return list(self.tokenizer(filler(kind), add_special_tokens=False)["input_ids"])


STRIDE = 997
"""How far apart the texts in front of two prompts begin, in tokens."""


def texts() -> Iterator[tuple[str, str]]:
    """(kind, text), the kinds in turn; all used up, they come again without their last word, then without two, and so on."""
    every = selection(len(next(iter(PROMPTS.values()))))
    return ((kind, shortened(text, lap)) for lap in count() for kind, text in every)


def shortened(text: str, num_words: int) -> str:
    """Without its last words; never without all of them."""
    words = text.split(" ")
    return " ".join(words[: max(len(words) - num_words, 1)])


def filler(kind: str) -> str:
    """Text of this project: its source for code, its documentation for the others."""
    source = sorted(Path(mtpdecode.__file__).parent.glob("*.py"))
    pages = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md")), ROOT / "README.md"]
    return "\n\n".join(path.read_text() for path in (source if kind == "code" else pages))


def longest(batches: Sequence[Sequence[Prompt]]) -> int:
    return max(len(prompt.ids) for rows in batches for prompt in rows)
