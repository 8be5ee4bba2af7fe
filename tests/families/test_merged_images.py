"""EXAONE 4.5 reads images as embeddings in the place of tokens: text is that of `generate`, and the head is given the same."""

from functools import cache

import pytest
import torch

from mtpdecode import CropCache, MTPDecoder
from tests import tiny
from tests.families.test_zoo import built
from tests.families.zoo import exaone4_5

GREEDY = {"max_new_tokens": 24, "do_sample": False}
IMAGE = [46, 46, 46, 46]
"""What a processor writes for an image of 4 x 4 patches: a token for every 2 x 2 of them."""
ROWS = [[5, *IMAGE, 8, 9], [7, 11, 3, 12, 9, 4, 21, 17, 30], [*IMAGE, 6, 14, *IMAGE, 10], [13, 9, *IMAGE]]
"""One image, none, two, one at the very end."""


@cache
def pictures():
    """The images of all rows, in order; each is other patches."""
    patches = torch.randn(4, 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return list(patches)


def given(rows):
    """What a processor gives for rows, besides their tokens."""
    held = [range(1), range(0), range(1, 3), range(3, 4)]
    mine = [pictures()[number] for row in rows for number in held[row]]
    if not mine:
        return {}
    return {"pixel_values": torch.cat(mine), "image_grid_thw": torch.tensor([[1, 4, 4]] * len(mine))}


@cache
def decoder():
    model, head = built(exaone4_5.CASES[0])
    return MTPDecoder.from_model(model, head=head, num_speculative_tokens=3)


@cache
def expected(row):
    return tiny.alone(decoder().target, ROWS[row], **given([row]), max_new_tokens=24)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 4])
def test_a_ragged_batch(side, num_speculative_tokens):
    """The prompt is read three tokens at a time, images and all."""
    batch, options = tiny.padded(ROWS, side), GREEDY | {"num_speculative_tokens": num_speculative_tokens}
    found = decoder().generate(**batch, **given(range(4)), **options, prefill_chunk_size=3)
    tiny.assert_rows(found, batch["input_ids"].shape[1], [expected(row) for row in range(4)], f"padded on the {side}")


@pytest.mark.parametrize("row", range(4))
def test_alone_on_either_cache_and_through_the_seam(row):
    model, ids = decoder().target, tiny.one(ROWS[row])
    cropped = MTPDecoder.from_model(model, head=decoder().head, cache=CropCache)
    for found in (
        decoder().generate(ids, **given([row]), **GREEDY),
        cropped.generate(ids, **given([row]), **GREEDY),
        model.generate(ids, **given([row]), **GREEDY, custom_generate=decoder()),
    ):
        assert found.tolist() == [ROWS[row] + expected(row)]


def test_the_images_matter():
    other = {"pixel_values": given([0])["pixel_values"].flip(0), "image_grid_thw": given([0])["image_grid_thw"]}
    texts = [tiny.alone(decoder().target, ROWS[0], **images, max_new_tokens=24) for images in (given([0]), other)]
    assert texts[0] != texts[1]


def test_the_head_is_given_the_images_too(monkeypatch):
    """At the slots of an image its embeddings are those that the target reads, not the placeholder's."""
    seen, forward = [], type(decoder().head).forward
    text_model = decoder().target.get_decoder()
    handle = text_model.register_forward_pre_hook(lambda *args: seen.append(args[2]["inputs_embeds"]), with_kwargs=True)
    decoder().target(tiny.one(ROWS[2]), **given([2]), use_cache=False)
    handle.remove()
    fed = []
    monkeypatch.setattr(
        type(decoder().head),
        "forward",
        lambda self, depth, embeds, *rest: fed.append(embeds) or forward(self, depth, embeds, *rest),
    )
    decoder().generate(tiny.one(ROWS[2]), **given([2]), max_new_tokens=1, do_sample=False, num_speculative_tokens=1)
    absorbed = fed[0][:, : len(ROWS[2]) - 2]  # row j is fed the embedding of token j + 1
    assert torch.allclose(absorbed, seen[0][:, 1:-1], atol=1e-6)
    placeholder = decoder().target.get_input_embeddings().weight[46].detach()
    assert float((absorbed[0, 0] - placeholder).abs().max()) > 0.1
