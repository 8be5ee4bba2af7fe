"""GLM-4.7-Flash: GLM-4.5's head around DeepSeek's latent attention."""

from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

LAYOUT = deepseek_layout()
SETTINGS = {name: value for name, value in tiny.MIXTURE.items() if name != "first_k_dense_replace"}


def build():
    config = Glm4MoeLiteConfig(**(SETTINGS | tiny.LATENT | {"num_key_value_heads": 4}))
    return tiny.fill(Glm4MoeLiteForCausalLM(config).eval(), seed=5)


CASES = [Case("glm4_moe_lite", "glm4_moe_lite", build, LAYOUT.published, twin_of(LAYOUT))]
