"""Arrays to matplotlib figures. Nothing here touches the disk, the screen or matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

_DATA, _MEANS, _SAMPLES = "tab:blue", "tab:orange", "tab:green"


class Panel(NamedTuple):
    """One model's row of pictures; all arrays are [B, *S]. title: names the model."""

    title: str
    data: np.ndarray
    reconstructions: np.ndarray
    reconstruction_stddevs: np.ndarray
    samples: np.ndarray
    sample_means: np.ndarray


class Curves(NamedTuple):
    """Metrics over steps of the members of one row; steps is [T], all others [M, T]. elbo, log_likelihood and kl in
    nats."""

    steps: np.ndarray
    elbo: np.ndarray
    log_likelihood: np.ndarray
    kl: np.ndarray
    sigma_min: np.ndarray
    sigma_mean: np.ndarray
    sigma_max: np.ndarray


def plane_panels(panels: Sequence[Panel]) -> Figure:
    """Points in the plane, as the paper's Figs. 4, 6 and 7: reconstructions over data, and generated samples with their
    means."""
    figure = Figure(figsize=(9.0, 2.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharex=True, sharey=True, squeeze=False)
    dots = {"s": 4, "linewidths": 0, "rasterized": True}
    for row, panel in zip(axes, panels, strict=True):
        row[0].scatter(*panel.data.T, color=_DATA, label="data", **dots)
        row[0].scatter(*panel.reconstructions.T, color=_MEANS, label="reconstructions", **dots)
        row[1].scatter(*panel.samples.T, color=_SAMPLES, label="generated samples", **dots)
        row[1].scatter(*panel.sample_means.T, color=_MEANS, label="their means", **dots)
        row[0].set_ylabel(panel.title)
    # The data set the frame: samples of a large sigma lie far outside, and would shrink all others.
    low, high = panels[0].data.min(axis=0), panels[0].data.max(axis=0)
    margin = 0.25 * (high - low).max()
    axes[0, 0].set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    for axis in axes[0]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, markerscale=3, frameon=False)
    return figure


def image_panels(panels: Sequence[Panel]) -> Figure:
    """Images [B, H, W, C] on [0, 1]: originals, then for each model reconstructions, generated means above samples, and
    a sigma map."""
    strips: list[tuple[str, np.ndarray, str | None]] = [("data", panels[0].data, None)]
    for panel in panels:
        strips.append((f"{panel.title}\nreconstructions", panel.reconstructions, None))
        strips.append(("generated means", panel.sample_means, None))
        strips.append(("generated samples", panel.samples, None))
        strips.append(
            ("sigma of the\nreconstructions", panel.reconstruction_stddevs.mean(axis=-1, keepdims=True), "magma")
        )
    width, height = 9.0, 0.78 * len(strips)
    figure = Figure(figsize=(width, height), layout="constrained")
    for axis, (label, images, cmap) in zip(figure.subplots(len(strips), 1, squeeze=False)[:, 0], strips, strict=True):
        strip = np.concatenate([np.asarray(image) for image in images], axis=1)
        if cmap is None:
            axis.imshow(np.clip(strip.squeeze(), 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0)
        else:
            shown = axis.imshow(strip.squeeze(), cmap=cmap, vmin=0.0, vmax=max(strip.max(), 1e-6))
            figure.colorbar(shown, ax=axis, pad=0.01)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def losses(curves: Mapping[str, Curves]) -> Figure:
    """The losses over steps, as Figs. 8 and 9: -log p(x|z), the KL and their sum, a panel for each row, all members, on
    one scale."""
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for axis in axes[len(curves) - columns : len(curves)]:  # nothing is below these
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("step")
    for axis, (title, curve) in zip(axes, curves.items(), strict=False):
        for values, colour, label in (
            (-curve.elbo, "black", "-ELBO"),
            (-curve.log_likelihood, _MEANS, "reconstruction: -log p(x|z)"),
            (curve.kl, _DATA, "latent: KL"),
        ):
            axis.plot(curve.steps, values.T, color=colour, linewidth=0.8)
            axis.plot([], [], color=colour, label=label)
        axis.set_title(title)
        axis.set_yscale("symlog", linthresh=1.0)
    axes[0].set_ylabel("nats")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def sigma_and_elbo(curves: Mapping[str, Curves], *, unit: str) -> Figure:
    """Sigma over steps above the ELBO over steps, as Fig. 10; a band spans the smallest to the largest sigma where it
    is a vector."""
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for index, (title, curve) in enumerate(curves.items()):
        colour = f"C{index}"
        top.plot(curve.steps, curve.sigma_mean.T, color=colour, linewidth=0.9)
        top.fill_between(
            curve.steps, curve.sigma_min.min(axis=0), curve.sigma_max.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )
        bottom.plot(curve.steps, curve.elbo.T, color=colour, linewidth=0.9)
        bottom.plot([], [], color=colour, label=title)
    top.set(ylabel=f"sigma [{unit}]", yscale="log")
    bottom.set(ylabel="ELBO [nats]", xlabel="step")
    # The first steps of a small sigma lie orders of magnitude below everything that there is to see.
    settled = np.concatenate([curve.elbo[:, len(curve.steps) // 10 :].ravel() for curve in curves.values()])
    low, high = np.quantile(settled, 0.05), settled.max()
    span = max(high - low, 1e-3)
    bottom.set_ylim(low - 0.3 * span, high + 0.1 * span)
    bottom.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def elbo_against_sigma(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]], lines: Mapping[str, np.ndarray], *, unit: str
) -> Figure:
    """The final ELBO of each member against its sigma, and as lines with their spread those without one sigma.

    Args:
      points: title -> (sigmas [M], ELBOs [M]); joined by a line through the mean at each sigma.
      lines: title -> ELBOs [M]; drawn across, with a band of one standard deviation over members.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axis = figure.subplots()
    for index, (title, elbos) in enumerate(lines.items()):
        axis.axhline(elbos.mean(), color=f"C{index + 1}", label=title)
        if len(elbos) > 1:
            spread = elbos.std(ddof=1)
            axis.axhspan(elbos.mean() - spread, elbos.mean() + spread, color=f"C{index + 1}", alpha=0.15, linewidth=0)
    for index, (title, (sigmas, elbos)) in enumerate(points.items()):
        colour = "C0" if index == 0 else f"C{index + len(lines)}"
        axis.plot(sigmas, elbos, "o" if index == 0 else "s", color=colour, markersize=5, alpha=0.6, label=title)
        distinct = np.unique(sigmas)
        if index == 0 and len(distinct) > 1:
            axis.plot(distinct, [elbos[sigmas == sigma].mean() for sigma in distinct], color=colour, linewidth=1.0)
    axis.set(xscale="log", xlabel=f"sigma [{unit}]", ylabel="ELBO [nats]")
    axis.legend(frameon=False)
    return figure
