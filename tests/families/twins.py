"""Heads in plain torch, from published tensors: the parts that several twins of the zoo are written with.

A twin keeps no cache: every draft step runs the block anew over all rows. Row j pairs the target's hidden state at j with the
token behind it; past the text, what the last step put out with the token that it drafted.
"""

import torch
import torch.nn.functional as F


@torch.no_grad()
def calmed(model, factor):
    """The model, whose layers say less, so that its text strays less from the circle and a head can be right more often."""
    for name, tensor in model.named_parameters():
        if any(part in name for part in ("out_proj.", "o_proj.", "down_proj")):
            tensor *= factor
    return model


def rms_norm(x, weight, eps):
    """x (n, D) over its own root mean square, times the weight."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def causal_attention(query, key, value, scale, window=None, sinks=None):
    """query (H, n, d), key (G, n, d) and value (G, n, v) with G dividing H -> (n, H * v).

    window  how many rows a row sees, itself included; None: all up to itself     sinks  (H,) scores of something worth nothing
    """
    repeats, rows = len(query) // len(key), torch.arange(query.shape[1])
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    distance = rows[:, None] - rows
    unseen = (distance < 0) | (distance >= (len(rows) if window is None else window))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(unseen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(rows), 1)], dim=-1)
    return (scores.softmax(-1)[..., : len(rows)] @ value).transpose(0, 1).flatten(1)


def heads(x, weight, size):
    """x (n, D) through weight (H * size, D) -> (H, n, size)."""
    return F.linear(x, weight).unflatten(-1, (-1, size)).transpose(0, 1)


def chosen_experts(x, weight, bias, top_k, scale=1.0):
    """x (n, D) -> per token its experts (n, k) and what each of them counts (n, k): sigmoid scores, chosen with a bias."""
    scores = F.linear(x, weight).sigmoid()
    chosen = (scores + bias).topk(top_k).indices
    counts = scores.gather(1, chosen)
    return chosen, counts / counts.sum(-1, keepdim=True) * scale


def mixture(x, chosen, counts, expert):
    """x (n, D); expert(number, x (D,)) is one of them alone -> (n, D), one token and one expert at a time."""
    rows = [
        sum(count * expert(int(number), token) for number, count in zip(numbers, weights, strict=True))
        for token, numbers, weights in zip(x, chosen, counts, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
def recurrent_drafts(model, states, head, text, num_steps):
    """The logits (num_steps, V) of a head of one layer, fed its own output from the second step on.

    states  ids (1, n) -> the target's hidden states (n, D)     head  (embeds (n, D), hidden (n, D)) -> (n, D), normed
    """
    embed, logits = model.get_input_embeddings(), []
    hidden, tokens = states(torch.tensor([text[:-1]])), text[1:]
    for _ in range(num_steps):
        last = head(embed(torch.tensor(tokens)), hidden)[-1:]
        logits.append(model.get_output_embeddings()(last)[0])
        hidden, tokens = torch.cat([hidden, last]), [*tokens, int(logits[-1].argmax())]
    return torch.stack(logits)


def rotated(x, base):
    """x (H, n, d): pairs of neighbours turned by position times base ** (-2 i / d), for positions 0 .. n-1."""
    turns = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * turns.cos() - odd * turns.sin(), odd * turns.cos() + even * turns.sin()], -1).flatten(-2)


def rotated_halves(x, base):
    """The same for pairs that lie half of the size apart."""
    half = x.shape[-1] // 2
    turns = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * turns.cos() - second * turns.sin(), second * turns.cos() + first * turns.sin()], dim=-1)


def gated_mlp(x, part, at, limit=float("inf")):
    """x (n, D) through the matrices {at}.gate_proj, up_proj, down_proj; what they give is cut off at the limit."""
    gate, up = (F.linear(x, part[f"{at}.{half}_proj"]) for half in ("gate", "up"))
    return F.linear(F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit), part[f"{at}.down_proj"])
