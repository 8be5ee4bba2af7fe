"""MiMo-7B: a Qwen2 base under another name, hidden states first and before the final norm."""

from functools import partial

from tests import tiny
from tests.families.layouts import Layout, twin_of
from tests.families.zoo import Case

PREFIX = "model.mtp_layers.{i}."
LAYOUT = Layout(PREFIX, {ours: PREFIX + theirs for ours, theirs in tiny.MIMO_PARTS.items()})


def published(num_layers):
    def config(settings):
        return settings | tiny.mimo_config(settings) | {"num_nextn_predict_layers": num_layers}

    return config


def case(num_layers, name):
    twin = twin_of(LAYOUT, num_layers, hidden="pre_norm", hidden_first=True)
    return Case("mimo", name, partial(tiny.build, "mimo"), LAYOUT.published, twin, published(num_layers), num_layers)


CASES = [case(1, "mimo"), case(2, "mimo-2")]
