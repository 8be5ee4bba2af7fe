"""Heads trained with mtpdecode: DeepSeek's names around the layers of Llama, Qwen2, with or without a sliding window."""

from functools import partial

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

LAYOUT = deepseek_layout(copies=())


def two(settings):
    return settings | {"num_nextn_predict_layers": 2}


CASES = [
    Case("llama", "llama", partial(tiny.build, "llama"), LAYOUT.published, twin_of(LAYOUT)),
    Case("llama", "qwen2-sliding-2", partial(tiny.build, "sliding"), LAYOUT.published, twin_of(LAYOUT, 2), two, 2),
]
