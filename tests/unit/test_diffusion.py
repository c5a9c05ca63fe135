"""The equations against diffusers' own and against values by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from raysd import diffusion


@pytest.fixture
def scheduler():
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 400, 800, 999])


def test_noise_and_targets_equal_diffusers(scheduler, batch):
    latents, noise, timesteps = batch
    alphas = scheduler.alphas_cumprod
    assert torch.allclose(
        diffusion.add_noise(latents, noise, alphas, timesteps),
        scheduler.add_noise(latents, noise, timesteps),
        atol=1e-6,
    )
    velocity = diffusion.target("v_prediction", latents, noise, alphas, timesteps)
    assert torch.allclose(velocity, scheduler.get_velocity(latents, noise, timesteps), atol=1e-6)
    assert diffusion.target("epsilon", latents, noise, alphas, timesteps) is noise
    with pytest.raises(ValueError, match="sample"):
        diffusion.target("sample", latents, noise, alphas, timesteps)


def test_snr_equals_diffusers(scheduler, batch):
    timesteps = batch[2]
    assert torch.allclose(
        diffusion.snr(scheduler.alphas_cumprod, timesteps), compute_snr(scheduler, timesteps), rtol=1e-3
    )


def test_min_snr_weights_by_hand():
    ratio = torch.tensor([0.0, 0.5, 5.0, 50.0])
    assert torch.allclose(diffusion.min_snr_weights("epsilon", ratio, 5.0), torch.tensor([1.0, 1.0, 1.0, 0.1]))
    by_hand = torch.tensor([0.0, 0.5 / 1.5, 5 / 6, 5 / 51])
    assert torch.allclose(diffusion.min_snr_weights("v_prediction", ratio, 5.0), by_hand)


@pytest.mark.parametrize("gamma", [0.0, -1.0])
def test_min_snr_refuses_gamma_that_is_not_positive(gamma):
    with pytest.raises(ValueError, match="gamma"):
        diffusion.min_snr_weights("epsilon", torch.ones(1), gamma)


def test_the_posterior_is_sampled_from_mean_and_log_variance():
    mean, log_variance = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 2, 1, 1), 2.0).log() * 2
    moments = torch.cat([mean, log_variance], dim=1)
    eps = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
    drawn = diffusion.sample_posterior(moments, eps, scaling_factor=0.5, shift_factor=1.0)
    assert torch.allclose(drawn.flatten(), torch.tensor([(3 + 2 - 1) * 0.5, (3 - 2 - 1) * 0.5]))
