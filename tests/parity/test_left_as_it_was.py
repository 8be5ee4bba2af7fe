"""Every model is left as it was: no class patched, no configuration changed, no weight moved, no hook left, no flag flipped."""

import json

import pytest
import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mtpdecode import CropCache, MTPDecoder
from tests import tiny

LENGTH = 16
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def portrait(model):
    """All of a model that a call could change, in comparable values."""
    modules = dict(model.named_modules())
    return {
        "weights": {name: (tensor.data_ptr(), tensor.double().sum().item()) for name, tensor in model.state_dict().items()},
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, hooks)) for hooks in HOOKS] for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "forwards": {name: type(module).forward for name, module in modules.items()},
        "generate": (type(model).generate, GenerationMixin.generate, GenerationMixin._sample),
        "config": json.dumps(model.config.to_dict(), sort_keys=True, default=str),
        "dtype": model.config.dtype,
        "attention": model.config._attn_implementation,
        "generation": json.dumps(model.generation_config.to_dict(), sort_keys=True, default=str),
    }


def assert_unchanged(model, before, after_what):
    now = portrait(model)
    for part, value in before.items():
        assert now[part] == value, f"after {after_what} the model's {part} are not what they were"


class Bad(Exception):
    """Raised by a user's own code."""


class Failing(LogitsProcessor, StoppingCriteria):
    """Raises at its n-th call."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, input_ids, scores, **kwargs):
        self.calls -= 1
        if not self.calls:
            raise Bad
        return scores if scores is not None else False


def mixed_modes(name):
    """A model with dropout of which some modules train and some do not, as in the middle of fine-tuning."""
    model = tiny.build(name, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.lm_head.train(False)
    return model


@pytest.mark.parametrize("name", tiny.NAMES)
def test_after_every_way_of_calling(name):
    model = mixed_modes(name)
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of(name), 2), num_speculative_tokens=2)
    before, batch = portrait(model), tiny.padded(tiny.prompts(3))
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 5, "seed": 1}, {"num_speculative_tokens": 0}):
        decoder.generate(**batch, max_new_tokens=4, **options)
        assert_unchanged(model, before, f"generate({options})")
    model.generate(**batch, max_new_tokens=4, do_sample=False, custom_generate=decoder)
    assert_unchanged(model, before, "custom_generate")
    stream = decoder.stream(**batch, max_new_tokens=8, do_sample=False)
    for _ in range(2):
        next(stream)
        assert torch.is_grad_enabled(), "a stream leaves gradients switched off between its chunks"
        assert_unchanged(model, before, "a chunk of a stream")
    stream.close()
    assert_unchanged(model, before, "a stream that was given up")


@pytest.mark.parametrize("calls", [1, 2, 5, 9])
def test_after_an_exception_of_the_users_own_code(calls):
    model = mixed_modes("llama")
    head = tiny.build_head(model, tiny.row_of("llama"), 2).train()
    decoder = MTPDecoder.from_model(model, head=head, num_speculative_tokens=2)
    before, head_before, batch = portrait(model), {n: m.training for n, m in head.named_modules()}, tiny.padded(tiny.prompts(3))
    options = {"max_new_tokens": LENGTH, "do_sample": False}
    for user in (
        {"logits_processor": LogitsProcessorList([Failing(calls)])},
        {"stopping_criteria": StoppingCriteriaList([Failing(calls)])},
    ):
        with pytest.raises(Bad):
            decoder.generate(**batch, **options, **user)
        assert_unchanged(model, before, f"an exception in {next(iter(user))}")
        assert {n: m.training for n, m in head.named_modules()} == head_before, "the head's training flags changed"
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in tiny.prompts(3)]
    tiny.assert_rows(decoder.generate(**batch, **options), 9, expected, "the call after the exception")


def test_after_an_exception_inside_the_target():
    model = mixed_modes("llama")
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")), num_speculative_tokens=2)

    def fail(*_):
        raise Bad

    hook = model.model.layers[1].register_forward_hook(fail)
    before = portrait(model)
    with pytest.raises(Bad):
        decoder.generate(tiny.one([5, 6, 7]), max_new_tokens=4)
    assert_unchanged(model, before, "an exception inside the target")
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_training_model_with_dropout_gives_the_text_of_eval_mode(name):
    model, rows = mixed_modes(name), tiny.prompts()
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of(name)).train(), num_speculative_tokens=3)
    expected = [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows]
    sequences = decoder.generate(**tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, "a model in training mode with dropout 0.5")
    assert model.training
    assert decoder.head.training, "the head trains on, too"


def test_two_decoders_on_one_model_do_not_disturb_each_other():
    """Four streams in turn: two decoders, and two streams of one of them."""
    rows, model = tiny.prompts(), tiny.target("llama")
    first, second = tiny.decoder("llama", 3, 2), tiny.decoder("llama", 1, 1)
    calls = [(first, rows), (second, rows[::-1]), (first, rows[2:]), (first, [rows[0]])]
    streams = [
        decoder.stream(**tiny.padded(some), max_new_tokens=LENGTH + 3 * number, do_sample=False)
        for number, (decoder, some) in enumerate(calls)
    ]
    texts = [[[] for _ in some] for _, some in calls]
    running = dict(enumerate(streams))
    while running:
        for number, stream in list(running.items()):
            chunk = next(stream, None)
            if chunk is None:
                del running[number]
                continue
            for text, tokens in zip(texts[number], chunk.tokens, strict=True):
                text += tokens
    for number, (_, some) in enumerate(calls):
        expected = [tiny.plain("llama", row, max_new_tokens=LENGTH + 3 * number) for row in some]
        assert texts[number] == expected, f"stream {number} was disturbed by the others"
    assert first.target is second.target is model


def test_interleaved_streams_draft_as_if_alone():
    """Not only the text: the drafts too, so that nobody's head read another's cache."""
    decoder, row, other = tiny.decoder("llama", 3, 2), tiny.prompts()[0], tiny.prompts()[4]
    alone = [len(chunk.tokens[0]) for chunk in decoder.stream(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)]
    stream = decoder.stream(tiny.one(row), max_new_tokens=LENGTH, do_sample=False)
    disturbing = decoder.stream(tiny.one(other), max_new_tokens=LENGTH, do_sample=False)
    together = []
    for chunk in stream:
        together.append(len(chunk.tokens[0]))
        next(disturbing, None)
    assert together == alone, f"tokens by round {together}; alone {alone}"


@pytest.mark.parametrize("name", ["llama", "mimo", "glm4_moe"])
def test_building_and_saving_a_decoder_change_nothing(name, tmp_path):
    model = tiny.build(name)
    before = portrait(model)
    head = tiny.build_head(model, tiny.row_of(name))
    assert_unchanged(model, before, "building a head")
    decoder = MTPDecoder.from_model(model, head=head, cache=CropCache)
    assert_unchanged(model, before, "building a decoder")
    decoder.save_pretrained(tmp_path / "saved")
    assert_unchanged(model, before, "save_pretrained")


def test_the_head_owns_none_of_the_targets_tensors():
    """Moving, training or saving the head moves nothing of the target's."""
    model = tiny.build("llama")
    head = tiny.build_head(model, tiny.row_of("llama"), 2, draft_vocabulary=torch.arange(10))
    own = {tensor.data_ptr() for tensor in head.state_dict().values()}
    shared = own & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not shared, "a tensor of the head is one of the target's"
    head.to(torch.float64)
    assert model.dtype == torch.float32, "moving the head moved the target"
