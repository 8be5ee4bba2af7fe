"""`python -m mtpdecode`, on a tiny model."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mtpdecode
from mtpdecode import cli
from mtpdecode.families import spec_for

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def loaded():
    """A decoder with a random head and a tokenizer of 40 words; no chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=None,
        pad_token_id=0,
    )
    target = LlamaForCausalLM(config).eval()
    head = mtpdecode.MTPHead(target, spec_for("llama", "LlamaForCausalLM"))
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return mtpdecode.MTPDecoder.from_model(target, head=head), PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.fixture
def run(loaded, monkeypatch, capsys):
    """Runs the command line; -> exit status, what it printed, what it complained about."""

    def call(*arguments):
        monkeypatch.setattr(cli, "load", lambda *_, **__: loaded)
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    return call


def test_greedy_texts_are_identical_and_the_last_line_is_json(run):
    status, out, _ = run("w1 w2 w3", "w4 w5", "--max-new-tokens", "12", "--json")
    assert status == 0
    assert "yes: every token of 2 greedy texts" in out
    report = json.loads(out.splitlines()[-1])
    assert report["identical"] is True
    assert report["num_prompts"] == 2
    assert report["tau"] >= 1
    assert len(report["acceptance"]) == 3


def test_the_text_is_shown_twice_and_equal(run):
    _, out, _ = run("w1 w2 w3", "--max-new-tokens", "9")
    plain, mtp = (part.split("\n", 1)[1].split("\n")[0] for part in out.split("── ")[1:3])
    assert len(plain.split()) == 9
    assert plain == mtp


def test_sampled_texts_are_not_called_identical(run):
    status, out, _ = run("w1 w2", "--max-new-tokens", "8", "--temperature", "0.8", "--top-p", "0.9", "--json")
    assert status == 0
    assert "the same law" in out
    assert json.loads(out.splitlines()[-1])["identical"] is None


def test_k_0_is_plain_decoding(run):
    _, out, _ = run("w1", "--max-new-tokens", "5", "--num-speculative-tokens", "0")
    assert "nothing was drafted" in out
    assert "tau            1.00" in out


@pytest.mark.parametrize(("arguments", "complaint"), [(["w1 " * 200], "128"), (["", "--raw"], "has no tokens")])
def test_what_the_user_can_put_right_is_a_message_and_not_a_traceback(run, arguments, complaint):
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith("mtpdecode: ")
    assert complaint in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--num-speculative-tokens", "-1"),
        ("--temperature", "nan"),
        ("--top-p", "1.5"),
        ("--top-k", "x"),
        ("--dtype", "int8"),
        ("--device", "nowhere"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(option, value, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([option, value])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def test_an_unknown_model_is_a_message(capsys):
    assert cli.main(["--model", "smolm2-135m"]) == 2
    assert "Did you mean 'smollm2-135m-instruct'" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load", interrupted)
    assert cli.main([]) == 130
    assert "interrupted" in capsys.readouterr().err
