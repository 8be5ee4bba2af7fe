"""Step 2 of 2 of the shipped head: train one MTP layer on what `scripts/head_data.py` wrote. A CPU and an hour are enough.

    python scripts/train_head.py --base BASE --data DIR --out DIR --minutes 60 --seed 0

Row j of the layer joins the token at j + 1 with the base's final normed hidden state at j and predicts the token at j + 2.
Deeper drafts go through the same layer again, fed with the layer's own output. With the true tokens a b c d e f, drafting from
row 1 (hidden state of b, token c; `^` marks whose keys it sees):

    step 1   row 1   token c   hidden h(b)    -> d      keys: step-1 rows 0 1^
    step 2   row 2   token d   z of step 1    -> e      keys: step-1 rows 0 1, its own step-2 row 2^
    step 3   row 3   token e   z of step 2    -> f      keys: step-1 rows 0 1, its own rows 2 3^

That is what decoding sees: the committed rows come from true hidden states, the drafted ones from the chain. So step 2 is
trained only where draft 1 would have been accepted, step 3 only where both were: elsewhere decoding never gets there. It also
halves the cost, which the product with the vocabulary dominates; hence, too, the draft vocabulary of `--vocabulary` ids.

    T  rows of a batch (windows laid end to end)    n  rows that a draft step works on     D  hidden size    C  draft vocabulary
    H, G, W  key heads, query heads per key head, head width    F  the base's favourites that a target keeps

A label is the base's greedy choice. The loss mixes it with the base's distribution over its F favourites; a sampled token is
no label, but the distribution at that place still is. Text that loops (a 135M model does) is thinned out, else it is most of
what is learnt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

KINDS = ("chat", "prose", "code")
DRAFTS = 3
FAVOURITES = 16  # of the base's distribution; found once, where a whole distribution would cost a product at every step
END_OF_TEXT, END_OF_TURN = 0, 2
SHORTEST_WINDOW = 32
LOOKUP, LOOPING = 4, 0.6  # a window loops if its last LOOKUP tokens foretell this share of the base's choices
BATCH_ROWS = 512  # more at once is no faster: the T x T attention outgrows the cache
WARM_UP = 0.02  # share of the run
RESIDUAL_SIZE, START_CONFIDENCE, START_EMBEDDING = 20.0, 0.3, 0.3
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


# -------------------------------------------------------------------------------------------------------------------- data


class Document(NamedTuple):
    """One row of a data file.

    tokens (S,) int64    greedy (S,) bool    hidden (S, D) bfloat16    looked_up (S,) bool: an n-gram lookup predicts the token
    slots (S, F) int32, law (S, F) float32: what the base likes to say after the token, see `Teacher.read`; F = 0 until then
    """

    tokens: Tensor
    greedy: Tensor
    hidden: Tensor
    looked_up: Tensor
    slots: Tensor
    law: Tensor


class Batch(NamedTuple):
    """T rows; row j holds what the head is given there, and whether its own token is a label.

    hidden (T, D) h_j    token (T,) t_{j+1}    greedy (T,) bool: t_{j+1} was the base's choice    window (T,) which window
    slots, law (T, F): the base's favourites for t_{j+1}
    """

    hidden: Tensor
    token: Tensor
    greedy: Tensor
    window: Tensor
    slots: Tensor
    law: Tensor


def looked_up(tokens: list[int]) -> Tensor:
    """(S,) bool: the token is the one that followed the last occurrence of the LOOKUP tokens before it."""
    followers: dict[tuple[int, ...], int] = {}
    found = [False] * len(tokens)
    for position in range(LOOKUP, len(tokens)):
        context = tuple(tokens[position - LOOKUP : position])
        found[position] = followers.get(context) == tokens[position]
        followers[context] = tokens[position]
    return torch.tensor(found)


def read_documents(path: Path) -> list[Document]:
    """The rows of a file. The hidden states stay on disk (mapped) until they are used."""
    tensors = load_file(path)
    tokens, greedy, hidden = tensors["tokens"].long(), tensors["greedy"], tensors["hidden"]
    nothing = torch.zeros(tokens.shape[1], 0)
    return [Document(t, g, h, looked_up(t.tolist()), nothing, nothing) for t, g, h in zip(tokens, greedy, hidden, strict=True)]


def read_folder(folder: Path, held_out: int) -> tuple[list[Document], dict[str, list[Document]]]:
    """Training documents, and the last `held_out` documents of each kind. The rows of a file are independent texts."""
    paths = {kind: sorted(folder.glob(f"*-{kind}.safetensors")) for kind in KINDS}
    by_kind = {kind: [document for path in paths[kind] for document in read_documents(path)] for kind in KINDS}
    training = [document for documents in by_kind.values() for document in documents[:-held_out]]
    return training, {kind: documents[-held_out:] for kind, documents in by_kind.items()}


def cut_windows(documents: list[Document], length: int, keep_loops: float, generator: torch.Generator) -> list[Document]:
    """Every document cut at a random offset into windows of at most `length` rows (and one token more), in random order."""
    windows = []
    for document in documents:
        last = len(document.tokens) - 1
        offset = int(torch.randint(1, length + 1, (), generator=generator))
        cuts = [0, *range(offset, last, length), last]
        pieces = [slice(start, stop + 1) for start, stop in itertools.pairwise(cuts) if stop - start >= SHORTEST_WINDOW]
        windows += [Document(*(tensor[piece] for tensor in document)) for piece in pieces]
    draws = torch.rand(len(windows), generator=generator)
    kept = [w for w, draw in zip(windows, draws, strict=True) if draw < keep_loops or not is_loop(w)]
    return [kept[i] for i in torch.randperm(len(kept), generator=generator)]


def is_loop(window: Document) -> bool:
    chosen = window.looked_up[window.greedy]
    return len(chosen) > 0 and bool(chosen.float().mean() > LOOPING)


def pack(windows: list[Document]) -> Batch:
    """Windows end to end. The last token of a window is only ever a follower, so a window of S tokens gives S - 1 rows."""
    lengths = torch.tensor([len(w.tokens) - 1 for w in windows])
    token, greedy = (torch.cat([getattr(w, name)[1:] for w in windows]) for name in ("tokens", "greedy"))
    hidden, slots, law = (torch.cat([getattr(w, name)[:-1] for w in windows]) for name in ("hidden", "slots", "law"))
    return Batch(hidden, token, greedy, torch.repeat_interleave(torch.arange(len(windows)), lengths), slots.long(), law)


def batches(documents: list[Document], args: argparse.Namespace, generator: torch.Generator) -> Iterator[Batch]:
    """Endless batches of BATCH_ROWS rows or a little more; a new cut and order every epoch."""
    waiting: list[Document] = []
    while True:
        for window in cut_windows(documents, args.window, args.keep_loops, generator):
            waiting.append(window)
            if sum(len(w.tokens) - 1 for w in waiting) >= BATCH_ROWS:
                yield pack(waiting)
                waiting.clear()


def draft_vocabulary(documents: list[Document], size: int, vocabulary: int) -> Tensor:
    """(C,) sorted ids: the most frequent of the base's own choices; ties go to the lower id, the earlier BPE merge."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for document in documents:
        counts += torch.bincount(document.tokens[document.greedy], minlength=vocabulary)
    counts[[END_OF_TEXT, END_OF_TURN]] = counts.sum()
    return counts.argsort(descending=True, stable=True)[:size].sort().values


# -------------------------------------------------------------------------------------------------------------------- head


class Chain(NamedTuple):
    """n drafts in progress, each after the same number of steps.

    row (n,) the committed row it started from    hidden (n, D) z of the last step
    keys, values: one (n, H, W) per step after the first
    """

    row: Tensor
    hidden: Tensor
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()

    def select(self, kept: Tensor) -> Chain:
        """kept (n,) bool -> the chains that go on."""
        keys, values = (tuple(tensor[kept] for tensor in group) for group in (self.keys, self.values))
        return Chain(self.row[kept], self.hidden[kept], keys, values)


class Committed(NamedTuple):
    """Keys and values (T, H, W) of step 1, seen by every later row of the same window; window (T,)."""

    keys: Tensor
    values: Tensor
    window: Tensor

    def mask(self, row: Tensor) -> Tensor:
        """row (n,) -> (n, T) additive: the row itself and the earlier rows of its window are open."""
        index = torch.arange(len(self.window))
        is_open = (index <= row[:, None]) & (self.window == self.window[row][:, None])
        return torch.where(is_open, 0.0, -math.inf)


class Head(nn.Module):
    """One MTP layer in DeepSeek's layout; its parameters carry the published names, with the prefix `model.layers.{N}.`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = LlamaRMSNorm(size, eps), LlamaRMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        block = LlamaDecoderLayer(config, layer_idx=0)  # for its weights and names; its forward knows nothing of chains
        self.input_layernorm, self.self_attn = block.input_layernorm, block.self_attn
        self.post_attention_layernorm, self.mlp = block.post_attention_layernorm, block.mlp
        self.shared_head = nn.ModuleDict({"norm": LlamaRMSNorm(size, eps)})
        self.heads, self.width = config.num_key_value_heads, config.head_dim
        powers = torch.arange(0, self.width, 2) / self.width
        self.register_buffer("frequencies", config.rope_parameters["rope_theta"] ** -powers, persistent=False)

    @torch.no_grad()
    def start_from(self, base: LlamaForCausalLM) -> None:
        """The base's last layer and final norm, in the units of this layer's own residual stream.

        The base's residual is about RESIDUAL_SIZE large there, ours starts from normed vectors: what the layer adds to it
        shrinks accordingly. The final norm starts below the base's, for a guess less sure than the base's own.
        """
        last = base.model.layers[-1].state_dict()
        self.load_state_dict({name: tensor.float() for name, tensor in last.items()}, strict=False)
        self.self_attn.o_proj.weight.div_(RESIDUAL_SIZE)
        self.mlp.down_proj.weight.div_(RESIDUAL_SIZE)
        self.shared_head["norm"].weight.copy_(base.model.norm.weight * START_CONFIDENCE)
        identity = torch.eye(base.config.hidden_size)
        self.eh_proj.weight.copy_(torch.cat([START_EMBEDDING * identity, identity], dim=1))

    def join(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """(n, D), (n, D) -> the layer's input (n, D)."""
        return self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)).float()

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x (n, h, W) turned to position (n,), Llama's half rotation."""
        angle = (position[:, None].float() * self.frequencies).repeat(1, 2)[:, None]
        left, right = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()

    def keys_values(self, normed: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """normed (n, D) -> rotated keys and values, both (n, H, W)."""
        shape = (len(normed), self.heads, self.width)
        key, value = self.self_attn.k_proj(normed).view(shape), self.self_attn.v_proj(normed).view(shape)
        return self.rotate(key, position), value

    def attend(self, query: Tensor, committed: Committed, chain: Chain) -> Tensor:
        """query (n, H, G, W) over the committed rows up to its own and its chain's steps -> (n, H * G * W)."""
        count, heads, group, width = query.shape
        grouped = query.transpose(0, 1).reshape(heads, count * group, width)
        past = (grouped @ committed.keys.permute(1, 2, 0)).view(heads, count, group, -1) + committed.mask(chain.row)[:, None]
        own = [(query * key[:, :, None]).sum(-1, keepdim=True).transpose(0, 1) for key in chain.keys]
        law = (torch.cat([past.float(), *own], dim=-1) * width**-0.5).softmax(-1)
        out = law[..., : past.shape[-1]].reshape(heads, count * group, -1) @ committed.values.transpose(0, 1)
        out = out.view(heads, count, group, width).transpose(0, 1)
        for step, value in enumerate(chain.values):
            out = out + law[..., past.shape[-1] + step, None].transpose(0, 1) * value[:, :, None]
        return out.reshape(count, -1)

    def finish(self, x: Tensor, normed: Tensor, position: Tensor, committed: Committed, chain: Chain) -> Tensor:
        """The layer's queries, its residuals and the final norm: x, normed (n, D) -> z (n, D)."""
        query = self.self_attn.q_proj(normed).view(len(x), -1, self.width)
        query = self.rotate(query, position).view(len(x), self.heads, -1, self.width)
        x = x + self.self_attn.o_proj(self.attend(query, committed, chain))
        return self.shared_head["norm"](x + self.mlp(self.post_attention_layernorm(x)))

    def first(self, embedding: Tensor, batch: Batch, row: Tensor) -> tuple[Committed, Chain]:
        """Step 1. embedding (T, D) of batch.token; keys of all T rows, drafts for the rows of row (n,) only."""
        x = self.join(embedding, batch.hidden.float())
        normed, position = self.input_layernorm(x), torch.arange(len(x))
        committed = Committed(*self.keys_values(normed, position), batch.window)
        chain = Chain(row, x[row])
        return committed, chain._replace(hidden=self.finish(x[row], normed[row], row, committed, chain))

    def again(self, embedding: Tensor, committed: Committed, chain: Chain) -> Chain:
        """The next step of a chain. embedding (n, D) of the drafts that were just accepted."""
        x = self.join(embedding, chain.hidden)
        normed, position = self.input_layernorm(x), chain.row + len(chain.keys) + 1
        key, value = self.keys_values(normed, position)
        chain = chain._replace(keys=(*chain.keys, key), values=(*chain.values, value))
        return chain._replace(hidden=self.finish(x, normed, position, committed, chain))


# -------------------------------------------------------------------------------------------------------------------- loss


class SparseCrossEntropy(torch.autograd.Function):
    """Cross entropy with targets that are zero nearly everywhere, and what the head would have drafted.

    z (n, D), weights of the vocabulary (C, D), slots and shares (n, F) of the target, importance (n,) -> loss (), choice (n,)
    The gradient is formed in the forward pass: the n x C matrices, the largest there are, are made once and dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, vocabulary: Tensor, slots: Tensor, shares: Tensor, importance: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = z.to(vocabulary.dtype) @ vocabulary.T
        law, choice = logits.softmax(-1, dtype=torch.float32), logits.argmax(-1)
        surprise = -law.gather(1, slots).clamp(min=1e-30).log()
        gradient = law.scatter_add_(1, slots, -shares).mul_(importance[:, None])
        ctx.save_for_backward((gradient.to(vocabulary.dtype) @ vocabulary).to(z.dtype))
        ctx.mark_non_differentiable(choice)
        return ((surprise * shares).sum(-1) * importance).sum(), choice

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None, None, None


class Teacher:
    """The frozen base: embedding (V, D), and the rows (C, D) of its lm_head that can be drafted.

    slot (V,): where a token is in the draft vocabulary, -1 if it cannot be drafted
    """

    def __init__(self, base: LlamaForCausalLM, ids: Tensor) -> None:
        self.embedding = base.get_input_embeddings().weight.detach()
        self.output = base.get_output_embeddings().weight.detach()[ids].contiguous()
        self.slot = torch.full((len(self.embedding),), -1)
        self.slot[ids] = torch.arange(len(ids))

    def embed(self, token: Tensor) -> Tensor:
        """token (n,) -> (n, D) float32."""
        return F.embedding(token, self.embedding).float()

    def read(self, document: Document) -> Document:
        """The document with its `slots` and `law`: the base's FAVOURITES in the draft vocabulary, and their law among them."""
        best = (document.hidden @ self.output.T).topk(FAVOURITES)
        return document._replace(slots=best.indices.int(), law=best.values.softmax(-1, dtype=torch.float32))


def mix(slots: Tensor, law: Tensor, label: Tensor, hard: float) -> tuple[Tensor, Tensor]:
    """slots, law (n, F), label (n,) a slot or -1 -> slots, shares (n, F + 1): a labelled row gives `hard` to its label."""
    share = torch.where(label >= 0, hard, 0.0)[:, None]
    return torch.cat([slots, label.clamp(min=0)[:, None]], dim=1), torch.cat([law * (1 - share), share], dim=1)


class Follower(NamedTuple):
    """What comes `step` rows after each of n rows.

    row, token (n,)    inside (n,) bool: still in the window    label (n,): slot of the base's choice, -1 where there is none
    """

    row: Tensor
    inside: Tensor
    label: Tensor
    token: Tensor

    @staticmethod
    def of(batch: Batch, row: Tensor, step: int, teacher: Teacher) -> Follower:
        ahead = (row + step).clamp(max=len(batch.token) - 1)
        inside = (ahead == row + step) & (batch.window[ahead] == batch.window[row])
        token = batch.token[ahead]
        return Follower(ahead, inside, torch.where(inside & batch.greedy[ahead], teacher.slot[token], -1), token)


class StepResult(NamedTuple):
    """loss ()    row (n,) where a chain stood before this step    hit (n,) bool: the draft is the base's choice"""

    loss: Tensor
    row: Tensor
    hit: Tensor


def importance_of(batch: Batch, follower: Follower, sampled: float) -> Tensor:
    """(n,): 1 for a label, `sampled` for a sampled token's place, 0 for a choice that cannot be drafted."""
    unlabelled = sampled * (follower.inside & ~batch.greedy[follower.row]).float()
    return torch.where(follower.label >= 0, 1.0, unlabelled)


def half_precision() -> torch.autocast:
    """bfloat16 products on float32 weights. One per use: the context is not shared by threads, its cache would go stale."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


def run_steps(head: Head, teacher: Teacher, batch: Batch, hard: float, sampled: float) -> list[StepResult]:
    """All drafts of a batch; a chain goes on where its draft hit."""
    everywhere = torch.arange(len(batch.token))
    follower = Follower.of(batch, everywhere, 1, teacher)
    row = everywhere[importance_of(batch, follower, sampled) > 0]
    committed, chain = head.first(teacher.embed(batch.token), batch, row)
    results = []
    for step in range(1, DRAFTS + 1):
        follower = Follower.of(batch, chain.row, step, teacher)
        importance = importance_of(batch, follower, sampled if step == 1 else 0.0)
        slots, shares = mix(batch.slots[follower.row], batch.law[follower.row], follower.label, hard)
        loss, choice = SparseCrossEntropy.apply(chain.hidden, teacher.output, slots, shares, importance)
        hit = (choice == follower.label) & (follower.label >= 0)
        results.append(StepResult(loss, chain.row, hit))
        if step == DRAFTS or not hit.any():
            break
        chain = head.again(teacher.embed(follower.token[hit]), committed, chain.select(hit))
    return results


# -------------------------------------------------------------------------------------------------------------- evaluation


def accepted_counts(results: list[StepResult], num_rows: int) -> Tensor:
    """(T,): how many drafts started at each row would be accepted."""
    counts = torch.zeros(num_rows, dtype=torch.int64)
    for result in results:
        counts[result.row[result.hit]] += 1
    return counts


def replay(counts: list[int], can_start: list[bool]) -> tuple[int, int]:
    """What greedy decoding would do on one document -> its tokens and target forwards.

    A round at row j (its own token came with the last forward) yields the accepted drafts and the token after them.
    """
    tokens, rounds, row = 0, 0, 0
    while row < len(can_start):
        gained = counts[row] + 1 if can_start[row] else 0
        tokens, rounds = tokens + gained, rounds + can_start[row]
        row += max(gained, 1)
    return tokens, rounds


@torch.no_grad()
def tally(head: Head, teacher: Teacher, document: Document) -> Tensor:
    """(DRAFTS + 3,): at how many rows at least 0, 1, ... DRAFTS drafts would be accepted; tokens and rounds of `replay`."""
    batch = pack([document])
    with half_precision():
        counts = accepted_counts(run_steps(head, teacher, batch, hard=1.0, sampled=0.0), len(batch.token))
    can_start = batch.greedy[:-1] & batch.greedy[1:]
    reached = [int((counts[:-1][can_start] >= step).sum()) for step in range(DRAFTS + 1)]
    return torch.tensor([*reached, *replay(counts.tolist(), can_start.tolist())])


def evaluate(head: Head, teacher: Teacher, documents: list[Document]) -> dict[str, float]:
    """p1, p2, p3: a draft's acceptance given those before it; tau: tokens per target forward; on whole documents."""
    *reached, tokens, rounds = torch.stack([tally(head, teacher, document) for document in documents]).sum(0).tolist()
    shares = {f"p{step}": round(reached[step] / max(reached[step - 1], 1), 4) for step in range(1, DRAFTS + 1)}
    return {**shares, "tau": round(tokens / max(rounds, 1), 4)}


# ---------------------------------------------------------------------------------------------------------------- training


class Clock:
    """How far the run is, by wall clock or by tokens: a slow machine sees fewer tokens but always ends with a cold rate."""

    def __init__(self, minutes: float, max_tokens: int) -> None:
        self.minutes, self.max_tokens, self.began, self.tokens = minutes, max_tokens, time.time(), 0

    @property
    def elapsed(self) -> float:
        """Minutes."""
        return (time.time() - self.began) / 60

    @property
    def progress(self) -> float:
        return self.tokens / self.max_tokens if self.max_tokens else self.elapsed / self.minutes

    def rate(self) -> float:
        """Share of the peak learning rate: linear warm-up, cosine to zero."""
        return min(1.0, self.progress / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))

    def reading(self) -> dict[str, float]:
        return {"minutes": round(self.elapsed, 2), "tokens": self.tokens, "rate": round(self.rate(), 4)}


def make_optimizers(head: Head, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, in equal shares for two threads; AdamW for the norms."""
    matrices = sorted((p for p in head.parameters() if p.ndim == 2), key=Tensor.numel, reverse=True)
    norms = [p for p in head.parameters() if p.ndim == 1]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    muons = [torch.optim.Muon(share, **settings) for share in (matrices[::2], matrices[1::2])]
    return [*muons, torch.optim.AdamW(norms, lr=args.norm_lr, weight_decay=0.0, betas=(0.9, 0.99))]


def gradients(head: Head, teacher: Teacher, batch: Batch, args: argparse.Namespace) -> tuple[float, tuple[Tensor, ...]]:
    """-> the loss of draft 1, the gradients of all parameters. Touches nothing shared: threads run it side by side."""
    with half_precision():
        results = run_steps(head, teacher, batch, args.hard, args.sampled)
    count = len(results[0].row)
    loss = sum(result.loss for result in results) / count
    return results[0].loss.item() / count, torch.autograd.grad(loss, list(head.parameters()))


def save_head(head: Head, ids: Tensor, config: LlamaConfig, folder: Path) -> None:
    """The checkpoint that `mtpdecode` reads and transformers' `use_mtp` too: published names, bfloat16, and the draft ids."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"model.layers.{config.num_hidden_layers}."
    tensors = {prefix + name: tensor.bfloat16() for name, tensor in head.state_dict().items()}
    tensors["draft_vocabulary"] = ids.to(torch.int32)
    save_file(tensors, folder / "model.partial")
    (folder / "model.partial").rename(folder / "model.safetensors")
    described = {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_nextn_predict_layers": 1,
        "hidden_size": config.hidden_size,
        "num_speculative_tokens": DRAFTS,
        "base": BASE_NAME,
        "license": "apache-2.0",
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def write_line(path: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    with path.open("a") as file:
        file.write(text + "\n")


class Trainer:
    """Takes the steps. `pool`: one thread per core, each with its own batch (more threads to one product wait for each other)."""

    def __init__(self, head: Head, teacher: Teacher, args: argparse.Namespace, pool: ThreadPoolExecutor) -> None:
        self.head, self.teacher, self.args, self.pool = head, teacher, args, pool
        self.optimizers = make_optimizers(head, args)
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def step(self, group: list[Batch], rate: float) -> float:
        """One update from the mean gradient of the batches, at `rate` times the peak learning rates -> mean loss of draft 1."""
        losses, found = zip(*self.pool.map(lambda b: gradients(self.head, self.teacher, b, self.args), group), strict=True)
        for parameter, *parts in zip(self.head.parameters(), *found, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        list(self.pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        return sum(losses) / len(losses)


def train(trainer: Trainer, documents: list[Document], held_out: dict[str, list[Document]]) -> Iterator[dict[str, Any]]:
    """-> one report (see `evaluate`) after every `evaluate_every` minutes, and the last at the end of the run."""
    head, teacher, args = trainer.head, trainer.teacher, trainer.args
    stream = batches(documents, args, torch.Generator().manual_seed(args.seed))
    clock, due, losses = Clock(args.minutes, args.tokens), args.evaluate_every, []
    over = False
    while not over:
        group = list(itertools.islice(stream, args.accumulate))
        losses.append(trainer.step(group, clock.rate()))
        clock.tokens += sum(len(batch.token) for batch in group)
        over = clock.progress >= 1
        if over or clock.elapsed >= due:
            figures = {kind: evaluate(head, teacher, rows) for kind, rows in held_out.items()}
            yield {**clock.reading(), "loss": round(sum(losses) / len(losses), 4), **figures}
            due = clock.elapsed + args.evaluate_every
            losses.clear()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base model (mtpdecode.load caches one)")
    parser.add_argument("--data", required=True, type=Path, help="what scripts/head_data.py wrote")
    parser.add_argument("--out", required=True, type=Path, help="folder of the head; overwritten at every evaluation")
    parser.add_argument("--log", type=Path, help="JSON lines, one per evaluation (default: OUT/train.jsonl)")
    parser.add_argument("--minutes", type=float, default=60, help="wall clock; the learning rate follows it to zero")
    parser.add_argument("--tokens", type=int, default=0, help="instead of --minutes: reproducible to the token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--accumulate", type=int, default=2, help="batches of 512 rows in one step of the optimizer")
    parser.add_argument("--lr", type=float, default=4e-3, help="Muon's")
    parser.add_argument("--norm-lr", type=float, default=2e-3, help="AdamW's, for the norms")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hard", type=float, default=0.5, help="share of the label in the target")
    parser.add_argument("--sampled", type=float, default=0.3, help="importance of places whose token was sampled")
    parser.add_argument("--keep-loops", type=float, default=0.3, help="share of the looping windows that are kept")
    parser.add_argument("--held-out", type=int, default=24, help="documents of each kind")
    parser.add_argument("--evaluate-every", type=float, default=3, help="minutes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    log = args.log or args.out / "train.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    documents, held_out = read_folder(args.data, args.held_out)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16)
    ids = draft_vocabulary(documents, args.vocabulary, base.config.vocab_size)
    teacher, head = Teacher(base, ids), Head(base.config)
    head.start_from(base)
    documents = [teacher.read(document) for document in documents]
    held_out = {kind: [teacher.read(document) for document in group] for kind, group in held_out.items()}
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    write_line(log, {"training_tokens": sum(len(d.tokens) for d in documents), **settings})
    with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for report in train(Trainer(head, teacher, args, pool), documents, held_out):
            write_line(log, report)
            save_head(head, ids, base.config, args.out)


if __name__ == "__main__":
    main()
