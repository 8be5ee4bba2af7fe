"""The instruments themselves: `TableLM`, exact laws of models, the G-test, and `assert_lossless` on what users write."""

from collections import Counter

import pytest
import torch
from scipy import stats

from mtpdecode import GenerationError, MTPDecoder, NGramProposer, Proposer
from mtpdecode.state import Draft
from mtpdecode.testing import (
    TableLM,
    TableProposer,
    assert_counts,
    assert_lossless,
    continuation_law,
    g_test,
    largest_error,
    random_table,
    sample_texts,
    text_law,
)
from tests.toys import exact_head, random_head, table_target, tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("vocab_size", [2, 3, 8])
def test_table_lm_says_its_table(vocab_size, dtype):
    """At every one of 512 positions the softmax of the logits is the table's row, zeros included, up to rounding."""
    lm = table_target(vocab_size, seed=vocab_size, num_zeros=vocab_size // 3).to(dtype)
    ids = torch.randint(vocab_size, (2, 512))
    probs = lm(ids).logits.double().softmax(-1)
    wanted = torch.stack([torch.stack([lm.law(tuple(row[: n + 1])) for n in range(512)]) for row in ids.tolist()])
    assert (probs - wanted).abs().max() < 1e-6
    assert ((probs == 0) == (wanted == 0)).all()


def test_table_lm_takes_short_tables():
    """A table (V, V) of [current, next] is one whose laws do not depend on the previous token."""
    table = random_table(3, seed=5)[0]
    lm = TableLM(table)
    assert torch.equal(lm.law((0, 2)), lm.law((1, 2)))
    assert torch.equal(lm.law((2,)), table[2])


@pytest.mark.parametrize("table", [torch.ones(3, 3), torch.eye(3) - 0.1, torch.ones(2, 3) / 3], ids=["sums", "negative", "shape"])
def test_tables_must_hold_laws(table):
    """What is not a table of laws is refused."""
    with pytest.raises(GenerationError):
        TableLM(table)


def test_continuation_law_is_the_tables():
    """The law found by running the model on all texts is the product of the table's laws."""
    lm = table_target(4, seed=1, num_zeros=1)
    law = continuation_law(lm, [1, 2], 3)
    wanted = text_law(lambda text: lm.law((1, 2, *text)), 3)
    assert largest_error(law, wanted)[1] < 1e-6
    assert law.keys() == wanted.keys()


def test_continuation_law_ends_at_end_tokens():
    """Nothing follows an end token, and the probabilities still add up to 1."""
    law = continuation_law(table_target(4), [1, 2], 3, eos_token_id=3)
    assert {len(text) for text in law} == {1, 2, 3}
    assert all(3 not in text[:-1] for text in law)
    assert sum(law.values()) == pytest.approx(1)


def test_continuation_law_refuses_what_is_too_long():
    """More texts than can be gone through are an error that says so, not an endless wait."""
    with pytest.raises(GenerationError, match="fewer tokens"):
        continuation_law(table_target(8), [1], 6)


def test_g_test_agrees_with_scipy():
    """Without rare texts the statistic is scipy's, up to Williams' correction."""
    law = {(0,): 0.5, (1,): 0.3, (2,): 0.2}
    seen = {(0,): 5300, (1,): 2800, (2,): 1900}
    wanted = stats.power_divergence([5300, 2800, 1900], [5000, 3000, 2000], lambda_="log-likelihood").pvalue
    assert g_test(seen, law) == pytest.approx(wanted, rel=0.01)


def test_g_test_is_calibrated():
    """p-values of true samples are uniform, with many rare texts too: 400 of them, Kolmogorov-Smirnov p > 1e-4."""
    law = text_law(table_target(4, seed=3).law, 3)
    texts, chances = list(law), torch.tensor(list(law.values()))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(chances, 400 * 1000, replacement=True, generator=generator).view(400, 1000)
    p_values = [g_test(Counter(texts[place] for place in sample), law) for sample in drawn.tolist()]
    assert stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_g_test_knows_what_cannot_come():
    """One text of probability 0 among any number is a proof."""
    assert g_test({(0,): 10**6, (1,): 1}, {(0,): 1.0}) == 0.0


def test_messages_carry_the_argument():
    """A failure says the p-value, the text that shows it best, how often it came and how often it should."""
    with pytest.raises(
        AssertionError, match=r"here: .* p = \S+ \(fails below 5e-05\). Of 1000 texts, \[1\] came 400 .*; 300.0 were"
    ):
        assert_counts({(0,): 600, (1,): 400}, {(0,): 0.7, (1,): 0.3}, num_tests=2, setting="here")


class Stubborn(Proposer):
    """A user's own proposer in four lines: always the same token."""

    def propose(self, state, num_speculative_tokens, noise):
        return Draft(torch.ones_like(state.text.tokens[:, :num_speculative_tokens]), None)


@pytest.mark.parametrize(
    "proposer", [Stubborn(), NGramProposer(), TableProposer(random_table(5, seed=9))], ids=lambda p: type(p).__name__
)
def test_assert_lossless_tests_proposers(proposer):
    """`assert_lossless(proposer)` goes through K and the rules on a target of its own."""
    assert_lossless(proposer, num_samples=2000)


def test_assert_lossless_tests_decoders():
    """`assert_lossless(decoder, ...)` takes the decoder as it is, and generate's own options."""
    target = tiny_llama()
    decoder = MTPDecoder.from_model(target, head=random_head(target), num_speculative_tokens=2)
    assert_lossless(decoder, num_samples=2000, top_k=4, temperature=0.7)


def test_assert_lossless_refuses_options_of_a_rule():
    """A rule is proved without a decoder; what only a decoder knows is an error."""
    with pytest.raises(GenerationError, match="top_k"):
        assert_lossless(MTPDecoder.from_model(table_target(), proposer=NGramProposer()).options.rule, top_k=3)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("previous", ["hidden", "cache"])
@pytest.mark.parametrize("num_draft", [1, 2, 3, 5])
def test_an_exact_head_is_never_refused(num_draft, previous, num_layers):
    """A head built to say the target's own law has q = p at every depth: every draft of every row is kept, under every rule.

    With "hidden" it stands on the right hidden states, with "cache" on its own cache: one position off, and drafts are refused.
    """
    target = table_target(4)
    decoder = MTPDecoder.from_model(target, head=exact_head(target, previous, num_layers))
    ids, mask = torch.tensor([[0, 0, 2, 1], [3, 1, 2, 0]]).repeat(4, 1), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).repeat(4, 1)
    for acceptance in ("standard", "block", "coupled"):
        decoder.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=24,
            do_sample=True,
            seed=1,
            num_speculative_tokens=num_draft,
            acceptance=acceptance,
        )
        assert decoder.metrics.acceptance_rate() == [1.0] * num_draft, acceptance


def test_samples_are_counted_to_the_last():
    """The counts add up to the number asked for, over batches of any size, and the seed decides them."""
    decoder = MTPDecoder.from_model(table_target(), proposer=NGramProposer())
    counts = [sample_texts(decoder, [0, 1], 2, 70, seed=4, batch_size=size) for size in (70, 32, 32)]
    assert [count.total() for count in counts] == [70, 70, 70]
    assert counts[1] == counts[2]
