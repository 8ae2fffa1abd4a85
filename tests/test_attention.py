"""Attention supervision: its targets, its loss, and that it teaches a fuser where to look."""

import pytest
import torch
from helpers.adapters import config_for, inputs
from helpers.tiny import sdxl_unet

from gligen_xl.adapter import adapter_parameters, attach, fusers
from gligen_xl.train.attention import attention_loss, attention_targets, watch_attention
from gligen_xl.train.options import Optimization


def test_targets_are_boxes_inside_and_empty_slots_outside():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    targets = attention_targets(boxes, masks, (8, 8), 16).unflatten(1, (4, 4))[0]  # (rows, columns, slots)
    assert targets[0, 0].tolist() == [1, 0, 0, 0]
    assert targets[1, 1].tolist() == [0.5, 0.5, 0, 0]
    assert targets[0, 3].tolist() == [0, 1, 0, 0]
    assert targets[3, 1].tolist() == [0, 0, 0.5, 0.5]
    torch.testing.assert_close(targets.sum(-1), torch.ones(4, 4))


def test_rows_and_columns_follow_the_latents():
    boxes, masks = torch.tensor([[[0.0, 0.0, 1.0, 0.5]]]), torch.ones(1, 1)
    targets = attention_targets(boxes, masks, (16, 32), 4 * 8).unflatten(1, (4, 8))[0, :, :, 0]
    assert targets[:2].all()
    assert not targets[2:].any()  # every slot is used: outside there is no target


def test_the_loss_is_least_for_attention_on_target():
    boxes, masks = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    targets = attention_targets(boxes, masks, (4, 4), 16)
    right = attention_loss((targets * 20)[:, None], boxes, masks, (4, 4))
    blind = attention_loss(torch.zeros(1, 2, 16, 2), boxes, masks, (4, 4))
    wrong = attention_loss(((1 - targets) * 20)[:, None], boxes, masks, (4, 4))
    assert right < 1e-3
    assert blind.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert wrong > 5


def test_where_nothing_has_a_target_nothing_is_lost():
    thin = torch.tensor([[[0.45, 0.45, 0.46, 0.46]]])  # its only slot is used, and no token's centre lies in it
    logits = torch.zeros(1, 2, 16, 1, requires_grad=True)
    loss = attention_loss(logits, thin, torch.ones(1, 1), (4, 4))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_every_fuser_is_heard_and_learns_to_look():
    unet = sdxl_unet()
    attach(unet, config_for(unet))
    (sample, time), kwargs = inputs(unet)
    tokens = kwargs["cross_attention_kwargs"]["gligen"]
    plain = unet(sample, time, **kwargs).sample
    optimizer = torch.optim.Adam(adapter_parameters(unet).values(), lr=1e-2)
    seen = []
    for _ in range(30):
        with watch_attention(unet, tokens["boxes"], tokens["masks"], (8, 8)) as losses:
            watched = unet(sample, time, **kwargs).sample
        assert len(losses.terms) == len(fusers(unet))
        assert seen or torch.equal(watched, plain)  # looking changes nothing by itself
        seen.append(losses.mean().mean().item())
        losses.mean().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen[-1] < 0.7 * seen[0]
    with watch_attention(unet, tokens["boxes"], tokens["masks"], (8, 8)) as losses:
        pass
    unet(sample, time, **kwargs)
    assert not losses.terms  # outside the block nobody listens


def test_its_weight_fades_out():
    options = Optimization(attention_weight=0.1, attention_share=0.5)
    assert [options.attention(k, 1000) for k in (0, 250, 500, 900)] == pytest.approx([0.1, 0.05, 0, 0])
    assert Optimization().attention(0, 1000) == 0
