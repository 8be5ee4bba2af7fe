"""Every Python block in the README and in docs/ runs, page by page, in one namespace each, on a tiny model."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mtpdecode
from tests import tiny

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if BLOCK.search(page.read_text())]


def tiny_tokenizer():
    """Words of the README's prompts; everything else is unknown."""
    words = ["[UNK]", "The", "future", "of", "AI", "is"]
    tokenizer = Tokenizer(models.WordLevel({word: 4 + i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    model = tiny.build("llama")
    tiny.write_checkpoint(tmp_path, model, tiny.build_head(model, tiny.row_of("llama")))
    decoder = mtpdecode.MTPDecoder.from_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(mtpdecode, "load", lambda name: (decoder, tokenizer))
    names = {"mtpdecode": mtpdecode, "model": decoder.target, "decoder": decoder, "folder": tmp_path / "head"}
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_no_page_was_missed():
    assert ROOT / "README.md" in PAGES
