"""Figures show the numbers they are given: every point, every member, on readable axes, without global state."""

import io

import matplotlib.colors
import numpy as np
import pytest

from lvae_jax import figures

RNG = np.random.default_rng(0)


def panel(title, shape, count=6):
    return figures.Panel(title, *(RNG.uniform(size=(count, *shape)) for _ in range(5)))


def curves(members=2, steps=5):
    return figures.Curves(np.arange(1, steps + 1), *(RNG.uniform(0.1, 1.0, (members, steps)) for _ in range(7)))


def render(figure):
    """Draws all of it, which is where layout and labels fail."""
    figure.savefig(io.BytesIO(), dpi=50)


def test_points_in_the_plane():
    panels = [panel("F-VAE", (2,)), panel("LS-VAE", (2,))]
    panels[1] = panels[1]._replace(samples=panels[1].samples + 1e6)
    figure = figures.plane_panels(panels, unit="mm")
    render(figure)
    left, right = figure.axes[2:4]
    np.testing.assert_allclose(left.collections[0].get_offsets(), panels[1].data)
    np.testing.assert_allclose(left.collections[1].get_offsets(), panels[1].reconstructions)
    np.testing.assert_allclose(right.collections[0].get_offsets(), panels[1].samples)
    assert right.get_xlim()[1] < 10.0, "far samples must not shrink the data"
    assert left.get_ylabel() == "LS-VAE"
    assert figure.get_supxlabel() == "both axes in mm"


def test_many_models_in_the_plane_stand_in_two_columns():
    panels = [panel(str(index), (2,)) for index in range(7)]
    figure = figures.plane_panels(panels, unit="mm")
    render(figure)
    axes = np.reshape(figure.axes, (4, 4))
    assert [axis.get_ylabel() for axis in [*axes[:, 0], *axes[:, 2]] if axis.get_visible()] == list("0123456")
    shown = axes[1, 2].collections[0].get_offsets()
    np.testing.assert_allclose(shown, panels[5].data)
    assert not axes[3, 2].get_visible()
    assert not axes[3, 3].get_visible()


@pytest.mark.parametrize("channels", [1, 3])
def test_images(channels):
    panels = [panel("F-VAE", (4, 4, channels)), panel("LV-VAE", (4, 4, channels))]
    figure = figures.image_panels(panels, unit="mm")
    render(figure)
    strips = [axis for axis in figure.axes if axis.get_ylabel()]
    assert [axis.get_ylabel().splitlines()[0] for axis in strips[:2]] == ["data", "F-VAE"]
    assert len(strips) == 1 + 4 * 2
    shown = np.asarray(strips[0].images[0].get_array())
    np.testing.assert_allclose(shown[:, :4].squeeze(), panels[0].data[0].squeeze())
    assert strips[0].images[0].get_clim() == (0.0, 1.0)


def test_images_with_one_sigma_have_no_sigma_map():
    fixed, vector = panel("F-VAE", (4, 4, 1)), panel("LV-VAE", (4, 4, 1))
    fixed = fixed._replace(reconstruction_stddevs=np.full_like(fixed.data, 0.7))
    figure = figures.image_panels([fixed, vector], unit="mm")
    render(figure)
    strips = [axis.get_ylabel().splitlines()[0] for axis in figure.axes if axis.get_ylabel()]
    assert strips.count("sigma of the") == 1
    assert strips[-1] == "sigma of the"
    assert len(strips) == 1 + 3 + 4


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


def test_sigma_and_elbo_share_an_axis_of_steps():
    curve = curves(steps=50)
    curve.elbo[:, 0] = -1e5
    figure = figures.sigma_and_elbo({"LS-VAE": curve}, unit="toy length")
    render(figure)
    top, bottom = figure.axes
    assert top.get_yscale() == "log"
    assert top.get_ylabel() == "sigma [toy length]"
    assert bottom.get_ylim()[0] > -10.0
    assert top.get_xlim() == bottom.get_xlim()


LIMIT = "best of any networks: what is missing\nthere is unavoidable at this sigma"
EMPTY = np.empty((2, 0))
GRID = np.geomspace(0.01, 10.0, 7)


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def line(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def test_elbo_against_sigma():
    sigmas, elbos = np.array([0.1, 0.1, 1.0, 1.0]), np.array([-1.0, -3.0, -5.0, -7.0])
    learned, moved = np.array([-0.5, -0.7]), RNG.uniform(-9.0, -1.0, (4, 7))
    figure = figures.elbo_against_sigma(
        {"F-VAE": (sigmas, elbos), "LS-VAE": (np.array([0.07, 0.06]), learned)},
        {"LS-VAE": learned, "LV-VAE": np.array([-0.2])},
        reused=(GRID, {"F-VAE": moved}),
        limits=np.array([[0.1, 1.0], [-0.4, -4.0]]),
        bound=-0.1,
        unit="toy length",
    )
    render(figure)
    axis = figure.axes[0]
    dots, alone = line(axis, "F-VAE"), line(axis, "LV-VAE")
    np.testing.assert_array_equal(dots.get_xydata(), np.stack([sigmas, elbos], axis=1))
    np.testing.assert_allclose(alone.get_ydata(), -0.2)
    across = next(each for each in axis.lines if np.allclose(each.get_ydata(), -0.6))
    assert across.get_color() == line(axis, "LS-VAE").get_color() != dots.get_color()
    np.testing.assert_array_equal(line(axis, LIMIT).get_xydata(), [[0.1, -0.4], [1.0, -4.0]])
    np.testing.assert_allclose(line(axis, "-H(x)").get_ydata(), -0.1)
    drawn = [each for each in axis.lines if len(each.get_xdata()) == len(GRID)]
    np.testing.assert_array_equal([each.get_ydata() for each in drawn], moved)
    assert {each.get_color() for each in drawn} == {dots.get_color()}
    assert labels(axis).count("LS-VAE") == 1
    assert axis.get_xscale() == "log"
    low, high = axis.get_ylim()
    assert low < -7.0
    assert high > -0.1


def test_models_have_distinct_colours_and_none_is_grey():
    titles = [f"model {index}" for index in range(8)]
    points = {title: (np.array([0.1 + index]), np.array([-1.0])) for index, title in enumerate(titles[1:])}
    figure = figures.elbo_against_sigma(
        points, {titles[0]: np.array([-2.0])}, reused=(GRID, {}), limits=EMPTY, bound=None, unit="toy length"
    )
    colours = [matplotlib.colors.to_hex(line(figure.axes[0], title).get_color()) for title in titles]
    assert len(set(colours)) == len(titles)
    assert not {matplotlib.colors.to_hex(name) for name in ("grey", "tab:gray", "black")} & set(colours)


def test_model_has_one_colour_in_all_figures():
    colours = {"LV-VAE": "C2", "LS-VAE": "C1", "F-VAE": "C0"}
    points = {title: (np.array([0.1]), np.array([-1.0])) for title in ("F-VAE", "LS-VAE")}
    over_sigma = figures.elbo_against_sigma(
        points, {}, reused=(GRID, {}), limits=EMPTY, bound=None, unit="toy length", colours=colours
    )
    titles = ("LS-VAE", "LV-VAE")
    over_steps = figures.sigma_and_elbo({title: curves() for title in titles}, unit="toy length", colours=colours)
    for figure, drawn in ((over_sigma, points), (over_steps, titles)):
        for title in drawn:
            assert line(figure.axes[-1], title).get_color() == colours[title]


def test_points_with_missing_values_are_not_shown():
    """A point with the mean in their place was never measured: such points would make a cross."""
    x = RNG.normal(size=(40, 4))
    panel = figures.Panel("LS-VAE", np.where(RNG.random((40, 4)) < 0.2, np.nan, x), x, np.ones_like(x), x, x)
    for data in (panel.data, np.full_like(x, np.nan)):
        figure = figures.point_panels([panel._replace(data=data)], unit="unit of the data")
        render(figure)
        drawn = np.ma.filled(figure.axes[0].collections[0].get_offsets(), np.nan)
        np.testing.assert_array_equal(np.isnan(drawn).any(axis=1), np.isnan(data).any(axis=1))
        assert np.isfinite(figure.axes[0].get_xlim()).all()


def test_dots_in_one_place_are_all_seen():
    place = (np.array([0.1]), np.array([-1.0]))
    figure = figures.elbo_against_sigma(
        {"LS-VAE": place, "F*-VAE": place}, {}, reused=(GRID, {}), limits=EMPTY, bound=None, unit="toy length"
    )
    first, second = (line(figure.axes[0], title) for title in ("LS-VAE", "F*-VAE"))
    assert first.get_markerfacecolor() == second.get_markerfacecolor() == "none"
    assert first.get_marker() != second.get_marker()
    assert first.get_markersize() < second.get_markersize()
    assert first.get_zorder() > second.get_zorder()


@pytest.mark.parametrize(
    ("points", "lines"),
    [
        ({"F-VAE": (np.array([0.1]), np.array([-1.0]))}, {}),
        ({}, {"LV-VAE": np.array([3.0])}),
        ({}, {"LV-VAE": np.array([3.0, 3.0])}),
        ({"sigma-VAE": (np.array([0.1, 0.2]), np.array([-1.0, -2.0]))}, {"LV-VAE": np.array([3.0])}),
    ],
)
def test_elbo_against_sigma_of_any_variants_alone(points, lines):
    figure = figures.elbo_against_sigma(
        points, lines, reused=(GRID, {}), limits=EMPTY, bound=None, unit="pixel on [0, 1]"
    )
    render(figure)
    axis = figure.axes[0]
    low, high = axis.get_ylim()
    for elbos in [*(elbos for _, elbos in points.values()), *lines.values()]:
        assert low < elbos.min() <= elbos.max() < high
    assert not {"-H(x)", LIMIT} & set(labels(axis)), "what is not known is not named"
    assert set(labels(axis)) >= {*points, *lines}
    for sigmas, _ in points.values():
        assert axis.get_xlim()[0] < sigmas.min() <= sigmas.max() < axis.get_xlim()[1]


STDDEVS = np.array([2.0, 1.0, 0.5, 0.1])


def test_directions_figure_counts_stddevs_above_sigma():
    elbos = -np.log(GRID)
    trained = np.array([[0.3, 1.5], [3.0, 1.0], [-2.0, -4.0]])
    figure = figures.directions(STDDEVS, GRID, elbos, trained=trained, unit="pixel on [0, 1]")
    render(figure)
    top, bottom = figure.axes
    np.testing.assert_array_equal(
        line(top, "stddev above sigma").get_ydata(), [sum(s > sigma for s in STDDEVS) for sigma in GRID]
    )
    np.testing.assert_array_equal(line(bottom, "the best linear VAE").get_xydata(), np.stack([GRID, elbos], axis=1))
    np.testing.assert_array_equal(line(top, "active directions of trained F-VAEs").get_xydata(), trained[:2].T)
    np.testing.assert_array_equal(line(bottom, "trained F-VAEs").get_xydata(), trained[[0, 2]].T)
    for axis in (top, bottom):
        np.testing.assert_array_equal(line(axis, "critical: 2").get_xdata(), 2.0)
        assert axis.get_xscale() == "log"
    assert bottom.get_xlabel() == "sigma [pixel on [0, 1]]"


def test_directions_without_trained_models():
    figure = figures.directions(STDDEVS, GRID, -np.log(GRID), trained=np.empty((3, 0)), unit="toy length")
    render(figure)
    assert [labels(axis) for axis in figure.axes] == [
        ["stddev above sigma", "critical: 2"],
        ["the best linear VAE", "critical: 2"],
    ]


def sphere(dim, trained):
    rho, sigma = np.linspace(0.0, 1.2, 9), np.linspace(0.05, 1.5, 11)
    return figures.Sphere(
        dim=dim,
        sigma=np.linspace(0.05, 1.5, 6),
        radius=RNG.uniform(size=6),
        elbo=RNG.normal(size=6),
        map_rho=rho,
        map_sigma=sigma,
        objective=RNG.normal(size=(11, 9)),
        trained=trained,
    )


def test_objective_map_shows_each_sigma_relative_to_its_best_radius():
    spheres = [sphere(2, {}), sphere(10, {})]
    figure = figures.objective_map(spheres)
    render(figure)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["n = 2", "n = 10"]
    for axis, each in zip(figure.axes, spheres, strict=False):
        shown = np.asarray(axis.collections[0].get_array()).reshape(11, 9)
        np.testing.assert_allclose(shown, each.objective - each.objective.max(axis=1, keepdims=True))
        np.testing.assert_array_equal(line(axis, "the best radius").get_xydata().T, [each.radius, each.sigma])
        np.testing.assert_array_equal(line(axis, "critical sigma").get_ydata(), 1.0)


def test_radius_and_elbo_put_trained_models_on_the_exact_curves():
    of_f = np.array([[0.3, 1.3], [0.9, 0.0], [-1.0, -2.0]])
    spheres = [sphere(2, {"F-VAE": tuple(of_f), "LS-VAE": 3 * (np.array([0.1]),)}), sphere(3, {})]
    figure = figures.radius_and_elbo(spheres)
    render(figure)
    for column, each in enumerate(spheres):
        top, bottom = figure.axes[column], figure.axes[2 + column]
        np.testing.assert_array_equal(top.lines[0].get_xydata().T, [each.sigma, each.radius])
        np.testing.assert_array_equal(bottom.lines[0].get_xydata().T, [each.sigma, each.elbo])
        assert top.get_title() == f"n = {each.dim}"
    np.testing.assert_array_equal(figure.axes[0].collections[0].get_offsets(), of_f[:2].T)
    np.testing.assert_array_equal(figure.axes[2].collections[0].get_offsets(), of_f[[0, 2]].T)
    assert labels(figure.axes[0]) == ["Theorem 1", "F-VAE", "LS-VAE"]


def test_nothing_global_is_touched():
    before = {name: value for name, value in matplotlib.rcParams.items() if name != "backend"}
    figures.losses({"F-VAE": curves()})
    assert {name: value for name, value in matplotlib.rcParams.items() if name != "backend"} == before


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (5, 1, 1)])
def test_images_with_a_side_of_one(shape):
    images = np.random.default_rng(0).uniform(size=(3, *shape))
    strips = figures.image_panels([figures.Panel("", *5 * [images])], unit="pixel").axes
    grid = figures.gallery("", {"means": (images, images)}, unit="pixel").axes[0]
    height, width, _ = shape
    for axis, columns in ((strips[0], 3), (strips[4], 3), (grid, 8)):
        assert axis.images[0].get_array().shape[:2] == (height, columns * width)
