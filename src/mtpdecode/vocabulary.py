"""Which tokens a head may draft. Only q changes, so any list is lossless; a short one makes a draft step much cheaper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import GenerationError


class DraftVocabulary(NamedTuple):
    """The tokens that a head may draft (FR-Spec, Zhao et al. 2025, 2502.14856; FastMTP, Cai et al. 2025, 2509.18362).

    ids       (n,) int64, ascending        coverage  the share of the text's tokens that they are; nan where no text was counted

    The product with the output layer is often the larger half of a draft step, and it shrinks from V to n rows. A token that is
    not in the list is never drafted, so acceptance is lost where the target writes one; the text stays what it was.
    """

    ids: Tensor
    coverage: float = float("nan")

    @classmethod
    def from_texts(cls, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int = 8192) -> DraftVocabulary:
        """The `size` most frequent ids of texts like those that will be written, and the end of text.

        Raises GenerationError where size is not positive or the texts hold no token.
        """
        counts: Counter[int] = Counter()
        for text in texts:
            counts.update(tokenizer(text, add_special_tokens=False)["input_ids"])
        if size < 1 or not counts:
            raise GenerationError(
                f"DraftVocabulary.from_texts(size={size}) was asked for, of texts with {counts.total()} tokens. "
                "Give some text, and a size of at least 1."
            )
        frequent = {token for token, _ in counts.most_common(size)}
        ends = {tokenizer.eos_token_id} - {None}
        covered = sum(counts[token] for token in frequent)
        return cls(torch.tensor(sorted(frequent | ends)), covered / counts.total())


def is_list_of_ids(ids: Tensor, vocab_size: int) -> bool:
    """Whether a tensor is a list of at least one id of the vocabulary, none of them twice."""
    if ids.dim() != 1 or not len(ids):
        return False
    return int(ids.min()) >= 0 and int(ids.max()) < vocab_size and len(set(ids.tolist())) == len(ids)


def draft_ids(asked: DraftVocabulary | Tensor | Sequence[int] | int, vocab_size: int) -> Tensor:
    """What `draft_vocabulary=` means -> (n,) int64. A number n: the first n ids, for tokenizers number their tokens by frequency.

    Raises GenerationError for ids outside of the vocabulary, ids that come twice, and an empty list.
    """
    if isinstance(asked, DraftVocabulary):
        asked = asked.ids
    if isinstance(asked, int):
        asked = range(min(asked, vocab_size))
    ids = torch.as_tensor(asked if isinstance(asked, Tensor) else list(asked)).long().cpu()
    if not is_list_of_ids(ids, vocab_size):
        raise GenerationError(
            f"draft_vocabulary= was given {tuple(ids.shape)} ids; they must be a list of different ids in 0..{vocab_size - 1}. "
            "Pass DraftVocabulary.from_texts(texts, tokenizer), a list of ids, or how many ids to take from the first on."
        )
    return ids
