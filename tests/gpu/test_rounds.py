"""Rounds on a GPU: the same text as plain decoding there, the same draws as here, in one graph, and never waiting."""

import copy

import pytest
import torch

from benchmarks.waiting import WatchedStep
from mtpdecode import CropCache, GenerationError, MTPDecoder, NGramProposer
from mtpdecode.captured import RECORDS
from mtpdecode.compiled import CompiledRound
from mtpdecode.families import FAMILIES
from mtpdecode.loop import decode_round
from mtpdecode.state import Noise, Purpose
from mtpdecode.testing import SyntheticAcceptance
from tests import tiny
from tests.families import gemma4
from tests.families.zoo import qwen3_5

RULES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 9},
    "block": {"do_sample": True, "acceptance": "block"},
    "coupled": {"do_sample": True, "acceptance": "coupled"},
    "synthetic": {"do_sample": False, "acceptance": SyntheticAcceptance([0.7, 0.4])},
}
NUM_TOKENS = 24
ROWS = tiny.prompts()


def decoder_on(device, name, num_layers=1, **options):
    """A decoder whose target and head are copies on the device."""
    target = copy.deepcopy(tiny.target(name)).to(device)
    head = tiny.build_head(tiny.target(name), tiny.row_of(name), num_layers)
    moved = type(head)(target, tiny.row_of(name), num_layers).eval()
    moved.load_state_dict(head.state_dict())
    return MTPDecoder.from_model(target, head=moved, **({"num_speculative_tokens": 3} | options))


def others_on(device, kind):
    """The same for targets with states, and for those with assistants."""
    if kind == "qwen3_5":
        row = next(row for row in FAMILIES if row.family == "qwen3_5")
        here = qwen3_5.build()
        target, head = copy.deepcopy(here).to(device), tiny.build_head(here, row)
        moved = type(head)(target, row).eval()
        moved.load_state_dict(head.state_dict())
        return MTPDecoder.from_model(target, head=moved, num_speculative_tokens=3)
    return MTPDecoder.from_model(copy.deepcopy(gemma4.target("e2b")).to(device), assistant=kind, num_speculative_tokens=3)


def batch_on(device, rows=ROWS, side="left"):
    return {name: tensor.to(device) for name, tensor in tiny.padded(rows, side).items()}


def plain_on(model, row, **options):
    """What `model.generate` makes of a row alone, on the model's device."""
    ids = tiny.one(row).to(model.device)
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), **({"do_sample": False} | options))
    return sequence[0, len(row) :].tolist()


# ── the text ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_greedy_text_of_ragged_rows_is_that_of_generate(name, side, device):
    decoder = decoder_on(device, name)
    found = decoder.generate(**batch_on(device, side=side), max_new_tokens=NUM_TOKENS, do_sample=False)
    assert found.device.type == device.type
    tiny.assert_rows(found, 9, [plain_on(decoder.target, row, max_new_tokens=NUM_TOKENS) for row in ROWS], f"{name} on {device}")


@pytest.mark.parametrize("kind", ["qwen3_5", "assistant"])
def test_greedy_text_of_recurrent_targets_and_with_assistants(kind, device, tmp_path):
    source = kind if kind == "qwen3_5" else gemma4.write(tmp_path / "a", "e2b", generation={"suppress_tokens": [5]})
    decoder = others_on(device, source)
    found = decoder.generate(**batch_on(device), max_new_tokens=NUM_TOKENS, do_sample=False)
    tiny.assert_rows(found, 9, [plain_on(decoder.target, row, max_new_tokens=NUM_TOKENS) for row in ROWS], f"{kind} on {device}")


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"lookup": NGramProposer(3)}, {"draft_vocabulary": 20}])
def test_greedy_text_with_other_drafters(options, device):
    decoder = decoder_on(device, "llama", **options)
    found = decoder.generate(**batch_on(device), max_new_tokens=NUM_TOKENS, do_sample=False)
    tiny.assert_rows(found, 9, [plain_on(decoder.target, row, max_new_tokens=NUM_TOKENS) for row in ROWS], f"{options}")


@pytest.mark.parametrize("rule", ["sampled", "block", "coupled"])
def test_sampled_text_is_that_of_the_cpu(rule, device):
    """The noise is the same number for number; logits differ in their last bits, so a rare draw may fall the other way."""
    options = {"max_new_tokens": 24, "seed": 7, "eos_token_id": -1} | RULES[rule]
    there = decoder_on(device, "llama").generate(**batch_on(device), **options).cpu()
    here = tiny.decoder("llama", 3).generate(**batch_on("cpu"), **options)
    same = [torch.equal(a, b) for a, b in zip(there, here, strict=True)]
    assert all(same) if device.type == "cpu" else sum(same) >= len(same) - 1, f"rows that are the same: {same}"


def test_noise_is_the_same_everywhere(device):
    seeds, positions = torch.tensor([3, 2**61 + 5]), torch.tensor([0, 70_000])
    here, there = Noise(seeds).of_round(positions), Noise(seeds.to(device)).of_round(positions.to(device))
    for purpose in (Purpose.TARGET, Purpose.DRAFT, Purpose.ACCEPT):
        at = positions[:, None] + torch.arange(4)
        assert torch.equal(there.uniform(at.to(device), purpose).cpu(), here.uniform(at, purpose))
        drawn = there.exponential(positions.to(device), purpose, 500).cpu()
        torch.testing.assert_close(drawn, here.exponential(positions, purpose, 500), rtol=1e-6, atol=0)  # log1p is not exact


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_no_round_waits(name, rule, device):
    decoder = decoder_on(device, name)
    assert_never_waits(decoder, device, **RULES[rule])


@pytest.mark.parametrize("kind", ["qwen3_5", "assistant"])
def test_no_round_of_recurrent_targets_or_assistants_waits(kind, device, tmp_path):
    source = kind if kind == "qwen3_5" else gemma4.write(tmp_path / "a", "e2b", generation={"suppress_tokens": [5]})
    assert_never_waits(others_on(device, source), device, do_sample=False)


def assert_never_waits(decoder, device, **options):
    """Rounds of all K in which PyTorch makes every wait an error."""
    settings = {"eos_token_id": -1, "seed": 1} | options
    for k in (0, 1, 3):
        decoder.step = step = WatchedStep(decode_round, device)
        decoder.generate(**batch_on(device, ROWS[:3]), **settings, max_new_tokens=4 * (k + 1), num_speculative_tokens=k)
        assert step.num_watched > 1, f"K = {k}"


@pytest.mark.gpu
def test_the_watch_sees_a_wait(cuda):
    """Or the tests above would prove nothing."""
    watched = WatchedStep(lambda: int(torch.ones(1, device=cuda)), cuda)
    for _ in range(WatchedStep.UNWATCHED):
        watched()
    with pytest.raises(RuntimeError, match="synchroniz"):
        watched()
    assert torch.cuda.get_sync_debug_mode() == 0


# ── graphs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rule", ["greedy", pytest.param("sampled", marks=pytest.mark.slow)])
def test_a_compiled_round_is_one_graph(rule, device):
    """With inductor on a GPU; its text is that of plain rounds where floats allow, which greedy text always does here."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder, options = decoder_on(device, "llama"), {"max_new_tokens": 90, "seed": 5} | RULES[rule]
    plain = decoder.generate(**batch_on(device), **options)
    decoder.step = CompiledRound("inductor" if device.type == "cuda" else "eager")
    for _ in range(2):
        found = decoder.generate(**batch_on(device), **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert torch.equal(found, plain) or (rule == "sampled" and device.type == "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_most_rounds_are_one_launch(name, cuda, monkeypatch):
    """What is recorded does what its kernels do one by one: text, what every round kept, and lengths of caches."""
    made, record = [], RECORDS["cuda"]
    monkeypatch.setitem(RECORDS, "cuda", lambda *given: made.append(given) or record(*given))
    whole, apart = decoder_on(cuda, name), decoder_on(cuda, name)
    whole.step, apart.step = CompiledRound(), CompiledRound(is_captured=False)
    for options in ({"max_new_tokens": 90}, {"max_new_tokens": 400, "num_speculative_tokens": tiny.Turns()}):
        settings = {"do_sample": False, "eos_token_id": -1} | options
        texts = [decoder.generate(**batch_on(cuda), **settings) for decoder in (whole, apart)]
        assert torch.equal(*texts)
        assert whole.metrics.history == apart.metrics.history
        assert torch.equal(whole.cache.lengths, apart.cache.lengths)
    assert len(made) >= 4


@pytest.mark.gpu
def test_compiled_rounds_do_not_wait(cuda):
    decoder, step = decoder_on(cuda, "llama"), CompiledRound()
    for k in (0, 3):  # graphs are made first, and not watched
        decoder.step = step
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": -1, "num_speculative_tokens": k}
        decoder.generate(**batch_on(cuda), **options)
        decoder.step = watched = WatchedStep(step, cuda)
        decoder.generate(**batch_on(cuda), **options)
        assert watched.num_watched > 5


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cache", ["ragged", "crop"])
def test_caches_lie_on_the_device(cache, device):
    decoder = decoder_on(device, "llama", **({"cache": CropCache} if cache == "crop" else {}))
    decoder.generate(**batch_on(device, ROWS[:1]), max_new_tokens=6, do_sample=False)
    assert decoder.cache.lengths.device.type == device.type
    for layer in range(2):
        assert {tensor.device.type for tensor in decoder.cache.kept(layer)} == {device.type}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*input_ids.*:UserWarning")  # transformers says where the prompt is, and goes on
def test_a_prompt_left_on_the_cpu_is_refused_as_generate_refuses_it(cuda):
    decoder, prompt = decoder_on(cuda, "llama"), tiny.padded(ROWS[:2])
    with pytest.raises(RuntimeError, match="same device"):
        decoder.target.generate(**prompt, max_new_tokens=4, do_sample=False)
    with pytest.raises((GenerationError, RuntimeError), match="device"):
        decoder.generate(**prompt, max_new_tokens=4, do_sample=False)


def test_half_precision_runs(device):
    decoder = decoder_on(device, "llama")
    half = copy.deepcopy(decoder.target).to(torch.bfloat16)
    head = tiny.build_head(tiny.target("llama"), tiny.row_of("llama"))
    moved = type(head)(half, tiny.row_of("llama")).eval()
    moved.load_state_dict(head.state_dict())
    halved = MTPDecoder.from_model(half, head=moved, num_speculative_tokens=3)
    found = halved.generate(**batch_on(device), max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert found.shape == (len(ROWS), 9 + 8)
    assert {tensor.dtype for tensor in halved.cache.kept(0)} == {torch.bfloat16}


@pytest.mark.gpu
def test_memory_of_a_call_is_given_back(cuda):
    """A second call of the same shape needs no more than the first."""
    decoder, options = decoder_on(cuda, "llama"), {"max_new_tokens": NUM_TOKENS, "do_sample": False}
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        decoder.generate(**batch_on(cuda), **options)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1], peaks
