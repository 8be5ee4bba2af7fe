"""DeepSeek-V3: latent attention and experts, one MTP layer as published, or three behind any number of base layers."""

from functools import partial

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

LAYOUT = deepseek_layout()


def deeper():
    return tiny.fill(tiny.build("deepseek_v3", num_hidden_layers=3), seed=0)


def three(settings):
    return settings | {"num_nextn_predict_layers": 3}


CASES = [
    Case("deepseek_v3", "deepseek_v3", partial(tiny.build, "deepseek_v3"), LAYOUT.published, twin_of(LAYOUT)),
    Case(
        "deepseek_v3",
        "deepseek_v3-3",
        deeper,
        LAYOUT.published,
        twin_of(LAYOUT, 3),
        config=three,
        num_layers=3,
    ),
]
