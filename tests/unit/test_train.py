"""The training loss: a step that works (transformers' own raises), learns, and leaves the target alone."""

import pytest
import torch

import mtpdecode
from mtpdecode.train import mtp_loss
from tests import tiny

NUM_STEPS = 3


def batch(seed=0):
    return torch.randint(4, 20, (4, 24), generator=torch.Generator().manual_seed(seed))


def test_a_loss_for_each_step():
    model = tiny.build("llama")
    loss = mtp_loss(tiny.build_head(model, tiny.row_of("llama")), model, batch(), NUM_STEPS, decay=0.5)
    assert loss.shape == (NUM_STEPS,), f"one loss a step, found {tuple(loss.shape)}"
    assert loss.isfinite().all()


@pytest.mark.parametrize("num_layers", [1, 2])
def test_training_lowers_it_and_touches_only_the_head(num_layers):
    model = tiny.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = mtpdecode.MTPHead(model, tiny.row_of("llama"), num_layers)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = mtp_loss(head, model, batch(), NUM_STEPS).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], f"20 steps on one batch took the loss from {losses[0]:.3f} to {losses[-1]:.3f} only"
    assert all(parameter.grad is None for parameter in model.parameters()), "a gradient reached the target"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "the target changed"


def test_a_saved_head_gives_the_same_loss_bit_for_bit(tmp_path):
    model = tiny.build("llama")
    head = tiny.build_head(model, tiny.row_of("llama"), 2)
    mtpdecode.save_head(head, tmp_path)
    again = mtpdecode.MTPDecoder.from_model(model, head=tmp_path).head
    assert torch.equal(mtp_loss(head, model, batch(), NUM_STEPS), mtp_loss(again, model, batch(), NUM_STEPS))


def test_rows_too_short_for_the_steps_are_named():
    model = tiny.build("llama")
    with pytest.raises(mtpdecode.GenerationError, match="they need 5"):
        mtp_loss(tiny.build_head(model, tiny.row_of("llama")), model, batch()[:, :4], NUM_STEPS)
