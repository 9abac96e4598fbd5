"""The LS-VAEs of `lvae_jax` in PyTorch, as its users would write them: what `benchmarks.peers` compares with."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LOG_STDDEV_RANGE = (-10.0, 1.0)


class Residual(nn.Module):
    """h + second(silu(first(silu(h)))), each layer made by `layer`."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = layer(), layer()

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(functional.silu(self.first(functional.silu(h))))


def mlp(inputs: int, outputs: int, *, width: int = 200, num_blocks: int = 4) -> nn.Module:
    """The residual network of points, `networks.mlp_encoder` and `networks.mlp_decoder`."""
    blocks = [Residual(lambda: nn.Linear(width, width)) for _ in range(num_blocks)]
    return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.SiLU(), nn.Linear(width, outputs))


def conv_encoder(shape: Sequence[int], outputs: int, *, widths: Sequence[int], num_blocks: int) -> nn.Module:
    """The network of images [B, C, H, W], `networks.conv_encoder`."""
    *_, (rows, columns) = sizes(shape, len(widths))
    channels, last = [shape[-1], *widths], widths[-1]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
    blocks = [Residual(lambda: nn.Conv2d(last, last, 3, padding=1)) for _ in range(num_blocks)]
    return nn.Sequential(*layers, *blocks, nn.SiLU(), nn.Flatten(), nn.Linear(rows * columns * last, outputs))


class ConvDecoder(nn.Module):
    """The network of images [B, C, H, W], `networks.conv_decoder`."""

    def __init__(self, shape: Sequence[int], latent_size: int, *, widths: Sequence[int], num_blocks: int) -> None:
        super().__init__()
        self.sizes = sizes(shape, len(widths))[::-1]
        self.last = widths[-1]
        self.start = nn.Linear(latent_size, math.prod(self.sizes[0]) * self.last)
        self.blocks = nn.Sequential(
            *(Residual(lambda: nn.Conv2d(self.last, self.last, 3, padding=1)) for _ in range(num_blocks))
        )
        channels = [*widths[::-1], shape[-1]]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(before, after, 4, stride=2, padding=1) for before, after in itertools.pairwise(channels)
        )

    def forward(self, z: Tensor) -> Tensor:
        h = self.blocks(self.start(z).unflatten(1, (self.last, *self.sizes[0])))
        for layer, (rows, columns) in zip(self.up, self.sizes[1:], strict=True):
            h = layer(functional.silu(h))[:, :, :rows, :columns]
        return h


def sizes(shape: Sequence[int], num_halvings: int) -> list[tuple[int, int]]:
    """The sides of an image [H, W, C] after each convolution of stride 2, the image's own first."""
    sides = [(shape[0], shape[1])]
    for _ in range(num_halvings):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    return sides


class LearnedScalarVAE(nn.Module):
    """The LS-VAE of an encoder x [B, *S] -> [B, 2 L] and a decoder z [B, L] -> [B, *S]."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Minus the mean ELBO of x, in nats."""
        mean, log_stddev = self.encoder(x).chunk(2, dim=1)
        log_stddev = log_stddev.clamp(*LOG_STDDEV_RANGE)
        z = mean + log_stddev.exp() * torch.randn_like(mean)
        kl = 0.5 * (mean**2 + (2 * log_stddev).exp() - 1).sum(1) - log_stddev.sum(1)
        residual = (x - self.decoder(z)) * (-self.log_sigma).exp()
        log_prob = -(0.5 * residual**2 + self.log_sigma + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        return (kl - log_prob).mean()


def training(
    vae: LearnedScalarVAE, num_steps: int, *, compiled: bool, learning_rate: float = 2e-3, sigma_rate: float = 10.0
) -> Callable[[Tensor], Tensor]:
    """A function that takes the training step of `lvae_jax.optimizer` on a batch, and returns its loss."""
    loss = torch.compile(vae) if compiled else vae
    networks = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    groups = [{"params": networks}, {"params": [vae.log_sigma], "lr": sigma_rate * learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(x)
        value.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return value.detach()

    return step


def learned_scalar_vae(shape: Sequence[int], latent_size: int, **options: Any) -> LearnedScalarVAE:
    """The LS-VAE of points [n] or of images [H, W, C]; options are those of `lvae_jax.mlp_vae` and `conv_vae`."""
    if len(shape) == 1:
        return LearnedScalarVAE(mlp(shape[0], 2 * latent_size, **options), mlp(latent_size, shape[0], **options))
    return LearnedScalarVAE(conv_encoder(shape, 2 * latent_size, **options), ConvDecoder(shape, latent_size, **options))
