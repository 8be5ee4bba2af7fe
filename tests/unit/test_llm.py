"""vLLM's offline example runs with only its import line changed."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mtpdecode
from mtpdecode import LLM, GenerationError, SamplingParams
from tests import tiny
from tests.families import gemma4

PROMPTS = ["w5 w6 w7", "w9", "w8 w8 w4 w11 w12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint with a tokenizer that knows token n as the word wn."""
    path = tmp_path_factory.mktemp("llm")
    model = tiny.build("llama")
    tiny.write_checkpoint(path, model, tiny.build_head(model, tiny.row_of("llama")))
    words = {f"w{i}": i for i in range(model.config.vocab_size)} | {"abcdef": model.config.vocab_size}  # for stop strings
    word_tokenizer(words).save_pretrained(path)
    return str(path)


def word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def test_gemma_4_and_its_assistant(tmp_path):
    """As vLLM has it: the assistant is the model of the speculative_config."""
    target, assistant = tmp_path / "target", gemma4.write(tmp_path / "assistant", "e2b")
    copy.deepcopy(gemma4.target("e2b")).save_pretrained(target)
    word_tokenizer({f"w{i}": i for i in range(tiny.VOCAB)}).save_pretrained(target)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    config = {"method": "mtp", "model": str(assistant), "num_speculative_tokens": 2}
    plain, drafting = LLM(str(target)), LLM(str(target), speculative_config=config)
    assert plain.generate(PROMPTS, params) == drafting.generate(PROMPTS, params)
    assert drafting.decoder.metrics.drafted[0] == 2


def test_the_offline_example(folder):
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    llm = LLM(model=folder, tensor_parallel_size=1, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    outputs = llm.generate(PROMPTS, sampling_params)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        completion = output.outputs[0]
        assert len(completion.token_ids) == 16 or completion.finish_reason == "stop"
        assert completion.text.split() == [f"w{token}" for token in completion.token_ids]


def test_greedy_is_what_the_model_says(folder):
    llm = LLM(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 3})
    plain = LLM(folder)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    texts, expected = llm.generate(PROMPTS, params), plain.generate(PROMPTS, params)
    assert texts == expected, "with K = 3 and with K = 0 the texts differ"
    assert llm.decoder.metrics.tau > 1, "the head never drafted a token that was kept"
    ids = torch.tensor([expected[0].prompt_token_ids])
    alone = plain.decoder.target.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert expected[0].outputs[0].token_ids == alone[0, 3:].tolist()


def test_several_texts_a_prompt_and_stop_strings(folder):
    llm = LLM(folder, speculative_config={"method": "mtp"})
    outputs = llm.generate(PROMPTS[:2], SamplingParams(n=3, max_tokens=8, seed=0))
    assert [[c.index for c in output.outputs] for output in outputs] == [[0, 1, 2]] * 2
    whole = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    word = whole.text.split()[3]
    cut = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=8, stop=word))[0].outputs[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.find(word)], "vLLM leaves the stop string out of the text"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"tensor_parallel_size": 2}, "one process"),
        ({"gpu_memory_utilization": 0.9}, "does not know"),
        ({"speculative_config": {"method": "eagle"}}, "only method 'mtp'"),
        ({"speculative_config": {"method": "mtp", "disable_by_batch_size": 4}}, "only method 'mtp'"),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": -1}}, "at least 0"),
    ],
)
def test_what_is_not_ours_is_said(folder, arguments, word):
    with pytest.raises(GenerationError, match=word):
        LLM(folder, **arguments)


def test_parameters_out_of_range_are_said():
    with pytest.raises(mtpdecode.GenerationError, match="temperature=-1"):
        SamplingParams(temperature=-1)


def bare(folder, path):
    """The target alone, and its tokenizer."""
    shutil.copytree(folder, path)
    whole = load_file(path / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in whole.items() if not name.startswith("model.layers.2.")},
        path / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((path / "config.json").read_text())
    config.pop("num_nextn_predict_layers")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_plain_decoding_needs_no_head_and_a_head_may_lie_elsewhere(folder, tmp_path):
    target, params = bare(folder, tmp_path / "bare"), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    plain = LLM(target)
    drafting = LLM(target, speculative_config={"method": "mtp", "model": folder, "num_speculative_tokens": 2})
    assert plain.generate(PROMPTS, params) == drafting.generate(PROMPTS, params)
    assert plain.decoder.metrics.tau == 1 < drafting.decoder.metrics.tau
