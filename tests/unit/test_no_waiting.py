"""No round waits for its device: what a GPU would mind is found without one, on a device that cannot be read."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn

from benchmarks.waiting import NoWaiting, WaitingError, WatchedStep
from mtpdecode import MTPDecoder, NGramProposer
from mtpdecode.acceptance import StandardAcceptance
from mtpdecode.families import FAMILIES
from mtpdecode.loop import Clock, decode_round
from mtpdecode.recurrent import RecurrentLayer
from mtpdecode.testing import SyntheticAcceptance
from tests import tiny
from tests.families import gemma4
from tests.families.zoo import qwen3_5, qwen3_next

RULES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9},
    "block": {"do_sample": True, "acceptance": "block"},
    "coupled": {"do_sample": True, "acceptance": "coupled"},
}


def abroad(thing):
    """A deep copy whose tensors are on the device "meta"."""

    def moved(tensor, memo):
        return tensor.detach().to("meta")

    def parameter(tensor, memo):
        return torch.nn.Parameter(moved(tensor, memo), requires_grad=False)

    with patch.dict(copy._deepcopy_dispatch, {torch.Tensor: moved, torch.nn.Parameter: parameter}):
        return copy.deepcopy(thing)


def deaf(roles):
    """What was copied while it listened has hooks that tell what stayed here; it is to register its own."""
    for module in (*roles.verifier.target.modules(), *getattr(roles.proposer, "head", nn.Module()).modules()):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for layer in roles.verifier.cache.layers:
        if isinstance(layer, RecurrentLayer):
            layer._ears = [type(ear)(layer, ear.name) for ear in layer._ears]


class Abroad:
    """A step that does the second round of each call on "meta" first, watched."""

    def __init__(self, step=decode_round):
        self.step, self.verifier, self.num_rounds, self.num_watched = step, None, 0, 0

    def __call__(self, state, roles, num_speculative_tokens, noise, clock):
        self.num_rounds = self.num_rounds + 1 if roles.verifier is self.verifier else 1
        self.verifier = roles.verifier
        if self.num_rounds == 2:
            there, them, randomness = abroad((state, roles, noise))
            deaf(them)
            with them.verifier.listening(), them.proposer.listening(), NoWaiting():
                there, told = self.step(there, them, num_speculative_tokens, randomness, Clock(dict.fromkeys(clock.seconds, 0.0)))
            places = {tensor.device.type for tensor in (there.text.tokens, there.fresh.states, there.done, told)}
            assert places == {"meta"}
            self.num_watched += 1
        return decode_round(state, roles, num_speculative_tokens, noise, clock)


def check(decoder, choices=(0, 3), **options):
    """A round for each K."""
    decoder.step = step = Abroad()
    for k in choices:
        settings = {"max_new_tokens": 4 * (k + 1), "eos_token_id": -1, "seed": 2, "num_speculative_tokens": k}
        decoder.generate(**tiny.padded(tiny.prompts(3)), **settings, **options)
    assert step.num_watched == len(choices)


def in_half(model):
    """Some of what experts are multiplied with on a GPU takes bfloat16 alone."""
    return copy.deepcopy(model).to(torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_no_round_of_any_target_waits(name, rule):
    target = in_half(tiny.target(name)) if name in ("glm4_moe", "deepseek_v3") else tiny.target(name)
    check(MTPDecoder.from_model(target, head=tiny.build_head(target, tiny.row_of(name))), **RULES[rule])


@pytest.mark.parametrize("rule", ["greedy", "sampled"])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_recurrent_states_move_without_waiting(family, rule):
    model = qwen3_5.build() if family == "qwen3_5" else in_half(qwen3_next.build())
    row = next(row for row in FAMILIES if row.family == family)
    check(MTPDecoder.from_model(model, head=tiny.build_head(model, row)), **RULES[rule])


@pytest.mark.parametrize("rule", ["greedy", "sampled"])
def test_assistants_do_not_wait(rule, tmp_path):
    folder = gemma4.write(tmp_path / "assistant", "e2b", generation={"suppress_tokens": [5, 6]})
    check(MTPDecoder.from_model(gemma4.target("e2b"), assistant=folder), **RULES[rule])


def test_deep_heads_look_up_and_restricted_vocabularies_do_not_wait():
    target = tiny.target("llama")
    check(tiny.decoder("llama", 3, num_layers=2), do_sample=False)
    check(MTPDecoder.from_model(target, proposer=NGramProposer(3)), do_sample=True)
    check(MTPDecoder.from_model(target, head=tiny.head("llama"), lookup=NGramProposer(4, min_ngram=2)), do_sample=True)
    check(MTPDecoder.from_model(target, head=tiny.head("llama"), draft_vocabulary=20), do_sample=True)
    check(MTPDecoder.from_model(target, head=tiny.head("llama"), acceptance=SyntheticAcceptance([0.5])), do_sample=False)


def test_processors_that_look_at_the_text_do_not_wait():
    options = {"repetition_penalty": 1.3, "min_new_tokens": 3, "min_length": 12}
    check(tiny.decoder("llama", 3), do_sample=False, **options)
    check(tiny.decoder("llama", 3), do_sample=True, top_k=9, **options)


# ── the watch itself ────────────────────────────────────────────────────────────────────────────────────────────────────────


MASK, NUMBERS = torch.tensor([True, False, True]), torch.arange(3)
WAITS = {
    "int": lambda x: int(x[0]),
    "bool": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "host": lambda x: x.cpu(),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.index_put_((x > 0,), x[0]),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x),
    "from the host": lambda x: x + torch.arange(3),
    "copied to it": lambda x: x + NUMBERS.to(x.device),
    "written to it": lambda x: x.copy_(NUMBERS),
    "a list": lambda x: x + torch.tensor([1, 2, 3], device=x.device),
    "a number": lambda x: x + torch.as_tensor(1, device=x.device),
    "a list like it": lambda x: x.new_tensor([1, 2, 3]),
    "a list as index": lambda x: x[[0, 2]],
    "gathered by the host": lambda x: x.gather(0, NUMBERS),
}


@pytest.mark.parametrize("wait", WAITS)
def test_every_way_to_wait_is_seen(wait):
    with pytest.raises((WaitingError, RuntimeError)), NoWaiting():
        WAITS[wait](torch.empty(3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    "wait", ["int", "bool", "list", "mask", "mask written", "nonzero", "unique", "repeats", "a list", "a list as index"]
)
def test_what_asks_for_a_value_is_seen_on_the_cpu_too(wait):
    with pytest.raises(WaitingError), NoWaiting():
        WAITS[wait](torch.arange(3))


def test_work_on_the_device_alone_is_no_waiting():
    with NoWaiting():
        x = torch.arange(6, device="meta").view(2, 3)
        x[:, 1] = x[:, 0] + 5
        x.scatter_(1, x[:, :1], 1).gather(1, x.clamp(max=2)).to(torch.float32).softmax(-1).argmax(-1)


def test_a_rule_that_asks_the_host_is_caught():
    """The whole way, through a decoder and on the device that the model is on."""
    watched = tiny.decoder("llama", 2, acceptance=AskingAcceptance())
    watched.step = WatchedStep(decode_round, torch.device("cpu"))
    with pytest.raises(WaitingError, match="reads a number"):
        watched.generate(tiny.one([4, 5]), max_new_tokens=20, do_sample=True)
    innocent = tiny.decoder("llama", 2)
    innocent.step = WatchedStep(decode_round, torch.device("cpu"))
    innocent.generate(tiny.one([4, 5]), max_new_tokens=20, do_sample=True, eos_token_id=-1)
    assert innocent.step.num_watched == innocent.metrics.num_rounds - WatchedStep.UNWATCHED > 0


class AskingAcceptance(StandardAcceptance):
    """Looks at a number."""

    def num_kept(self, passed):
        return super().num_kept(passed) if bool(passed.any()) else torch.zeros_like(passed[:, 0], dtype=torch.long)
