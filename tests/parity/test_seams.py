"""All the ways in and out give the same text: the seam of transformers, the drop-in, one line, streams, embeddings, chunks."""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import mtpdecode
from mtpdecode import GenerationError, MTPDecoder, NGramProposer
from tests import tiny

LENGTH = 20


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """A llama with a head, read from a checkpoint."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("seams") / "llama", tiny.target("llama"), tiny.head("llama"))
    return MTPDecoder.from_pretrained(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_custom_generate_is_generate(name, side):
    decoder, rows = tiny.decoder(name, 3, 2), tiny.prompts()
    batch = tiny.padded(rows, side)
    ours = decoder.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    seam = decoder.target.generate(**batch, max_new_tokens=LENGTH, do_sample=False, custom_generate=decoder)
    assert torch.equal(seam, ours), "model.generate(custom_generate=decoder) is another text than decoder.generate"
    tiny.assert_rows(seam, 9, [tiny.plain(name, row, max_new_tokens=LENGTH) for row in rows], "custom_generate")


def test_custom_generate_takes_our_keywords():
    decoder, batch = tiny.decoder("llama", 1), tiny.padded(tiny.prompts())
    options = {"max_new_tokens": LENGTH, "do_sample": True, "seed": 3, "num_speculative_tokens": 2, "acceptance": "block"}
    options["draft_sampling"] = "greedy"
    seam = decoder.target.generate(**batch, **options, custom_generate=decoder, return_dict_in_generate=True)
    assert torch.equal(seam.sequences, decoder.generate(**batch, **options)), "a keyword did not arrive through the seam"
    assert set(seam.metrics.drafted) == {2}, f"num_speculative_tokens=2 did not arrive: {seam.metrics.drafted}"


def test_custom_generate_without_a_mask_or_with_embeddings():
    decoder, row = tiny.decoder("llama", 3), tiny.prompts()[0]
    expected = tiny.plain("llama", row, max_new_tokens=LENGTH)
    model, options = decoder.target, {"max_new_tokens": LENGTH, "do_sample": False, "custom_generate": decoder}
    assert model.generate(tiny.one(row), **options).tolist() == [row + expected]
    embeds = model.get_input_embeddings()(tiny.one(row)).detach()
    assert model.generate(inputs_embeds=embeds, **options).tolist() == [expected], "embeddings through the seam"


def test_replacing_the_models_generate(monkeypatch):
    """`model.generate = decoder.generate` is the drop-in that loses nothing, streamer included."""
    decoder, row = tiny.decoder("llama", 3), tiny.prompts()[0]
    expected = tiny.plain("llama", row, max_new_tokens=LENGTH)
    monkeypatch.setattr(decoder.target, "generate", decoder.generate)
    streamer = Recorder()
    sequences = decoder.target.generate(tiny.one(row), max_new_tokens=LENGTH, do_sample=False, streamer=streamer)
    assert sequences.tolist() == [row + expected], "model.generate = decoder.generate is another text"
    assert streamer.values[0] == [row]
    assert [token for value in streamer.values[1:] for token in value] == expected, "the user's streamer stayed silent"


def test_one_line_reads_the_head_of_the_models_own_checkpoint(on_disk):
    rows = tiny.prompts()
    expected = [tiny.plain("llama", row, max_new_tokens=LENGTH) for row in rows]
    sequences = mtpdecode.generate(on_disk.target, **tiny.padded(rows), max_new_tokens=LENGTH, do_sample=False)
    tiny.assert_rows(sequences, 9, expected, "mtpdecode.generate")
    sequences = mtpdecode.generate(on_disk.target, tiny.one(rows[0]), max_new_tokens=LENGTH, num_speculative_tokens=3)
    assert sequences.tolist() == [rows[0] + expected[0]], "mtpdecode.generate, prompt by position"


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_stream_adds_up_to_generate(do_sample):
    decoder, rows = tiny.decoder("llama", 3, 2), tiny.prompts()
    options = {**tiny.padded(rows), "max_new_tokens": LENGTH, "do_sample": do_sample, "seed": 5, "eos_token_id": 30}
    whole = decoder.generate(**options)
    texts = [[] for _ in rows]
    for chunk in decoder.stream(**options):
        assert len(chunk.tokens) == len(rows), "a chunk says something of every row"
        for text, tokens in zip(texts, chunk.tokens, strict=True):
            text += tokens
    tiny.assert_rows(whole, 9, texts, f"stream, do_sample={do_sample}")
    assert len({len(text) for text in texts}) > 1, "rows must end at different places here"
    assert [sum(row) for row in decoder.metrics.history] == [len(text) for text in texts], "metrics count what was streamed"


def test_a_streamer_gets_what_transformers_would_give_it():
    decoder, row = tiny.decoder("llama", 3), tiny.prompts()[0]
    options = {"max_new_tokens": LENGTH, "do_sample": False}
    theirs, ours = Recorder(), Recorder()
    decoder.target.generate(tiny.one(row), streamer=theirs, **options)
    decoder.generate(tiny.one(row), streamer=ours, **options)
    assert ours.values == theirs.values, "the prompt, then one token at a time"
    assert ours.ended == theirs.ended == 1


def test_the_bare_seam_drops_a_streamer():
    """transformers does not pass it on; docs/compatibility.md says to call decoder.generate for it."""
    decoder, row, streamer = tiny.decoder("llama", 3), tiny.prompts()[0], Recorder()
    decoder.target.generate(tiny.one(row), max_new_tokens=4, do_sample=False, streamer=streamer, custom_generate=decoder)
    assert streamer.values == [[row]], "if tokens arrive here one day, the documentation can drop a limit"


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_prompts_as_embeddings(name, num_layers):
    rows, decoder = tiny.prompts(4), tiny.decoder(name, 3, num_layers)
    batch = tiny.padded(rows)
    embeds = decoder.target.get_input_embeddings()(batch["input_ids"]).detach()
    options = {"attention_mask": batch["attention_mask"], "max_new_tokens": 12, "do_sample": False}
    expected = [tiny.plain(name, row, max_new_tokens=12) for row in rows]
    sequences = decoder.generate(inputs_embeds=embeds, **options)
    tiny.assert_rows(sequences, 0, expected, f"{name}: embeddings alone, new tokens returned")
    sequences = decoder.generate(inputs_embeds=embeds, input_ids=batch["input_ids"], **options)
    assert torch.equal(sequences[:, :9], batch["input_ids"]), "with ids beside them, the ids lead the result"
    tiny.assert_rows(sequences, 9, expected, f"{name}: embeddings and ids")


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_that_no_token_has(side):
    """As images have them: the head absorbs the given embeddings, not those of placeholder ids."""
    rows, decoder = tiny.prompts(4), tiny.decoder("llama", 3, 2)
    model, batch = decoder.target, tiny.padded(rows, side)
    embeds = torch.randn(4, 9, tiny.SIZE)
    sequences = decoder.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], max_new_tokens=LENGTH, do_sample=False
    )
    for number, row in enumerate(rows):
        start = int(batch["attention_mask"][number].argmax())
        own = embeds[number : number + 1, start : start + len(row)]
        expected = model.generate(inputs_embeds=own, max_new_tokens=LENGTH, do_sample=False)
        assert torch.equal(sequences[number : number + 1], expected), f"row {number}, padding on the {side}: another text"


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`:UserWarning")
def test_processors_and_prompt_lookup_see_no_token_where_embeddings_stand():
    """With embeddings alone plain decoding shows its processors the new tokens only."""
    rows, model, head = tiny.prompts(4), tiny.target("llama"), tiny.head("llama", 2)
    embeds = [model.get_input_embeddings()(tiny.one(row)).detach() for row in rows]
    options = {"max_new_tokens": LENGTH, "do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected = [model.generate(inputs_embeds=each, **options)[0].tolist() for each in embeds]
    assert expected != [tiny.plain("llama", row, **options) for row in rows], "with ids the prompt counts, too"
    padded = torch.stack([torch.nn.functional.pad(each[0], (0, 0, 9 - each.shape[1], 0)) for each in embeds])
    mask = tiny.padded(rows)["attention_mask"]
    for given in ({"head": head}, {"proposer": NGramProposer()}):
        decoder = MTPDecoder.from_model(model, num_speculative_tokens=3, **given)
        sequences = decoder.generate(inputs_embeds=padded, attention_mask=mask, **options)
        tiny.assert_rows(sequences, 0, expected, f"embeddings with processors, {next(iter(given))}")


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 64])
def test_prefill_in_chunks_changes_nothing(size, num_layers):
    rows, decoder = tiny.prompts(), tiny.decoder("llama", 3, num_layers)
    options = {**tiny.padded(rows), "max_new_tokens": 12, "do_sample": False}
    whole = decoder.generate(**options)
    history = decoder.metrics.history
    assert torch.equal(decoder.generate(**options, prefill_chunk_size=size), whole), f"chunks of {size}: another text"
    assert decoder.metrics.history == history, f"chunks of {size}: the head drafts differently, so it absorbed something else"


def test_what_comes_back_is_what_transformers_gives_back():
    decoder, row = tiny.decoder("llama", 2), tiny.prompts()[0]
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = decoder.target.generate(tiny.one(row), return_dict_in_generate=True, **options)
    ours = decoder.generate(tiny.one(row), return_dict_in_generate=True, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert isinstance(ours, type(plain)), f"an output of {type(plain).__name__} and more"
    assert ours["sequences"] is ours.sequences, "it can be read like a dictionary, as theirs"
    short = decoder.generate(tiny.one(row).int(), **options)
    assert torch.equal(short, decoder.target.generate(tiny.one(row).int(), **options)), "int32 ids"
    assert decoder.generate(inputs=tiny.one(row), **options).tolist() == short.tolist(), "inputs= by name"


def test_num_return_sequences():
    decoder, rows = tiny.decoder("llama", 2), tiny.prompts(3)
    options = {"max_new_tokens": LENGTH, "do_sample": True, "seed": 1}
    for side in ("left", "right"):
        batch = tiny.padded(rows, side)
        three = decoder.generate(**batch, num_return_sequences=3, **options)
        assert three.shape[0] == 9, f"3 rows, 3 sequences each: {tuple(three.shape)}"
        assert torch.equal(three[:, :9], batch["input_ids"].repeat_interleave(3, dim=0)), f"padding on the {side}"
        texts = {tuple(row[9:].tolist()) for row in three}
        assert len(texts) == 9, "sequences of one prompt must be drawn independently of each other"


def test_another_model_is_refused_at_the_seam():
    decoder, other = tiny.decoder("llama", 2), tiny.target("mimo")
    with pytest.raises(GenerationError, match="another model than the decoder's own target"):
        other.generate(tiny.one([5, 6]), max_new_tokens=4, custom_generate=decoder)


@pytest.mark.parametrize("option", [tiny.CACHE, "position_ids"])
def test_what_the_bare_seam_would_ignore_is_refused(option):
    """transformers hands these to a custom_generate even when nobody asked; ours differ from what a user passed."""
    decoder = tiny.decoder("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    cache = DynamicCache()
    decoder.target(ids[:, :3], **{tiny.CACHE: cache})
    passed = {tiny.CACHE: cache, "position_ids": torch.tensor([[3, 4, 5, 6]])}[option]
    with pytest.raises(GenerationError, match=option):
        decoder.target.generate(ids, max_new_tokens=4, custom_generate=decoder, **{option: passed})


def test_a_cache_that_the_models_own_config_names_is_not_an_error():
    """Gemma's generation config asks for a cache of its own; nobody typed that."""
    model = tiny.build("llama")
    decoder = MTPDecoder.from_model(model, head=tiny.build_head(model, tiny.row_of("llama")))
    expected = decoder.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(decoder.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4), expected)
