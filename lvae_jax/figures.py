"""Arrays to matplotlib figures. Nothing here touches the disk, the screen or matplotlib's global state."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

_DATA, _MEANS, _SAMPLES, _TANGENTS = "tab:blue", "tab:orange", "tab:green", "black"
# Matplotlib's ten without C7, the grey of other lines, and four more.
MODEL_COLOURS = (
    *(f"C{index}" for index in (0, 1, 2, 3, 4, 5, 6, 8, 9)),
    "#393b79",
    "#7b4173",
    "#e7ba52",
    "#637939",
    "#a0006e",
)
_MARKERS = "os^DvP*X"  # open and of several shapes: those in one place are all seen


class Panel(NamedTuple):
    """One model's row of pictures; all arrays are [B, *S].

    Attributes:
      title: names the model.
      axes: [B, *S, k], the principal axes of the tangents at the reconstructions, each as long as the stddev along it;
        None for a model without tangents.
    """

    title: str
    data: np.ndarray
    reconstructions: np.ndarray
    reconstruction_stddevs: np.ndarray
    samples: np.ndarray
    sample_means: np.ndarray
    axes: np.ndarray | None = None


class Curves(NamedTuple):
    """Metrics over steps of the members of one row; steps is [T], all others [M, T]. elbo, log_likelihood and kl in
    nats, mse per dimension."""

    steps: np.ndarray
    elbo: np.ndarray
    log_likelihood: np.ndarray
    kl: np.ndarray
    mse: np.ndarray
    sigma_min: np.ndarray
    sigma_mean: np.ndarray
    sigma_max: np.ndarray


def plane_panels(panels: Sequence[Panel], *, unit: str) -> Figure:
    """Points in the plane, as the paper's Figs. 4, 6 and 7: reconstructions over data, and generated samples with their
    means; `unit` is the unit of both axes. More than six models are drawn in two columns."""
    columns = 1 if len(panels) <= 6 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(9.0 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2 * columns, sharex=True, sharey=True, squeeze=False)
    dots = {"s": 4, "linewidths": 0, "rasterized": True}
    pairs = [pair for column in np.split(axes, columns, axis=1) for pair in column]
    for pair in pairs[len(panels) :]:
        for axis in pair:
            axis.set_visible(False)
    for row, panel in zip(pairs, panels, strict=False):
        row[0].scatter(*panel.data.T, color=_DATA, label="data", **dots)
        row[0].scatter(*panel.reconstructions.T, color=_MEANS, label="reconstructions", **dots)
        row[1].scatter(*panel.samples.T, color=_SAMPLES, label="generated samples", **dots)
        row[1].scatter(*panel.sample_means.T, color=_MEANS, label="their means", **dots)
        row[0].set_ylabel(panel.title.replace(", sigma", ",\nsigma"))
        _draw_tangents(row[0], panel.reconstructions, panel.axes)
    for axis in pairs[len(panels) - 1]:  # nothing is below these
        axis.tick_params(labelbottom=True)
    # The data set the frame: samples of a large sigma lie far outside, and would shrink all others.
    whole = panels[0].data[~np.isnan(panels[0].data).any(axis=1)]
    framed = whole if len(whole) else panels[0].reconstructions
    low, high = framed.min(axis=0), framed.max(axis=0)
    margin = 0.25 * (high - low).max()
    axes[0, 0].set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
    for axis in axes[0]:
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, markerscale=3, frameon=False)
    figure.supxlabel(f"both axes in {unit}", fontsize="small")
    return figure


def _draw_tangents(axis: Axes, points: np.ndarray, axes: np.ndarray | None, *, number: int = 60) -> None:
    """Draws the first tangent at some of the points [B, 2], from -1 to 1 stddev."""
    if axes is not None:
        ends = np.stack([points - axes[..., 0], points + axes[..., 0]], axis=1)[:number]
        axis.add_collection(LineCollection(list(ends), colors=_TANGENTS, linewidths=0.8, label="tangents"))


def space_panels(panels: Sequence[Panel], *, unit: str) -> Figure:
    """Points in space from two sides, along their first coordinate: reconstructions with their tangents over data, and
    generated samples with their means; `unit` is the unit of all axes."""
    figure = Figure(figsize=(13.0, 2.3 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), 4, sharex=True, sharey=True, squeeze=False)
    dots = {"s": 3, "linewidths": 0, "rasterized": True}
    for row, panel in zip(axes, panels, strict=True):
        for view, side in enumerate(([0, 1], [0, 2])):
            row[view].scatter(*panel.data[:, side].T, color=_DATA, label="data", **dots)
            row[view].scatter(*panel.reconstructions[:, side].T, color=_MEANS, label="reconstructions", **dots)
            tangents = None if panel.axes is None else panel.axes[:, side]
            _draw_tangents(row[view], panel.reconstructions[:, side], tangents)
            row[2 + view].scatter(*panel.samples[:, side].T, color=_SAMPLES, label="generated samples", **dots)
            row[2 + view].scatter(*panel.sample_means[:, side].T, color=_MEANS, label="their means", **dots)
        row[0].set_ylabel(panel.title.replace(", sigma", ",\nsigma"))
    low, high = panels[0].data.min(axis=0), panels[0].data.max(axis=0)
    axes[0, 0].set(xlim=(low[0] - 0.3, high[0] + 0.3), ylim=(low[1:].min() - 0.3, high[1:].max() + 0.3))
    for column in range(4):
        found: dict[str, Any] = {}
        for axis in axes[:, column]:  # not every model has tangents
            handles, labels = axis.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        options = {"ncols": 3, "markerscale": 3, "frameon": False, "fontsize": 8}
        axes[0, column].legend(found.values(), found, loc="lower center", bbox_to_anchor=(0.5, 1.0), **options)
        axes[-1, column].set_xlabel(f"across: $x_1$, up: $x_{2 + column % 2}$ [{unit}]")
    return figure


def point_panels(panels: Sequence[Panel], *, unit: str) -> Figure:
    """`plane_panels` of points of any dimension, by `in_plane` of the data; of the reconstructions, where data are
    missing. Points with a missing value, NaN, are not shown."""
    first = panels[0]
    project = in_plane(first.reconstructions if np.isnan(first.data).any() else first.data)
    flat = [
        panel._replace(
            data=project(panel.data),
            reconstructions=project(panel.reconstructions),
            samples=project(panel.samples),
            sample_means=project(panel.sample_means),
            axes=None,  # of which a projection is none
        )
        for panel in panels
    ]
    return plane_panels(flat, unit=unit)


def in_plane(points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function [B, D] -> [B, 2] that shows points of D dimensions in the plane: along the two directions in which
    `points` [N, D] vary most; those of a line in their order, one above the other."""
    if points.shape[-1] == 1:
        return lambda x: np.column_stack([x, np.linspace(0.0, np.ptp(points), len(x))])
    if points.shape[-1] == 2:
        return lambda x: x
    centre = points.mean(axis=0)
    directions = np.linalg.svd(points - centre, full_matrices=False)[2][:2]
    return lambda x: (x - centre) @ directions.T


def image_panels(panels: Sequence[Panel], *, unit: str) -> Figure:
    """Images [B, H, W, C] on [0, 1]: originals, then for each model reconstructions, generated means above samples, the
    principal axes of its tangents, if it has any, and a map of sigma in `unit` if sigma is not one number."""
    shown: list[tuple[str, np.ndarray, str | None]] = [("data", panels[0].data, None)]
    for panel in panels:
        shown.append((f"{panel.title}\nreconstructions", panel.reconstructions, None))
        shown.append(("generated means", panel.sample_means, None))
        shown.append(("generated samples", panel.samples, None))
        for number, tangent in enumerate([] if panel.axes is None else np.moveaxis(panel.axes, -1, 0), start=1):
            shown.append((f"tangent {number}\n[{unit}]", tangent.mean(axis=-1, keepdims=True), "RdBu_r"))
        stddevs = panel.reconstruction_stddevs.mean(axis=-1, keepdims=True)
        if np.ptp(stddevs) > 0.0:
            shown.append((f"sigma of the\nreconstructions\n[{unit}]", stddevs, "magma"))
    return _strips(shown)


def _strips(strips: Sequence[tuple[str, np.ndarray, str | None]]) -> Figure:
    """Rows of images, (label, [B, H, W, C], colour map): pixels on [0, 1] without a colour map, else one channel from
    0 on, or on both sides of 0 if there are negative values."""
    width, height = 9.0, 0.78 * len(strips)
    figure = Figure(figsize=(width, height), layout="constrained")
    for axis, (label, images, cmap) in zip(figure.subplots(len(strips), 1, squeeze=False)[:, 0], strips, strict=True):
        strip = np.concatenate([np.asarray(image) for image in images], axis=1)
        if cmap is None:
            _show(axis, strip)
        else:
            high = max(np.abs(strip).max(), 1e-6)
            shown = axis.imshow(strip.squeeze(axis=-1), cmap=cmap, vmin=-high if strip.min() < 0.0 else 0.0, vmax=high)
            figure.colorbar(shown, ax=axis, pad=0.01)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    return figure


def strips(examples: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """Rows of images [B, H, W, C] on [0, 1], each with its label."""
    return _strips([(label, images, None) for label, images in examples])


def by_prior(
    models: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], data: np.ndarray, *, unit: str
) -> Figure:
    """Samples and means of p(x|z) [B, *S] with z from several priors, side by side, a row for each model.

    Args:
      models: title -> prior -> (samples, means). Of images [B, H, W, C], 16 means lie above 16 samples; points [B, D]
        are shown by `in_plane` of the data.
      data: [N, *S], which set the frame of points.
    """
    priors = list(next(iter(models.values())))
    images = data.ndim == 4
    size = (2.2, 1.25) if images else (2.6, 2.4)
    figure = Figure(figsize=(size[0] * len(priors) + 0.6, size[1] * len(models) + 0.4), layout="constrained")
    axes = figure.subplots(len(models), len(priors), sharex=True, sharey=True, squeeze=False)
    whole = data if images else data[~np.isnan(data).any(axis=1)]
    project = None if images else in_plane(whole)
    for row, (title, of_model) in zip(axes, models.items(), strict=True):
        row[0].set_ylabel(title.replace(", sigma", ",\nsigma"), fontsize=8)
        for axis, (samples, means) in zip(row, of_model.values(), strict=True):
            if project is None:
                _show(axis, _grid(np.concatenate([means[:16], samples[:16]]), empty=1.0))
                axis.set(xticks=[], yticks=[])
            else:
                dots = {"s": 3, "linewidths": 0, "rasterized": True}
                axis.scatter(*project(samples).T, color=_SAMPLES, **dots)
                axis.scatter(*project(means).T, color=_MEANS, **dots)
    for axis, prior in zip(axes[0], priors, strict=True):
        axis.set_title(prior, fontsize=9)
    if project is not None:
        framed = project(whole)
        low, high = framed.min(axis=0), framed.max(axis=0)
        margin = 0.25 * (high - low).max()
        axes[0, 0].set(xlim=(low[0] - margin, high[0] + margin), ylim=(low[1] - margin, high[1] + margin))
        text = f"generated samples (green) and their means (orange); both axes in {unit}"
    else:
        text = "means of p(x|z) above samples"
    figure.supxlabel(text, fontsize="small")
    return figure


def latent_planes(models: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draws of z [B, 2] of the aggregate posterior and of priors, side by side, a row for each model: title -> name ->
    draws."""
    names = list(next(iter(models.values())))
    figure = Figure(figsize=(2.2 * len(names) + 0.6, 2.3 * len(models) + 0.4), layout="constrained")
    axes = figure.subplots(len(models), len(names), sharex=True, sharey=True, squeeze=False)
    for row, (title, of_model) in zip(axes, models.items(), strict=True):
        row[0].set_ylabel(title.replace(", sigma", ",\nsigma"), fontsize=8)
        for axis, (name, z) in zip(row, of_model.items(), strict=True):
            axis.scatter(*z.T, color=_DATA if name == "q(z)" else _SAMPLES, s=3, linewidths=0, rasterized=True)
            axis.set_aspect("equal")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    axes[0, 0].set(xlim=(-4.0, 4.0), ylim=(-4.0, 4.0))
    figure.supxlabel("the two latent dimensions with the largest KL", fontsize="small")
    return figure


def gallery(title: str, panels: Mapping[str, tuple[np.ndarray, np.ndarray | None]], *, unit: str) -> Figure:
    """Examples of one model, side by side.

    Args:
      panels: title -> (examples [B, *S], their stddevs [B, *S] or None). Images [B, H, W, C] on [0, 1] lie in rows of
        eight, where sigma is no single number above their sigma maps; points [B, D], shown by `in_plane`, are coloured
        by sigma. Of the stddevs of an image's channels, and of a point's coordinates, the mean is shown, on one scale
        for all panels.
    """
    first = next(iter(panels.values()))[0]
    images, project = first.ndim == 4, in_plane(first)
    sigmas = {name: stddevs.mean(axis=-1) for name, (_, stddevs) in panels.items() if stddevs is not None}
    if images and not any(np.ptp(sigma) > 0.0 for sigma in sigmas.values()):
        sigmas = {}
    rows = 1 + bool(images and sigmas)
    figure = Figure(figsize=(3.4 * len(panels) + 0.8, 3.5 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, len(panels), sharex=not images, sharey=not images, squeeze=False)
    limits = {
        "cmap": "magma" if images else "copper",
        "vmin": 0.0,
        "vmax": max((float(sigma.max()) for sigma in sigmas.values()), default=1.0),
    }
    for column, (name, (examples, _)) in zip(axes.T, panels.items(), strict=True):
        column[0].set_title(name)
        if images:
            _show(column[0], _grid(examples, empty=1.0))
            for axis in column:
                axis.set_axis_off()
                axis.set_anchor("N")
            if name in sigmas:
                shown = column[1].imshow(_grid(sigmas[name][..., None], empty=np.nan).squeeze(axis=-1), **limits)
        elif name in sigmas:
            shown = column[0].scatter(*project(examples).T, c=sigmas[name], s=8, linewidths=0, **limits)
        else:
            column[0].scatter(*project(examples).T, color=_DATA, s=8, linewidths=0)
    if sigmas:
        figure.colorbar(shown, ax=list(axes[-1]), label=f"sigma [{unit}]")
    return figure


def _show(axis: Axes, image: np.ndarray) -> None:
    """Shows an image [H, W, 1 or 3] on [0, 1]; a side may be 1."""
    pixels = np.clip(image, 0.0, 1.0)
    axis.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0.0, vmax=1.0)


def _grid(images: np.ndarray, *, empty: float) -> np.ndarray:
    """Images [B, H, W, C] in rows of eight, as one image [H ceil(B / 8), 8 W, C], `empty` where there is none."""
    size, height, width, channels = images.shape
    rows = -(-size // 8)
    places = np.full((8 * rows, height, width, channels), empty, images.dtype)
    places[:size] = images
    tiles = places.reshape(rows, 8, height, width, channels).swapaxes(1, 2)
    return tiles.reshape(rows * height, 8 * width, channels)


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


def sigma_and_elbo(curves: Mapping[str, Curves], *, unit: str, colours: Mapping[str, str] | None = None) -> Figure:
    """Sigma over steps above the ELBO over steps, as Fig. 10; a band spans the smallest to the largest sigma where it
    is a vector. Dotted: the root mean squared error, which is the best scalar sigma for the reconstructions then.

    `colours` gives each title its colour; by default, colours follow the order of the titles.
    """
    colours = colours or _in_order(curves)
    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for index, (title, curve) in enumerate(curves.items()):
        colour = colours[title]
        # The first of those that coincide, as a replayed run does with its original, is seen.
        style = {"color": colour, "linewidth": 0.9, "zorder": 2.0 + 1.0 / (1.0 + index)}
        top.plot(curve.steps, curve.sigma_mean.T, **style)
        top.plot(curve.steps, np.sqrt(curve.mse.T), linestyle=":", **style)
        top.fill_between(
            curve.steps, curve.sigma_min.min(axis=0), curve.sigma_max.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )
        bottom.plot(curve.steps, curve.elbo.T, **style)
        bottom.plot([], [], color=colour, label=title)
    top.set(ylabel=f"sigma [{unit}]", yscale="log")
    top.plot([], [], color="grey", linestyle=":", label="root mean squared error")
    top.legend(frameon=False, fontsize=8)
    bottom.set(ylabel="ELBO [nats]", xlabel="step")
    # The first steps of a small sigma lie orders of magnitude below everything that there is to see.
    settled = np.concatenate([curve.elbo[:, len(curve.steps) // 10 :].ravel() for curve in curves.values()])
    low, high = np.quantile(settled, 0.05), settled.max()
    span = max(high - low, 1e-3)
    bottom.set_ylim(low - 0.3 * span, high + 0.1 * span)
    bottom.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def elbo_against_sigma(
    points: Mapping[str, tuple[np.ndarray, np.ndarray]],
    lines: Mapping[str, np.ndarray],
    *,
    reused: tuple[np.ndarray, Mapping[str, np.ndarray]],
    limits: np.ndarray,
    bound: float | None,
    unit: str,
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]] = MappingProxyType({}),
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """The final ELBO of each member against its sigma; models that learn sigma are lines with their spread.

    Args:
      points: title -> (sigmas [M], ELBOs [M]).
      lines: title -> ELBOs [M]; drawn across, with a band of one standard deviation over members.
      reused: sigmas [T], and title -> ELBOs [M, T] of the same models, unchanged, at these.
      limits: [2, P], sigmas and the best ELBO that any networks reach at them; may be empty.
      bound: the ELBO that no model exceeds, if it is known.
      curves: title -> (sigmas [T], ELBOs [T]) of each member that has an ELBO at every sigma.
      colours: title -> colour; by default, colours follow the order of `lines` and `points`.
    """
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axis = figure.subplots()
    colours = colours or _in_order([*lines, *points])
    for title, elbos in lines.items():
        axis.axhline(elbos.mean(), color=colours[title], linewidth=1.0, label=None if title in points else title)
        if len(elbos) > 1:
            spread = elbos.std(ddof=1)
            axis.axhspan(elbos.mean() - spread, elbos.mean() + spread, color=colours[title], alpha=0.15, linewidth=0)
    for title, elbos in reused[1].items():
        axis.plot(reused[0], elbos.T, color=colours[title], linewidth=0.6, alpha=0.5)
    for title, of_members in curves.items():
        for sigmas, elbos in of_members:
            axis.plot(sigmas, elbos, color=colours[title], linewidth=0.9)
    for index, (marker, (title, (sigmas, elbos))) in enumerate(zip(itertools.cycle(_MARKERS), points.items())):
        # Where several have learned the same, each is seen: the first on top, the others around it.
        style: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 1.2, "linestyle": ""}
        style |= {"markersize": 6.0 + 1.3 * index, "zorder": 3.0 - 0.01 * index}
        axis.plot(sigmas, elbos, marker, color=colours[title], label=title, **style)
    if reused[1]:
        axis.plot([], [], color="grey", linewidth=0.6, label="the same model at another sigma")
    if limits.size:
        # No line joins them: the limit is concave between.
        label = "best of any networks: what is missing\nthere is unavoidable at this sigma"
        axis.plot(*limits, "_", color="black", markersize=12, label=label)
    if bound is not None:
        axis.axhline(bound, color="black", linestyle="--", linewidth=1.0, label="-H(x)")
    drawn = np.concatenate([*(elbos for _, elbos in points.values()), *lines.values()])
    high = max(drawn.max(), -np.inf if bound is None else bound)
    span = max(high - drawn.min(), 1e-3)
    axis.set(xscale="log", xlabel=f"sigma [{unit}]", ylabel="ELBO [nats]")
    axis.set_ylim(drawn.min() - 0.15 * span, high + 0.08 * span)
    sigmas = np.concatenate([sigmas for sigmas, _ in points.values()]) if points else reused[0]
    axis.set_xlim(sigmas.min() / 2.0, sigmas.max() * 2.0)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def rate_distortion(
    points: Mapping[str, np.ndarray],
    curves: Mapping[str, Sequence[np.ndarray]],
    *,
    limit: tuple[np.ndarray, np.ndarray] | None,
    unit: str,
    colours: Mapping[str, str],
) -> Figure:
    """The rate, the KL in nats, against the distortion, the squared error of an example: what each nat of the latent
    variables wins.

    Args:
      points: title -> [2, M], distortions and rates of members.
      curves: title -> [2, T] of each member that is read at T sigmas.
      limit: distortions, and the rates below which no networks come at them; None if they are not known.
    """
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axis = figure.subplots()
    for title, of_members in curves.items():
        for index, (distortions, rates) in enumerate(of_members):
            axis.plot(distortions, rates, color=colours[title], linewidth=0.9, label=None if index else title)
    for marker, (title, (distortions, rates)) in zip(itertools.cycle(_MARKERS), points.items()):
        axis.plot(distortions, rates, marker, color=colours[title], markerfacecolor="none", markersize=6.0, label=title)
    if limit is not None:
        axis.plot(*limit, color="black", linestyle="--", linewidth=1.0, label="no networks come below")
    axis.set(xscale="log", xlabel=f"distortion: squared error [({unit})$^2$]", ylabel="rate: KL [nats]")
    axis.set_ylim(bottom=0.0)
    axis.legend(frameon=False, fontsize=8)
    return figure


def shades(colour: str, number: int) -> list[str]:
    """So many shades of a colour, from light to dark; of one, the colour itself."""
    lightness = np.linspace(0.5, 0.0, number) if number > 1 else np.zeros(number)
    dark = np.array(to_rgb(colour))
    return [to_hex(tuple(dark + light * (1.0 - dark))) for light in lightness]


def _in_order(titles: Iterable[str]) -> dict[str, str]:
    """A colour for each title, by its place in the order."""
    return dict(zip(dict.fromkeys(titles), itertools.cycle(MODEL_COLOURS), strict=False))


def directions(
    stddevs: np.ndarray, sigmas: np.ndarray, linear_elbos: np.ndarray, *, trained: np.ndarray, unit: str
) -> Figure:
    """The number of principal directions of the data that a decoder can use at each fixed sigma, above the best ELBO of
    a linear VAE.

    Args:
      stddevs: [R], along the principal directions.
      sigmas, linear_elbos: [T].
      trained: [3, P], sigmas, active directions and ELBOs of trained F-VAEs; may be empty.
    """
    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(sigmas, np.sum(stddevs[None] > sigmas[:, None], axis=1), color="black", label="stddev above sigma")
    bottom.plot(sigmas, linear_elbos, color="black", label="the best linear VAE")
    if trained.size:
        top.plot(trained[0], trained[1], "o", color=_MEANS, label="active directions of trained F-VAEs")
        bottom.plot(trained[0], trained[2], "o", color=_MEANS, label="trained F-VAEs")
        low, high = min(trained[2].min(), linear_elbos.min()), trained[2].max()
        bottom.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    for axis in (top, bottom):
        axis.axvline(stddevs[0], color="grey", linestyle="--", linewidth=1.0, label=f"critical: {stddevs[0]:.4g}")
        axis.legend(frameon=False, fontsize=8)
    top.set(ylabel="principal directions", xscale="log", yscale="symlog", ylim=(-0.2, 1.3 * len(stddevs)))
    bottom.set(ylabel="ELBO [nats]", xlabel=f"sigma [{unit}]")
    return figure


class Sphere(NamedTuple):
    """Theorem 1 beside trained models on the sphere in R^`dim`; radii in units of the sphere's, sigmas in units of the
    critical one, the ELBO in nats.

    Attributes:
      sigma, radius, elbo: [T], the exact curves.
      map_rho [P], map_sigma [Q], objective [Q, P]: f over both, for the heat map.
      trained: name -> (sigmas [M], radii [M], ELBOs [M]).
    """

    dim: int
    sigma: np.ndarray
    radius: np.ndarray
    elbo: np.ndarray
    map_rho: np.ndarray
    map_sigma: np.ndarray
    objective: np.ndarray
    trained: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def objective_map(spheres: Sequence[Sphere]) -> Figure:
    """Eq. 8 over radius and sigma, as Fig. 2, a panel for each dimension: the ridge leaves rho = 0 at the critical
    sigma. Each row is shown relative to its own maximum, so that the ridge is seen at every sigma."""
    figure = Figure(figsize=(3.6 * len(spheres) + 0.9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(spheres), sharex=True, sharey=True, squeeze=False)[0]
    for axis, sphere in zip(axes, spheres, strict=True):
        below = sphere.objective - sphere.objective.max(axis=1, keepdims=True)
        shown = axis.pcolormesh(
            sphere.map_rho, sphere.map_sigma, below, vmin=-2.0, vmax=0.0, cmap="viridis", rasterized=True
        )
        axis.plot(sphere.radius, sphere.sigma, color="white", linewidth=1.5, label="the best radius")
        axis.axhline(1.0, color="white", linewidth=1.0, linestyle="--", label="critical sigma")
        axis.set(
            title=f"n = {sphere.dim}",
            xlabel="radius of the decoder's outputs / R",
            xlim=(sphere.map_rho[0], sphere.map_rho[-1]),
            ylim=(sphere.map_sigma[0], sphere.map_sigma[-1]),
        )
    axes[0].set_ylabel("sigma / (R / sqrt n)")
    axes[0].legend(loc="lower left", fontsize=8, labelcolor="white", facecolor="black", framealpha=0.4)
    figure.colorbar(shown, ax=list(axes), extend="min", label="f less its maximum at this sigma [nats]")
    return figure


def radius_and_elbo(spheres: Sequence[Sphere]) -> Figure:
    """The radius of the decoder's outputs above the ELBO, over sigma: trained models as dots on the exact curves."""
    figure = Figure(figsize=(3.3 * len(spheres) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(spheres), sharex=True, sharey="row", squeeze=False)
    for (top, bottom), sphere in zip(axes.T, spheres, strict=True):
        top.plot(sphere.sigma, sphere.radius, color="black", linewidth=1.0, label="Theorem 1")
        bottom.plot(sphere.sigma, sphere.elbo, color="black", linewidth=1.0)
        for index, (name, (sigmas, radii, elbos)) in enumerate(sphere.trained.items()):
            dots = {"marker": "os^"[index % 3], "color": f"C{index}", "s": 18, "alpha": 0.7, "linewidths": 0}
            top.scatter(sigmas, radii, label=name, **dots)
            bottom.scatter(sigmas, elbos, **dots)
        for axis in (top, bottom):
            axis.axvline(1.0, color="grey", linewidth=0.8, linestyle="--")
        top.set_title(f"n = {sphere.dim}")
        bottom.set_xlabel("sigma / (R / sqrt n)")
    axes[0, 0].set_ylabel("radius of the decoder's outputs / R")
    axes[1, 0].set_ylabel("ELBO [nats]")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure
