"""Images of many shapes, for target and head: embeddings in the place of tokens, at positions of their own if models have them.

GLM-OCR and Qwen3.5 give a token of an image a position in time, one in height and one in width. Text goes on behind the largest
of them, so that a token's position is no longer the slot that it lies in: neither for the target nor for the head.
"""

from functools import cache

import pytest
import torch

from mtpdecode import CropCache, MTPDecoder
from mtpdecode.families import FAMILIES
from tests import tiny
from tests.families.zoo import glm5_next, glm_ocr, minimax_m3_vl, qwen3_5, qwen3_5_moe

GREEDY = {"max_new_tokens": 24, "do_sample": False}
BUILDS = {"glm_ocr": glm_ocr.build, "qwen3_5": qwen3_5.wrapped, "qwen3_5_moe": qwen3_5_moe.wrapped}
PLAIN = {"glm5_next": glm5_next.build, "minimax_m3_vl": minimax_m3_vl.build}
"""Models in which a token of an image is one more token, as far as positions go."""

GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 12, 4)]
"""Patches of four images; a token stands for two by two of them."""
HELD = [(0,), (), (1, 2), (3,)]
"""Which of them each row holds: one, none, two, one at the very end."""

EACH = pytest.mark.parametrize("family", [*BUILDS, *PLAIN])


@cache
def decoder(family):
    model = (BUILDS | PLAIN)[family]()
    head = tiny.build_head(model, next(row for row in FAMILIES if row.family == family))
    return MTPDecoder.from_model(model, head=head, num_speculative_tokens=3)


def image_token(family):
    config = decoder(family).target.config.to_dict()
    return config.get("image_token_id") or config["image_token_index"]


def video_token(family):
    """GLM-OCR's processor writes the frames of a video as images between two tokens."""
    config = decoder(family).target.config
    return config.image_token_id if family == "glm_ocr" else config.video_token_id


@cache
def rows(family):
    token = image_token(family)
    one, wide, high, last = ([token] * (height * width // 4) for _, height, width in GRIDS)
    return [[5, *one, 8, 9], [7, 11, 12, 9, 14, 21, 17, 30], [6, *wide, 14, 15, *high, 10], [13, 9, *last]]


@cache
def pictures(family):
    vision = decoder(family).target.config.vision_config
    size = 3 * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(height * width, size, generator=generator) for _, height, width in GRIDS]


def given(family, numbers, ids):
    """What a processor gives for rows with these numbers, besides their tokens."""
    mine = [number for row in numbers for number in HELD[row]]
    if not mine:
        return {}
    types = {"mm_token_type_ids": (ids == image_token(family)).int()} if family in BUILDS else {}
    patches = torch.cat([pictures(family)[number] for number in mine])
    return types | {"pixel_values": patches, "image_grid_thw": torch.tensor([GRIDS[number] for number in mine])}


def alone(family, row):
    ids = tiny.one(rows(family)[row])
    return {"input_ids": ids} | given(family, [row], ids)


@cache
def expected(family, row):
    inputs = alone(family, row)
    sequence = decoder(family).target.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), **GREEDY)
    return sequence[0, inputs["input_ids"].shape[1] :].tolist()


@EACH
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_speculative_tokens", [1, 4])
def test_a_ragged_batch(family, side, num_speculative_tokens):
    """The prompt is read three tokens at a time, images and all."""
    batch, options = tiny.padded(rows(family), side), GREEDY | {"num_speculative_tokens": num_speculative_tokens}
    inputs = batch | given(family, range(4), batch["input_ids"])
    found = decoder(family).generate(**inputs, **options, prefill_chunk_size=3)
    tiny.assert_rows(found, batch["input_ids"].shape[1], [expected(family, row) for row in range(4)], f"padded on the {side}")


@EACH
@pytest.mark.parametrize("row", range(4))
def test_alone_on_either_cache_and_through_the_seam(family, row):
    model, inputs, whole = decoder(family).target, alone(family, row), rows(family)[row] + expected(family, row)
    assert decoder(family).generate(**inputs, **GREEDY).tolist() == [whole]
    assert model.generate(**inputs, **GREEDY, custom_generate=decoder(family)).tolist() == [whole]
    if family == "glm_ocr":
        cropped = MTPDecoder.from_model(model, head=decoder(family).head, cache=CropCache)
        assert cropped.generate(**inputs, **GREEDY).tolist() == [whole]


@pytest.mark.parametrize("family", BUILDS)
def test_positions_matter(family):
    """An image that is told as wide instead of high is another image: the tests would see a slot taken for a position."""
    for row in (2, 3):
        inputs = alone(family, row)
        turned = inputs | {"image_grid_thw": inputs["image_grid_thw"][:, [0, 2, 1]]}
        text = decoder(family).generate(**turned, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
        if text != expected(family, row):
            return
    pytest.fail("no text changes with the shape of its images")


@pytest.mark.parametrize("family", BUILDS)
def test_a_video(family):
    """Two frames with a token between them, as processors write the time there, and a row of text."""
    config = decoder(family).target.config
    start, token, end = config.to_dict().get("video_start_token_id", 5), video_token(family), 6
    frame = [token] * 4
    batch = tiny.padded([[start, *frame, 8, *frame, end, 9], [7, 11, 12]])
    ids, patches = batch["input_ids"], torch.cat([pictures(family)[0], pictures(family)[0].flip(0)])
    types = torch.where(ids == token, 2, 0).int()
    inputs = batch | {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[2, 4, 4]]), "mm_token_type_ids": types}
    plain = decoder(family).target.generate(**inputs, **GREEDY)
    assert torch.equal(decoder(family).generate(**inputs, **GREEDY), plain)
    other = inputs | {"pixel_values_videos": 1 - patches}
    assert not torch.equal(decoder(family).generate(**other, **GREEDY), plain), "the video changes nothing"


@pytest.mark.parametrize("family", BUILDS)
def test_several_texts_from_one_image(family):
    if "_expand_multimodal_outputs" not in dir(decoder(family).target):
        pytest.skip("transformers 5.17 counts images by tokens before them, which these prompts do not have")
    inputs = alone(family, 0)
    found = decoder(family).generate(**inputs, **GREEDY | {"do_sample": True, "top_k": 1}, num_return_sequences=2)
    assert found.tolist() == [rows(family)[0] + expected(family, 0)] * 2


def test_the_drafts_are_the_twins(monkeypatch):
    """At every step and in every round the head's logits are those of a twin that sees the image where the target sees it."""
    decode, steps, text = decoder("glm_ocr"), [], list(rows("glm_ocr")[2])
    model, tensors = decode.target, glm_ocr.LAYOUT.published(decode.head, decode.target)
    logits, inputs = decode.head.logits, alone("glm_ocr", 2)
    monkeypatch.setattr(decode.head, "logits", lambda *args: steps.append(logits(*args)[0]) or logits(*args))
    for number, chunk in enumerate(decode.stream(**inputs, **GREEDY)):
        wanted = glm_ocr.drafts(model, tensors, text, len(steps), media=given("glm_ocr", [2], tiny.one(text)))
        error = (torch.stack(steps) - wanted).abs().amax(-1)
        assert float(error.max()) < 1e-4, f"round {number}: the draft steps' logits are off by {error.tolist()}"
        steps.clear()
        text += chunk.tokens[0]
    assert number > 3
