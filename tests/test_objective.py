"""The objective's options against the formulas they come from; without them it is GLIGEN's."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from helpers.tiny_run import noised
from hypothesis import given, settings
from hypothesis import strategies as st

from gligen_xl.data.dataset import Batch
from gligen_xl.train.objective import box_weights, denoising_loss, min_snr_weights, timesteps_of
from gligen_xl.train.options import Objective

KINDS = ("epsilon", "v_prediction")


def scheduler(kind="epsilon", **changes):
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind, **changes
    )


def batch_of(time, boxes=None):
    """Samples at these uniform times, (B,), each with the boxes of `boxes`, (B, N, 4), all of them used."""
    count = len(time)
    boxes = torch.zeros(count, 1, 4) if boxes is None else boxes
    return Batch(
        seed=5, positions=list(range(count)), latents=torch.randn(count, 4, 6, 8).half(), time=time,
        captions=[None] * count, phrases=[[]] * count, boxes=boxes, mask=torch.ones(boxes.shape[:2]),
        size=torch.zeros(count, 6),
    )  # fmt: skip


def fixed_unet(noisy, timesteps, **conditioning):
    """A network that depends on what it sees, and has no weights."""
    return SimpleNamespace(sample=0.3 * noisy + timesteps.view(-1, 1, 1, 1) / 1000)


def loss(kind, batch, **options):
    conditioning = {"encoder_hidden_states": torch.zeros(1)}
    return denoising_loss(fixed_unet, scheduler(kind), batch, conditioning, Objective(**options))


boxes_strategy = st.lists(
    st.tuples(*[st.floats(0, 1, width=32)] * 4).map(lambda v: (*sorted(v[::2]), *sorted(v[1::2]))), max_size=4
).map(lambda found: [(x0, y0, x1, y1) for x0, x1, y0, y1 in found])


@given(boxes=boxes_strategy, height=st.integers(1, 9), width=st.integers(1, 9), weight=st.floats(0.1, 50))
@settings(max_examples=100, deadline=None)
def test_box_weights_are_counted_pixel_by_pixel(boxes, height, width, weight):
    slots = len(boxes) + 1  # one is not used, and holds a box of the whole image
    padded = torch.tensor([[*boxes, (0.0, 0.0, 1.0, 1.0)]])
    mask = (torch.arange(slots) < len(boxes)).float()[None]
    weights = box_weights(padded, mask, torch.Size((height, width)), weight)
    assert weights.shape == (1, 1, height, width)
    plain = torch.ones(height, width)
    ys, xs = (((torch.arange(count) + 0.5) / count).tolist() for count in (height, width))  # in float32, as the boxes
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            if any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in padded[0, :-1].tolist()):
                plain[row, column] = weight
    torch.testing.assert_close(weights[0, 0], plain / plain.mean(), rtol=1e-4, atol=1e-5)
    assert weights.mean().item() == pytest.approx(1, rel=1e-4)
    if not boxes:
        assert torch.equal(weights, torch.ones_like(weights))


def test_a_box_between_the_pixels_leaves_all_alike():
    thin = torch.tensor([[[0.45, 0.45, 0.46, 0.46]]])
    assert torch.equal(box_weights(thin, torch.ones(1, 1), torch.Size((4, 4)), 9.0), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_the_clean_image(kind):
    """The paper's definition: whatever is predicted, the loss is min(SNR, gamma) times the error of the image."""
    plan, time = scheduler(kind), torch.tensor([5, 200, 400, 700, 990])
    kept = plan.alphas_cumprod[time].view(-1, 1, 1, 1)
    clean, noise, wrong = torch.randn(3, 5, 4, 6, 6).double()
    noisy, target = noised(plan, clean, noise, time)
    predicted = target + wrong
    if kind == "epsilon":
        image = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
    else:
        image = kept.sqrt() * noisy - (1 - kept).sqrt() * predicted
    snr = (kept / (1 - kept)).flatten()
    expected = snr.clamp(max=5) * (image - clean).square().mean((1, 2, 3))
    got = min_snr_weights(plan, time, 5.0) * (predicted - target).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    assert (snr > 5).any()
    assert (snr < 5).any()


@pytest.mark.parametrize(("kind", "last"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_where_no_signal_is_left(kind, last):
    plan = scheduler(kind, rescale_betas_zero_snr=True)
    plan.alphas_cumprod[-1] = 0  # diffusers leaves 2**-24
    assert min_snr_weights(plan, torch.tensor([999]), 5.0).item() == last


@pytest.mark.parametrize("bias", [0.0, 0.5, 1.0, 3.0])
def test_timesteps_have_the_density_they_say(bias):
    time = (torch.arange(100_000) + 0.5) / 100_000
    steps = timesteps_of(scheduler(), batch_of(time), bias)
    assert steps.min() >= 0
    assert steps.max() == 999
    for t in (0.1, 0.25, 0.5, 0.9):  # the integral of (1 + b) t**b
        assert (steps < 1000 * t).float().mean().item() == pytest.approx(t ** (1 + bias), abs=1e-3)
    assert steps.float().mean().item() / 1000 == pytest.approx((1 + bias) / (2 + bias), abs=2e-3)


def test_uniform_timesteps_are_those_of_the_samples():
    time = torch.rand(1000)
    assert torch.equal(timesteps_of(scheduler(), batch_of(time)), (time * 1000).long())


@pytest.mark.parametrize("kind", KINDS)
def test_without_options_the_loss_is_the_plain_mean(kind):
    batch, plan = batch_of(torch.rand(5)), scheduler(kind)
    time = timesteps_of(plan, batch)
    latents = batch.latents.float()
    target = batch.noise if kind == "epsilon" else plan.get_velocity(latents, batch.noise, time)
    noisy = plan.add_noise(latents, batch.noise, time)
    expected = (fixed_unet(noisy, time).sample - target).square().mean((1, 2, 3))
    conditioning = {"encoder_hidden_states": torch.zeros(1)}
    torch.testing.assert_close(denoising_loss(fixed_unet, plan, batch, conditioning), expected)
    assert torch.equal(loss(kind, batch), denoising_loss(fixed_unet, plan, batch, conditioning))


@pytest.mark.parametrize("kind", KINDS)
def test_options_reach_the_loss(kind):
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0]], [[0.25, 0.5, 1.0, 1.0]]])
    batch = batch_of(torch.tensor([0.1, 0.8]), boxes)
    plan, plain = scheduler(kind), loss(kind, batch)
    time = timesteps_of(plan, batch)
    torch.testing.assert_close(loss(kind, batch, snr_gamma=5.0), plain * min_snr_weights(plan, time, 5.0))
    later = batch_of(batch.time.sqrt(), boxes)
    later = Batch(**(vars(later) | {"latents": batch.latents}))
    torch.testing.assert_close(loss(kind, batch, noisy_bias=1.0), loss(kind, later))
    inside = loss(kind, batch, box_weight=1e6)
    noisy = plan.add_noise(batch.latents.float(), batch.noise, time)
    target = batch.noise if kind == "epsilon" else plan.get_velocity(batch.latents.float(), batch.noise, time)
    errors = (fixed_unet(noisy, time).sample - target).square()
    torch.testing.assert_close(inside, torch.stack([errors[0, :, :, :4].mean(), errors[1, :, 3:, 2:].mean()]))


def test_the_bias_to_noise_fades():
    fading = Objective(noisy_bias=3.0, noisy_share=0.5, box_weight=2.0)
    assert [fading.at(position, 100).noisy_bias for position in (0, 25, 50, 100)] == [3, 1.5, 0, 0]
    assert fading.at(50, 100) == Objective(box_weight=2.0)
    assert Objective(noisy_bias=3.0).at(90, 100).noisy_bias == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"snr_gamma": 0.0}, "snr_gamma is 0"),
        ({"snr_gamma": float("nan")}, "snr_gamma is nan"),
        ({"noisy_bias": -0.5}, r"noisy_bias is -0\.5"),
        ({"noisy_bias": float("inf")}, "noisy_bias is inf"),
        ({"noisy_bias": 1.0, "noisy_share": 0.0}, "noisy_share is 0"),
        ({"noisy_share": 0.5}, "noisy_share is set, but noisy_bias is 0"),
        ({"box_weight": 0.0}, "box_weight is 0"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ValueError, match=says):
        Objective(**options)
