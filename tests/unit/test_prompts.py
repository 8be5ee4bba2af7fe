"""The held-out prompts are held out, and balanced."""

import importlib.util
from pathlib import Path

import pytest

from benchmarks.prompts import PROMPTS, selection

ROOT = Path(__file__).parents[2]


def starters() -> set[str]:
    """What the training data grows from."""
    spec = importlib.util.spec_from_file_location("head_data", ROOT / "scripts" / "head_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    choices = "|".join((module.QUESTION_STARTERS, module.PROSE_OPENINGS, module.CODE_OPENINGS))
    return {choice.strip() for choice in choices.split("|")}


@pytest.mark.parametrize("kind", PROMPTS)
def test_each_kind_has_24_different_prompts(kind):
    assert len(set(PROMPTS[kind])) == 24


def test_no_prompt_is_a_starter_of_the_training_data():
    """A prompt goes well beyond any starter: at least three words more than the longest one that it begins with."""
    for texts in PROMPTS.values():
        for text in texts:
            longest = max((s for s in starters() if text.startswith(s)), key=len, default="")
            rest = text[len(longest) :].split()
            assert len(rest) >= 3, f"{text!r} is little more than the starter {longest!r}"


def test_selection_takes_the_kinds_in_turn():
    assert selection(2) == [(kind, PROMPTS[kind][at]) for at in range(2) for kind in ("chat", "code", "prose")]


def test_code_ends_without_white_space():
    """Else the tokenizer splits what it would have joined with the next line's indentation."""
    assert all(text == text.rstrip() for texts in PROMPTS.values() for text in texts)
