"""GLM-5: DeepSeek-V3.2's layout; only its indexer rotates pairs of neighbours.

GLM-5.2 saves indexers: some layers of the target read the keys that the layer before them chose, and the later draft steps those
that the first one chose (`index_share_for_mtp_iteration`). The head's layer has an indexer all the same.
"""

from functools import partial

from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from tests import tiny
from tests.families.twins import rotated
from tests.families.zoo import Case
from tests.families.zoo.deepseek_v32 import LAYOUT, SETTINGS, calmed, drafts

SAVING = {"num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"], "index_share_for_mtp_iteration": True}


def build(**changes):
    return calmed(tiny.fill(GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**(SETTINGS | changes))).eval(), seed=2))


CASES = [
    Case("glm_moe_dsa", "glm_moe_dsa", build, LAYOUT.published, partial(drafts, rotated)),
    Case("glm_moe_dsa", "glm_moe_dsa-5.2", partial(build, **SAVING), LAYOUT.published, partial(drafts, rotated, shares=True)),
]
