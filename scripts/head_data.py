"""Step 1 of 2 of the shipped head: let the base model write its own training data.

    python scripts/head_data.py --base BASE --out DIR --seed 0 --minutes 60

The head has to guess what the base would say next, so the best text to learn from is the base's own. Every row of a
batch is a small automaton; all rows advance in lock-step, so there is no padding and no waste:

    chat    <system><user>  starter  sampled question  <end><assistant>  greedy answer  <end>  next question ...
    prose   opening         sampled start              greedy continuation
    code    opening         sampled start              greedy continuation

What is kept of every position: the token, whether it was chosen greedily, and the base's final normed hidden state, which is
all that a head needs (the teacher's logits are one product away). A file holds one batch:

    tokens  (B, S) int32      greedy  (B, S) bool      hidden  (B, S, D) bfloat16      kind  one of KINDS

The questions are sampled by the base from the starters below: no data set is downloaded, and no held-out prompt can be in it
(`benchmarks/prompts.py` holds those, and `tests/unit/test_prompts.py` compares).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

KINDS = ("chat", "prose", "code")
SHARES = {"chat": 2, "prose": 1, "code": 1}  # batches of each kind in turn; a chat answer is what users read most
MAX_ANSWER, MAX_QUESTION = 200, 48
SAMPLED_START = (8, 40)  # prose and code: how many tokens are sampled before the greedy continuation begins
CONTINUATION = 140

QUESTION_STARTERS = """What is|What are|How do I|How does|How can I|Why do|Why is|Explain|Explain how|Describe|Write a|
Write a short|Write a Python function|Write a function that|Write a story about|Write an email|Give me|Give me three|Can you|
Could you|List|List five|
Tell me|Tell me about|Who was|Who is|When did|Where is|Which|Summarize|Translate|Compare|Define|Create|Help me|
I want to|I need|I have|I am|My|Is it|Are there|Do|Does|Should I|What would|What's the best|What happens when|
What is the difference between|How much|How many|How long|In|If|Suggest|Recommend|Rewrite|Correct|Classify|Generate|Design|
Plan|Solve|Calculate|Find|Name|Identify|Convert|Provide|Make|Teach me|Show me|Imagine|Please|Please explain|Please write|
The|A|Hello|Hi|Thank you|Let's|For|With|As a|On|Why can't|What does|What kind of|How would you|Outline|Analyze|Discuss|Propose"""

PROSE_OPENINGS = """The|In|A|It was|When|She|He|They|Once|On a|At the|For|As|This|There|During|After|Before|Many|Most|
One of the|The history of|The city|The first|The study of|According to|Although|People|Scientists|In the early|In recent years|
My|We|I|Our|While|Because|Since|If|Today|Early|Every|Although the|Life|Water|The river|The old|His|Her|Their|What|How|
Climate|Music|Energy|Health|Children|The sun|The ocean|The king|The village|The company|A good|The human|The process of|
The most|The theory of|Modern|Over the|Under|Between|From|To|By the|With|Without|Among|Long ago|In a small|In the middle of"""

CODE_OPENINGS = """def |import |from |class |#include|#!/usr/bin/env python|def main(|function |const |public class |
import numpy as np\n|import os\n|import re\n|import torch\n|@dataclass\nclass |def test_|def __init__(self, |for i in range(|
if __name__ ==|async def |def get_|def load_|def parse_|def compute_|def is_|def find_|\"\"\"|# |// |let |var |int main(|
SELECT |struct |try:\n|with open(|class Node:|class Stack:|def add(|def sort|def read_|def merge|def count_|from typing import |
import json\n|import random\n|import math\n|import argparse\n|import unittest\n|<html>|def fibonacci|def binary_search("""


class LockstepLlama:
    """A Llama whose rows all stand at the same position: decoding is one product per weight and no mask at all.

    keys, values   (L, B, Hkv, S, Dh)      position   the next free slot, the same in every row
    """

    def __init__(self, model: LlamaForCausalLM, num_rows: int, num_slots: int) -> None:
        config = model.config
        self.model, self.position = model, 0
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_rows, self.kv_heads, num_slots, self.width)
        self.keys, self.values = (torch.zeros(shape, dtype=model.dtype) for _ in range(2))
        positions = torch.arange(num_slots)[None]
        self.cos, self.sin = (t[0] for t in model.model.rotary_emb(self.keys[0, :, 0], positions))
        self.linears = [self._fuse(layer) for layer in model.model.layers]

    @staticmethod
    def _fuse(layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """One product for q, k, v and one for gate, up: fewer, larger products are faster."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        return qkv, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """x (B, h, T, Dh) rotated to positions start, start + 1, ..."""
        cos, sin = (t[start : start + x.shape[2]] for t in (self.cos, self.sin))
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], -1) * sin

    def _attend(self, index: int, x: Tensor, qkv: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D). For T = 1 the query heads of a group become the query positions: plain SDPA, no mask."""
        rows, length, _ = x.shape
        start, stop = self.position, self.position + length
        joined = F.linear(x, qkv).view(rows, length, self.heads + 2 * self.kv_heads, self.width).transpose(1, 2)
        query, key, value = joined.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        self.keys[index][:, :, start:stop] = self._rotate(key, start)
        self.values[index][:, :, start:stop] = value
        keys, values = self.keys[index][:rows, :, :stop], self.values[index][:rows, :, :stop]
        query = self._rotate(query, start)
        if length > 1:  # only the shared prefix, from an empty cache
            out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2).reshape(rows, length, -1)
        out = F.scaled_dot_product_attention(query.reshape(rows, self.kv_heads, -1, self.width), keys, values)
        return out.reshape(rows, 1, -1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), or (1, T) for a prefix that all rows share -> final normed hidden states (B or 1, T, D)."""
        x = F.embedding(tokens, self.model.model.embed_tokens.weight)
        for index, (layer, (qkv, gate_up)) in enumerate(zip(self.model.model.layers, self.linears, strict=True)):
            x = x + F.linear(self._attend(index, layer.input_layernorm(x), qkv), layer.self_attn.o_proj.weight)
            gate, up = F.linear(layer.post_attention_layernorm(x), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight)
        self.position += tokens.shape[1]
        return self.model.model.norm(x)


class Row:
    """One row's automaton: says which token comes next and whether the base chose it greedily.

    forced  tokens still to be put in (template, starter)    sampling  the next token is sampled, else it is the argmax
    """

    def __init__(self, kind: str, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> None:
        self.kind, self.tokenizer, self.generator = kind, tokenizer, generator
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.forced: list[int] = []
        self.begin_text() if kind != "chat" else self.begin_question(first=True)

    def _pick(self, choices: str) -> str:
        options = choices.replace("|\n", "|").split("|")
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _begin(self, sampling: bool, budget: int) -> None:
        self.sampling, self.budget = sampling, budget

    def begin_question(self, first: bool = False) -> None:
        prefix = "" if first else "\n<|im_start|>user\n"
        self.forced += self._encode(prefix + self._pick(QUESTION_STARTERS))
        self._begin(True, MAX_QUESTION)

    def begin_text(self) -> None:
        self.forced += self._encode(self._pick(PROSE_OPENINGS if self.kind == "prose" else CODE_OPENINGS))
        self._begin(True, int(torch.randint(*SAMPLED_START, (), generator=self.generator)))

    def next(self, token: int) -> tuple[int, bool]:
        """token, the base's choice -> the token to put in and whether it is the base's own greedy choice."""
        if self.forced:
            return self.forced.pop(0), False
        greedy = not self.sampling
        self.budget -= 1
        if token == self.end or self.budget <= 0:
            self._turn(token)
        return token, greedy

    def _turn(self, token: int) -> None:
        """The sampled part is over: the greedy part begins, and the other way round."""
        if self.kind == "chat":
            self.forced += [] if token == self.end else [self.end]
            if not self.sampling:
                return self.begin_question()
            self.forced += self._encode("\n<|im_start|>assistant\n")
            return self._begin(False, MAX_ANSWER)
        if not self.sampling:  # a text that ended or ran long: a new one, after the separator of the pre-training
            self.forced += [self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
            return self.begin_text()
        return self._begin(False, CONTINUATION)


def prefix_of(kind: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if kind != "chat":
        return [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False)
    return tokenizer(text.split("@")[0], add_special_tokens=False)["input_ids"]


def sample(logits: Tensor, generator: torch.Generator, temperature: float = 0.9) -> Tensor:
    """logits (n, V) float32 -> (n,) drawn tokens, by inverting the cumulative law: one uniform a row."""
    law = (logits / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(law, torch.rand(len(law), 1, generator=generator)).squeeze(-1).clamp(max=law.shape[-1] - 1)


@torch.inference_mode()
def write_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str, num_rows: int, length: int, seed: int):
    """-> the tensors of one file; see the module's docstring."""
    generator = torch.Generator().manual_seed(seed)
    rows = [Row(kind, tokenizer, generator) for _ in range(num_rows)]
    prefix = torch.tensor([prefix_of(kind, tokenizer)])
    llama = LockstepLlama(model, num_rows, prefix.shape[1] + length)
    tokens = torch.zeros(num_rows, prefix.shape[1] + length, dtype=torch.int32)
    greedy = torch.zeros_like(tokens, dtype=torch.bool)
    hidden = torch.zeros(*tokens.shape, model.config.hidden_size, dtype=torch.bfloat16)
    tokens[:, : prefix.shape[1]] = prefix
    hidden[:, : prefix.shape[1]] = llama.forward(prefix)
    for position in range(prefix.shape[1], tokens.shape[1]):
        logits = F.linear(hidden[:, position - 1].to(model.dtype), model.lm_head.weight).float()
        choices = logits.argmax(-1)
        drawing = torch.tensor([row.sampling for row in rows])
        choices[drawing] = sample(logits[drawing], generator)
        chosen = [row.next(token) for row, token in zip(rows, choices.tolist(), strict=True)]
        tokens[:, position] = torch.tensor([token for token, _ in chosen], dtype=torch.int32)
        greedy[:, position] = torch.tensor([is_greedy for _, is_greedy in chosen])
        hidden[:, position] = llama.forward(tokens[:, position, None].long())[:, 0]
    return {"tokens": tokens, "greedy": greedy, "hidden": hidden}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base model (mtpdecode.load caches one)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0, help="one per process; batches count on from seed * 1000")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="only these")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1, help="one process of one thread per core is fastest")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    order = [kind for kind in args.kinds for _ in range(SHARES[kind])]
    start, done = time.time(), 0
    while time.time() - start < 60 * args.minutes:
        began, kind = time.time(), order[done % len(order)]
        tensors = write_batch(model, tokenizer, kind, args.rows, args.length, args.seed * 1000 + done)
        partial = args.out / f"{args.seed}-{done:03d}-{kind}.partial"
        save_file(tensors, partial, metadata={"kind": kind})
        partial.rename(partial.with_suffix(".safetensors"))  # a reader never sees half a file
        count = tensors["tokens"].numel()
        print(f"{kind} {count} tokens, {tensors['greedy'].sum()} greedy, {count / (time.time() - began):.0f} tok/s", flush=True)
        done += 1


if __name__ == "__main__":
    main()
