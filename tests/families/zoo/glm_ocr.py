"""GLM-OCR: the text part of a multimodal model, with norms on both sides of attention and MLP; gate and up joined or apart."""

from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

from tests import tiny
from tests.families.layouts import deepseek_layout, twin_of
from tests.families.zoo import Case

LAYOUT = deepseek_layout("model.language_model.layers.{n}.")
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TEXT = tiny.DENSE | {"rope_parameters": ROPE, "head_dim": 8}
VISION = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": tiny.SIZE, "intermediate_size": 16}
TOKENS = ("image", "video", "image_start", "image_end", "video_start", "video_end")


def build():
    tokens = {f"{name}_token_id": tiny.VOCAB - 6 + number for number, name in enumerate(TOKENS)}
    config = GlmOcrConfig(text_config=TEXT, vision_config=VISION | {"patch_size": 4, "image_size": 16}, **tokens)
    return tiny.fill(GlmOcrForConditionalGeneration(config).eval(), seed=5)


def published_config(settings):
    """The count of MTP layers lies where the text part is described."""
    return settings | {"text_config": settings["text_config"] | {"num_nextn_predict_layers": 1}}


CASES = [Case("glm_ocr", "glm_ocr", build, LAYOUT.published, twin_of(LAYOUT), published_config)]
