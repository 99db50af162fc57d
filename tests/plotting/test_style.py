"""Methods can be told apart by everybody, in any figure and in any setting."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

import cutlayer.algorithms as algorithms
from cutlayer.plotting.figures.axes import line_look
from cutlayer.plotting.style import METHODS, dashes, format_metric, is_share, method_style, metric_label, shade

# How people without one kind of cone see linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHT = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
_TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
_WHITE = (0.95047, 1.0, 1.08883)


def lab(color: str, sight: str) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    rgb = np.asarray(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.asarray(_TO_XYZ) @ np.clip(np.asarray(SIGHT[sight]) @ linear, 0, 1) / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_every_two_methods_differ_in_colour_for_the_colour_blind(sight: str) -> None:
    """A distance of 2 in CIELAB can just be seen side by side; red and green of equal lightness come to about 5."""
    for (a, first), (b, second) in itertools.combinations(METHODS.items(), 2):
        distance = float(np.linalg.norm(lab(first.color, sight) - lab(second.color, sight)))
        assert distance > 15, f"{a} and {b} differ by {distance:.1f}"
        assert float(np.linalg.norm(lab(first.color, sight) - lab("white", sight))) > 30, f"{a} is faint"


def test_every_registered_method_has_a_look_of_its_own() -> None:
    assert set(algorithms.names()) <= set(METHODS)
    assert len({(style.color, style.marker) for style in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("sight", SIGHT)
def test_no_method_of_ones_own_looks_like_a_listed_one(sight: str) -> None:
    spare = {(style.color, style.marker) for style in (method_style(f"method{number}") for number in range(300))}
    assert len(spare) > 20
    for name, style in METHODS.items():
        for color, marker in spare:
            far = float(np.linalg.norm(lab(style.color, sight) - lab(color, sight))) > 15
            assert far or marker != style.marker, f"{name} and {color} {marker}"


def test_the_simulation_of_colour_blindness_confuses_what_it_should() -> None:
    red, green = "#C05020", "#7A7A1E"
    far = float(np.linalg.norm(lab(red, "all cones") - lab(green, "all cones")))
    near = float(np.linalg.norm(lab(red, "deuteranopia") - lab(green, "deuteranopia")))
    assert far > 50
    assert near < 20
    np.testing.assert_allclose(lab("white", "all cones"), [100, 0, 0], atol=0.1)


@pytest.mark.parametrize("method", [*METHODS, "a_method_of_ones_own"])
def test_twelve_settings_of_a_method_look_different(method: str) -> None:
    color = method_style(method).color
    looks = [(shade(color, variant), dashes(variant)) for variant in range(12)]
    assert len(set(looks)) == 12
    assert looks[0] == (color.lower(), "-")
    shades = {lab(each, "all cones")[0] for each, _ in looks}
    assert min(abs(a - b) for a, b in itertools.combinations(shades, 2)) > 8


@pytest.mark.parametrize("method", [*METHODS, "a_method_of_ones_own"])
def test_settings_of_a_method_differ_where_there_is_no_line(method: str) -> None:
    looks = [line_look(method, variant) for variant in range(15)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 15
    assert {look["marker"] for look in looks[:3]} == {method_style(method).marker}
    for first, second in itertools.combinations(looks, 2):
        apart = float(np.linalg.norm(lab(first["color"], "all cones") - lab(second["color"], "all cones")))
        assert apart > 8 or _outline(first["marker"]) != _outline(second["marker"])


def _outline(marker: str) -> str:
    """One of markers that look alike when they are small."""
    return next((each for each in ("o8hHp", "Dd", "xX", "+P") if marker in each), marker)


def test_metrics_in_words() -> None:
    assert metric_label("test_acc") == "test accuracy"
    assert metric_label("test_loss") == "test loss (nats)"
    assert metric_label("local_acc/worst_decile") == "accuracy on local test sets, worst tenth of clients"
    assert metric_label("align/error_after") == "align/error_after"
    assert [is_share(name) for name in ("test_acc", "local_acc/std", "val_loss", "align/target")] == [
        True,
        True,
        False,
        False,
    ]
    assert format_metric("test_acc", 0.8125) == "81.25%"
    assert format_metric("test_loss", 0.27512) == "0.2751"
