"""What goes wrong elsewhere, one test each: seen on transformers 5.23.0, in `generate(use_mtp=True)` unless said otherwise."""

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from mtpdecode import Draft, GenerationError, MTPDecoder, MTPHead, MTPProposer, RaggedCache, StandardAcceptance, checkpoint
from mtpdecode.acceptance import accept, acceptance_named
from mtpdecode.state import Noise
from mtpdecode.train import mtp_loss
from tests import tiny

LENGTH = 20
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False}


@pytest.fixture
def folder(tmp_path):
    """A DeepSeek checkpoint of two layers and a head, in two files."""
    return tiny.write_checkpoint(tmp_path / "deepseek", tiny.target("deepseek_v3"), tiny.head("deepseek_v3"), num_shards=2)


def test_r01_a_second_turn_is_the_plain_second_turn():
    """Elsewhere a cache handed in for turn two is fed the whole sequence again, and the text changes."""
    decoder = tiny.decoder("llama", 3)
    first = decoder.generate(tiny.one(tiny.prompts()[0]), **GREEDY)
    second = torch.cat([first, tiny.one([5, 6, 7])], dim=1)
    assert torch.equal(decoder.generate(second, **GREEDY), decoder.target.generate(second, **GREEDY))
    cache = DynamicCache()
    with pytest.raises(GenerationError, match=r"(cache|past_key_values)=DynamicCache.*keeps its own caches.*input_ids"):
        decoder.generate(second, **{tiny.CACHE: cache}, **GREEDY)


def test_r02_the_heads_files_are_read_once(folder, monkeypatch):
    """Elsewhere every call of generate reads the head from disk again."""
    opened = []
    safe_open = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda path, **kwargs: opened.append(path) or safe_open(path, **kwargs))
    decoder = MTPDecoder.from_pretrained(folder)
    assert opened, "loading goes through safe_open"
    opened.clear()
    for _ in range(3):
        decoder.generate(tiny.one([5, 6, 7]), **GREEDY)
    assert not opened, f"three calls opened files: {opened}"


def test_r03_k_is_what_is_asked_for():
    """Elsewhere num_assistant_tokens is ignored: as many drafts as the head has layers."""
    for num_layers in (1, 2):
        decoder = tiny.decoder("llama", 5, num_layers)
        decoder.generate(tiny.one(tiny.prompts()[0]), **GREEDY)
        assert decoder.metrics.drafted[0] == 5, f"{num_layers} layers, K=5: {decoder.metrics.drafted}"
        assert decoder.metrics.histogram()[0, 3:].sum() > 0, "drafts beyond the head's layers are kept now and then"


def test_r04_batches_and_several_sequences():
    """Elsewhere batch_size > 1 and num_return_sequences > 1 raise."""
    decoder, rows = tiny.decoder("llama", 3), tiny.prompts()
    sequences = decoder.generate(**tiny.padded(rows), **GREEDY)
    tiny.assert_rows(sequences, 9, [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows], "a batch")
    sampled = decoder.generate(**tiny.padded(rows), max_new_tokens=4, do_sample=True, num_return_sequences=4)
    assert sampled.shape == (20, 13)


def test_r05_the_cache_is_static():
    """Elsewhere a static cache raises. Ours keeps its slots where they are until a bucket is full."""
    decoder = tiny.decoder("llama", 3)
    places = set()
    for _ in decoder.stream(tiny.one(tiny.prompts()[0]), **GREEDY):
        layer = decoder.cache._cache.layers[0]
        places.add((layer.keys.data_ptr(), layer.keys.shape))
    assert len(places) == 1, f"keys moved or changed shape within one bucket: {places}"


def test_r06_a_head_can_be_trained():
    """Elsewhere the loss starts as None and the first addition raises."""
    model = tiny.build("llama").train()
    head = tiny.build_head(model, tiny.row_of("llama"))
    ids = torch.tensor([row + tiny.plain("llama", row, max_new_tokens=20)[: 20 - len(row)] for row in tiny.prompts()])
    before = mtp_loss(head, model, ids, num_steps=2).detach()
    assert before.shape == (2,), "one loss per draft step"
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        mtp_loss(head, model, ids, num_steps=2).sum().backward()
        optimizer.step()
    after = mtp_loss(head, model, ids, num_steps=2).detach()
    assert float(after.sum()) < float(before.sum()), f"five steps of training: {before.tolist()} -> {after.tolist()}"
    assert all(parameter.grad is None for parameter in model.parameters()), "only the head learns"


def test_r07_saving_keeps_every_tensor_of_the_head(folder, tmp_path):
    """Elsewhere save_pretrained writes no MTP tensor while the config still promises them, and reloading raises."""
    decoder = MTPDecoder.from_pretrained(folder)
    decoder.save_pretrained(tmp_path / "saved")
    again = MTPDecoder.from_pretrained(tmp_path / "saved")
    wanted = tiny.head("deepseek_v3").state_dict()
    assert again.head.state_dict().keys() == wanted.keys()
    different = [name for name, tensor in again.head.state_dict().items() if not torch.equal(tensor, wanted[name])]
    assert not different, f"not bit for bit what was saved: {different}"


def test_r08_the_object_still_works_after_saving(folder, tmp_path):
    """Elsewhere config.dtype has become a string by then, and the next call crashes."""
    decoder = MTPDecoder.from_pretrained(folder)
    before = decoder.generate(tiny.one([5, 6, 7]), **GREEDY)
    decoder.save_pretrained(tmp_path / "saved")
    assert torch.equal(decoder.generate(tiny.one([5, 6, 7]), **GREEDY), before)
    assert isinstance(decoder.target.config.dtype, torch.dtype), f"config.dtype is {decoder.target.config.dtype!r}"


def test_r09_a_model_in_memory_can_have_a_head():
    """Elsewhere a model without a checkpoint cannot use MTP."""
    model = tiny.build("mistral")
    decoder = MTPDecoder.from_model(model, head=MTPHead(model, tiny.row_of("llama")), num_speculative_tokens=2)
    row = tiny.prompts()[0]
    expected = tiny.plain("mistral", row, max_new_tokens=LENGTH)
    assert decoder.generate(tiny.one(row), **GREEDY).tolist() == [row + expected], "random weights: slow, and right"


def test_r10_long_prompts_are_read_in_chunks_by_target_and_head():
    """Elsewhere prefill_chunk_size is ignored: [300] instead of [64, 64, 64, 64, 44].

    Here the last token of the prompt is the first pending one, so 200 tokens are 199 and one.
    """
    decoder, prompt = tiny.decoder("llama", 2), torch.randint(3, tiny.VOCAB, (1, 200))
    model, by_target, by_head = decoder.target.model, [], []
    hooks = [
        model.register_forward_pre_hook(lambda _, __, kw: by_target.append(kw["input_ids"].shape[1]), with_kwargs=True),
        decoder.head.register_forward_pre_hook(lambda _, args: by_head.append(args[1].shape[1])),
    ]
    sequences = decoder.generate(prompt, max_new_tokens=2, do_sample=False, prefill_chunk_size=64)
    for hook in hooks:
        hook.remove()
    assert by_target[:4] == [64, 64, 64, 7], f"the target read {by_target}"
    assert max(by_target[4:]) <= 3, f"then windows of K + 1: {by_target}"
    assert max(by_head) <= 64 + 1, f"the head read {by_head}: a chunk, and what it handed in again"
    assert sum(by_head[:4]) >= 199, f"the head read all of the prompt too: {by_head}"
    assert torch.equal(sequences, decoder.target.generate(prompt, max_new_tokens=2, do_sample=False))


class SevenStops(StoppingCriteria):
    """Stops behind any token that leaves remainder 0 by 7."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 7 == 0


def test_r11_a_users_criterion_is_not_overshot():
    """Elsewhere a custom StoppingCriteria overshoots by up to K tokens."""
    decoder, options = tiny.decoder("llama", 5), {**GREEDY, "stopping_criteria": StoppingCriteriaList([SevenStops()])}
    for row in tiny.prompts():
        sequence = decoder.generate(tiny.one(row), **options)
        assert torch.equal(sequence, decoder.target.generate(tiny.one(row), **options)), f"behind {row}"
        assert int(decoder.cache.lengths) == sequence.shape[1] - 1, "and the cache holds what the text does"


def test_r12_embeddings_are_a_prompt():
    """Elsewhere an inputs_embeds prompt raises."""
    decoder, row = tiny.decoder("llama", 3), tiny.prompts()[0]
    embeds = decoder.target.get_input_embeddings()(tiny.one(row)).detach()
    expected = tiny.plain("llama", row, max_new_tokens=LENGTH)
    assert decoder.generate(inputs_embeds=embeds, **GREEDY).tolist() == [expected]


def test_r13_the_same_seed_can_be_the_same_text_as_plain_sampling():
    """Elsewhere sampling with a seed is another text when it is speculative. With acceptance="coupled" it is the same."""
    decoder, batch = tiny.decoder("llama", 3, acceptance="coupled"), tiny.padded(tiny.prompts())
    options = {"max_new_tokens": LENGTH, "do_sample": True, "temperature": 0.7, "seed": 5}
    plain = decoder.generate(**batch, **options, num_speculative_tokens=0)
    assert torch.equal(decoder.generate(**batch, **options), plain)
    assert decoder.metrics.tau > 1.2, f"and drafts are kept: {decoder.metrics}"


class Watching(MTPProposer):
    """Keeps the drafts that it hands over."""

    def __init__(self, head):
        super().__init__(head)
        self.drafts = []

    def propose(self, state, num_speculative_tokens, noise):
        self.drafts.append(super().propose(state, num_speculative_tokens, noise))
        return self.drafts[-1]


def test_r14_a_chosen_token_comes_without_a_law_and_a_drawn_one_with_its_own():
    """Elsewhere (Gemma 4 assistant) the token is an argmax, and the softmax is handed to the ratio test.

    For the numbers below that gives token 0 in 20,000 of 20,000 draws, where 40 % are right.
    """
    proposer = Watching(tiny.head("llama"))
    decoder = MTPDecoder.from_model(tiny.target("llama"), proposer=proposer, num_speculative_tokens=3)
    for sampling in ("greedy", "sample"):
        proposer.drafts.clear()
        decoder.generate(tiny.one([5, 6, 7]), max_new_tokens=8, do_sample=True, seed=1, draft_sampling=sampling)
        laws = [draft.probs for draft in proposer.drafts]
        assert all((law is None) == (sampling == "greedy") for law in laws), f"draft_sampling={sampling!r}: {laws}"

    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.3, 0.28, 0.22, 0.2])
    num, positions = 20_000, torch.arange(20_000)
    noise, target = Noise(torch.full((num,), 17)), p.expand(num, 2, 4)
    chosen = Draft(torch.full((num, 1), int(q.argmax())), None)
    drawn = Draft(torch.multinomial(q, num, replacement=True)[:, None], q.expand(num, 1, 4))
    for what, draft in (("chosen", chosen), ("drawn", drawn)):
        first = accept(StandardAcceptance(), draft, target, noise, positions).tokens[:, 0]
        shares = torch.bincount(first, minlength=4) / num
        assert float((shares - p).abs().max()) < 0.02, f"{what} drafts: {shares.tolist()}, the law is {p.tolist()} (5 sigma)"


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_r15_any_number_of_base_and_mtp_layers(name, tmp_path):
    """Elsewhere layer numbers are written into a regular expression (61, 92, 46): a pruned or tiny checkpoint fails."""
    model = tiny.build(name, num_hidden_layers=5)
    head = tiny.build_head(model, tiny.row_of(name), 3)
    decoder = MTPDecoder.from_pretrained(tiny.write_checkpoint(tmp_path / name, model, head))
    assert decoder.head.num_layers == 3
    row = tiny.prompts()[0]
    assert decoder.generate(tiny.one(row), **GREEDY).tolist() == [row + tiny.alone(model, row, max_new_tokens=LENGTH)]


@pytest.mark.parametrize("rule", ["standard", "block"])
def test_r16_equal_laws_give_no_nan(rule):
    """Elsewhere the residual is divided by its sum, which is 0 where p equals q."""
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    draft = Draft(torch.tensor([[1], [0]]), p[:, None])
    target = p[:, None].expand(-1, 2, -1)
    verdict = accept(acceptance_named(rule), draft, target, Noise(torch.tensor([1, 2])), torch.tensor([4, 9]))
    assert verdict.counts.tolist() == [2, 2], "a draft from the target's own law is always kept"
    weights = acceptance_named(rule).residual(draft, target, torch.zeros(2, dtype=torch.long))
    assert weights.isfinite().all(), f"{rule}: {weights}"
    assert torch.equal(weights, p), "where rounding refuses a token all the same, the target's law stands in"


def test_r17_every_call_says_what_was_accepted():
    """Elsewhere no output object has statistics."""
    decoder, rows = tiny.decoder("llama", 3), tiny.prompts()
    for options in ({}, {"do_sample": True, "seed": 1}, {"num_speculative_tokens": 0}):
        out = decoder.generate(**tiny.padded(rows), **(GREEDY | options), return_dict_in_generate=True)
        assert out.metrics is decoder.metrics
        assert out.metrics.num_tokens == sum(map(sum, out.metrics.history)) > 0
        assert out.metrics.tau >= 1.0
        assert len(out.metrics.acceptance_rate()) == max(out.metrics.drafted)
        assert set(out.metrics.seconds) == {"prefill", "propose", "score", "accept", "round", "host"}


def test_a_factory_makes_the_cache():
    """RaggedCache is the default; the public attribute is the manager of the last call."""
    decoder = tiny.decoder("llama", 1)
    decoder.generate(tiny.one([5, 6]), max_new_tokens=2)
    assert isinstance(decoder.cache, RaggedCache)
