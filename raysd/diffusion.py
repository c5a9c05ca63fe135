"""Diffusion mathematics as plain functions of tensors; each names its equation.

Shapes: B pictures, C latent channels, h x w latent size, T training timesteps.
"""

import torch
from torch import Tensor


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (Ho et al. 2020, eq. 4).

    latents, noise: [B, C, h, w]; alphas_cumprod: [T]; timesteps: [B] -> [B, C, h, w]
    """
    alpha = _at(alphas_cumprod, timesteps, latents)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def target(prediction: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser is trained to return: eps, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans & Ho 2022, app. D).

    Same shapes as `add_noise`. Raises ValueError for another prediction type.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        alpha = _at(alphas_cumprod, timesteps, latents)
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    raise ValueError(f"no target for prediction type {prediction!r}: epsilon or v_prediction")


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio a_t / (1 - a_t). [B]"""
    alpha = alphas_cumprod.to(timesteps.device)[timesteps].double()
    return (alpha / (1 - alpha)).float()


def min_snr_weights(prediction: str, ratio: Tensor, gamma: float) -> Tensor:
    """min-SNR-gamma weights of the squared error (Hang et al. 2023, sec. 3.4), from the signal-to-noise ratios [B].

    epsilon: min(SNR, gamma) / SNR; v: min(SNR, gamma) / (SNR + 1). At SNR 0 (zero terminal SNR) epsilon's limit is 1 and
    v's form would weigh that step 0 although v is well defined there; it is kept 0, as the paper's formula says.
    Raises ValueError for gamma <= 0.
    """
    if gamma <= 0:
        raise ValueError(f"min-SNR needs gamma > 0, got {gamma}")
    clipped = ratio.clamp(max=gamma)
    if prediction == "v_prediction":
        return clipped / (ratio + 1)
    return torch.where(ratio > 0, clipped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny), torch.ones_like(ratio))


def sample_posterior(moments: Tensor, eps: Tensor, scaling_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Latents drawn from the autoencoder's posterior (Kingma & Welling 2014, eq. 10), scaled as the denoiser expects them.

    moments: [B, 2C, h, w], mean and log-variance; eps: [B, C, h, w] standard normal -> [B, C, h, w]
    """
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = (0.5 * log_variance.clamp(-30.0, 20.0)).exp()
    return (mean + deviation * eps - shift_factor) * scaling_factor


def squared_error(prediction: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each sample, in fp32. [B, ...] -> [B]"""
    return (prediction.float() - wanted.float()).square().flatten(1).mean(dim=1)


def _at(values: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    chosen = values.to(device=like.device, dtype=like.dtype)[timesteps]
    return chosen.reshape(-1, *([1] * (like.dim() - 1)))
