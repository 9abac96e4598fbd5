"""Figures show the numbers they are given: every point, every member, on readable axes, without global state."""

import io

import matplotlib
import numpy as np
import pytest

from lvae_jax import figures

RNG = np.random.default_rng(0)


def panel(title, shape, count=6):
    return figures.Panel(title, *(RNG.uniform(size=(count, *shape)) for _ in range(5)))


def curves(members=2, steps=5):
    return figures.Curves(np.arange(1, steps + 1), *(RNG.uniform(0.1, 1.0, (members, steps)) for _ in range(6)))


def render(figure):
    """Draws all of it, which is where layout and labels fail."""
    figure.savefig(io.BytesIO(), dpi=50)


def test_points_in_the_plane():
    panels = [panel("F-VAE", (2,)), panel("LS-VAE", (2,))]
    panels[1] = panels[1]._replace(samples=panels[1].samples + 1e6)
    figure = figures.plane_panels(panels)
    render(figure)
    left, right = figure.axes[2:4]
    np.testing.assert_allclose(left.collections[0].get_offsets(), panels[1].data)
    np.testing.assert_allclose(left.collections[1].get_offsets(), panels[1].reconstructions)
    np.testing.assert_allclose(right.collections[0].get_offsets(), panels[1].samples)
    assert right.get_xlim()[1] < 10.0, "far samples must not shrink the data"
    assert left.get_ylabel() == "LS-VAE"


@pytest.mark.parametrize("channels", [1, 3])
def test_images(channels):
    panels = [panel("F-VAE", (4, 4, channels)), panel("LV-VAE", (4, 4, channels))]
    figure = figures.image_panels(panels)
    render(figure)
    strips = [axis for axis in figure.axes if axis.get_ylabel()]
    assert [axis.get_ylabel().splitlines()[0] for axis in strips[:2]] == ["data", "F-VAE"]
    assert len(strips) == 1 + 4 * 2
    shown = np.asarray(strips[0].images[0].get_array())
    np.testing.assert_allclose(shown[:, :4].squeeze(), panels[0].data[0].squeeze())
    assert strips[0].images[0].get_clim() == (0.0, 1.0)


def test_losses_have_the_signs_of_losses():
    curve = curves()
    figure = figures.losses({"F-VAE": curve, "LS-VAE": curves()})
    render(figure)
    first = figure.axes[0]
    np.testing.assert_allclose([line.get_ydata() for line in first.lines[:2]], -curve.elbo)
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "-ELBO",
        "reconstruction: -log p(x|z)",
        "latent: KL",
    ]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_losses_lay_out_any_number_of_rows(count):
    figure = figures.losses({str(index): curves() for index in range(count)})
    assert sum(axis.get_visible() for axis in figure.axes) == count
    width, height = figure.get_size_inches()
    render(figure)
    assert width < 13
    assert height < 13


def test_sigma_and_elbo_share_their_steps_and_ignore_the_first_losses():
    curve = curves(steps=50)
    curve.elbo[:, 0] = -1e5
    figure = figures.sigma_and_elbo({"LS-VAE": curve}, unit="toy length")
    render(figure)
    top, bottom = figure.axes
    assert top.get_yscale() == "log"
    assert top.get_ylabel() == "sigma [toy length]"
    assert bottom.get_ylim()[0] > -10.0
    assert top.get_xlim() == bottom.get_xlim()


def test_elbo_against_sigma():
    sigmas, elbos = np.array([0.1, 0.1, 1.0, 1.0]), np.array([-1.0, -3.0, -5.0, -7.0])
    figure = figures.elbo_against_sigma(
        {"F-VAE": (sigmas, elbos)}, {"LS-VAE": np.array([-0.5, -0.7])}, unit="toy length"
    )
    render(figure)
    axis = figure.axes[0]
    across, dots, means = axis.lines
    np.testing.assert_allclose(across.get_ydata(), -0.6)
    np.testing.assert_array_equal(dots.get_xydata(), np.stack([sigmas, elbos], axis=1))
    np.testing.assert_allclose(means.get_ydata(), [-2.0, -6.0])
    assert axis.get_xscale() == "log"


def test_nothing_global_is_touched():
    before = {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}
    figures.losses({"F-VAE": curves()})
    assert {name: value for name, value in matplotlib.rcParams.items() if name != "backend"} == before
