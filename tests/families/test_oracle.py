"""The head's numbers are those of transformers' own MtpModel, in every round and at every draft step.

`MtpModel` can be built in memory around any causal language model once a copy of its config says how many layers there are. It
knows no recurrent reuse, so steps deeper than the head are taken with its last layer one by one.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtpdecode import DraftSchedule, MTPDecoder, MTPHead
from mtpdecode.loop import Rest
from tests import tiny
from tests.families.layouts import MTP_MODEL_NAMES, Twin

LENGTH, K = 14, 4


class Oracle(Twin):
    """transformers' MtpModel with the weights of one of our heads."""

    def __init__(self, model, head):
        parts = (*MTP_MODEL_NAMES, "block")
        layers = [{part: getattr(layer, part).state_dict() for part in parts} for layer in head.layers]
        super().__init__(model, layers, head.spec.hidden, head.spec.combine == "hidden_embed")


def recorded(decoder, monkeypatch, row):
    """Decode greedily; -> per round, the text that it began with and the head's logits (K, V)."""
    steps, rounds = [], []
    logits = decoder.head.logits
    monkeypatch.setattr(decoder.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    text = list(row)
    for chunk in decoder.stream(tiny.one(row), max_new_tokens=LENGTH, do_sample=False):
        rounds.append((list(text), torch.stack(steps) if steps else torch.zeros(0)))
        steps.clear()
        text += chunk.tokens[0]
    return rounds


def assert_same(rounds, oracle, what):
    for text, found in rounds:
        wanted = oracle.drafts(text, len(found))
        error = (found - wanted).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"{what}: behind {len(text)} tokens the draft steps' logits are off by {error.tolist()}"


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_of_every_step_and_round(name, num_layers, monkeypatch):
    head, decoder = tiny.head(name, num_layers), tiny.decoder(name, K, num_layers)
    rounds = recorded(decoder, monkeypatch, tiny.prompts()[0])
    assert {len(logits) for _, logits in rounds} == {K}
    assert len(rounds) > 2, "several rounds, so that what was absorbed earlier counts"
    assert_same(rounds, Oracle(tiny.target(name), head), f"{name}, {num_layers} layers")


@pytest.mark.parametrize("changes", [{"hidden": "post_norm"}, {"hidden": "pre_norm"}])
@pytest.mark.parametrize("name", ["llama", "mimo"])
def test_either_hidden_state(name, changes, monkeypatch):
    """Engines disagree about MiMo: both choices are the oracle's, fed the same."""
    model = tiny.target(name)
    head = MTPHead(model, tiny.row_of(name).replace(**changes)).eval()
    head.load_state_dict(tiny.head(name).state_dict())
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=K)
    assert_same(recorded(decoder, monkeypatch, tiny.prompts()[0]), Oracle(model, head), f"{name}, {changes}")


def test_the_oracle_can_tell():
    """Swapped norms, the other order, a hidden state off by one: each is seen."""
    model, head, text = tiny.target("llama"), tiny.head("llama"), tiny.prompts()[0]
    right = Oracle(model, head).drafts(text, 2)
    swapped = Oracle(model, head)
    layer = swapped.mtp.layers[0]
    layer.enorm, layer.hnorm = layer.hnorm, layer.enorm
    other = Oracle(model, head)
    other.mtp.config.mtp_hidden_states_first = True
    late = Oracle(model, head)
    states = late.states
    late.states = lambda ids: states(ids).roll(1, dims=1)
    for what, wrong in (("swapped norms", swapped), ("the other order", other), ("a hidden state off by one", late)):
        error = float((wrong.drafts(text, 2) - right).abs().max())
        assert error > 1e-2, f"{what} changes the logits by {error:.1e} only: the oracle would not tell"


@pytest.mark.parametrize("name", ["llama", "glm4_moe"])
def test_transformers_own_loop_writes_the_same_text_from_what_we_saved(name, tmp_path):
    """generate(use_mtp=True) on the folder that save_pretrained wrote: its weight names and its loop accept our head."""
    decoder = tiny.decoder(name, 1)
    decoder.save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.config.num_mtp_layers == 1, "the config says so in the field that transformers reads"
    if getattr(model.config, "layer_types", None):
        model.config.mtp_layer_types = ["full_attention"]
    if getattr(model.config, "mlp_layer_types", None):
        model.config.mtp_mlp_layer_types = ["sparse"]
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\."]  # it finds MTP tensors by this list, made for real sizes
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    row = tiny.prompts()[0]
    theirs = model.generate(tiny.one(row), max_new_tokens=20, do_sample=False, use_mtp=True)
    assert theirs.tolist() == [row + tiny.plain(name, row, max_new_tokens=20)]
    assert len(forwards) < 18, f"{len(forwards)} forwards for 20 tokens: it keeps no drafts, so the head is not ours"


class Resting(DraftSchedule):
    """Drafts, rests for three rounds, and again."""

    choices = (0, 3)

    def next_length(self, metrics):
        return 0 if metrics.num_rounds % 4 else 3


@pytest.mark.parametrize("most", [1, 2, 64])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_head_that_rested_has_missed_nothing(num_layers, most, monkeypatch):
    """Rounds with K = 0 do not ask it; when it drafts again it has seen them all."""
    monkeypatch.setattr(Rest, "MOST", most)
    decoder = tiny.decoder("llama", Resting(), num_layers)
    rounds = [(text, steps) for text, steps in recorded(decoder, monkeypatch, tiny.prompts()[0]) if len(steps)]
    assert {0, 3} <= set(decoder.metrics.drafted)
    assert_same(rounds, Oracle(tiny.target("llama"), tiny.head("llama", num_layers)), f"{num_layers} layers, MOST = {most}")
