"""One file a family: a tiny target, its head in the published layout, and an independent twin of the head.

`tests/families/test_zoo.py` holds every case of every file here to the same sentences.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from mtpdecode import MTPHead


def one_layer(settings):
    """The usual way to say that a checkpoint has one MTP layer."""
    return settings | {"num_nextn_predict_layers": 1}


class Case(NamedTuple):
    """What the suite needs to know of a family.

    family      the row's family                    name    unique: the family, and what is special about the case
    build       () -> a seeded tiny target, in eval mode, float32 (`tiny.fill` fills it)
    published   (head, target) -> the head's tensors under their real names, written out by hand, knowing nothing of
                `mtpdecode.checkpoint`
    drafts      (target, published tensors, text of n + 1 ids, number of steps) -> logits (steps, V) of the drafts behind the
                text, computed from nothing and without a cache; each step goes on with its own argmax
    config      transformers' config.json -> the published one
    num_layers  MTP layers                          crop    whether `CropCache` applies
    skip        why it cannot run on the installed transformers; empty: it can
    num_rows    rows per prompt whose sampled texts are counted; fewer where transformers' own arithmetic is slow
    """

    family: str
    name: str
    build: Callable[[], PreTrainedModel]
    published: Callable[[MTPHead, PreTrainedModel], dict[str, Tensor]]
    drafts: Callable[[PreTrainedModel, Mapping[str, Tensor], list[int], int], Tensor]
    config: Callable[[dict], dict] = one_layer
    num_layers: int = 1
    crop: bool = True
    skip: str = ""
    num_rows: int = 750


@cache
def cases() -> tuple[Case, ...]:
    """The cases of all files in this folder."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{file}") for file in files]
    return tuple(case for module in found for case in module.CASES)
