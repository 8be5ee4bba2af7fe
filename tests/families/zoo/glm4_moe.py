"""GLM-4.5: DeepSeek's layout around grouped-query attention and experts; the larger model norms queries and keys."""

from functools import partial

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

LAYOUT = deepseek_layout()
LARGE = {"num_hidden_layers": 3, "use_qk_norm": True, "attention_bias": True}


def large():
    return tiny.fill(tiny.build("glm4_moe", **LARGE), seed=1)


def two(settings):
    return settings | {"num_nextn_predict_layers": 2}


CASES = [
    Case("glm4_moe", "glm4_moe", partial(tiny.build, "glm4_moe"), LAYOUT.published, twin_of(LAYOUT)),
    Case(
        "glm4_moe",
        "glm4_moe-large-2",
        large,
        LAYOUT.published,
        twin_of(LAYOUT, 2),
        config=two,
        num_layers=2,
    ),
]
