"""Drawings: what is in them, and where the ranks stand."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from gossamer.topologies import TopologyParameterError, build
from gossamer.topologies.drawing import draw, figure, svg


def panels(topology, **options):
    return [axes for axes in figure(topology, **options).axes if axes.get_title()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_static_graph_has_one_panel_with_ranks_and_weights():
    (axes,) = panels(build("ring", 8))
    labels = texts(axes)
    assert [label for label in labels if label.isdigit()] == [str(rank) for rank in range(8)]
    assert labels.count("1/3") == 8
    assert len(axes.patches) == 8


def test_a_schedule_has_a_panel_for_each_round_of_a_period():
    topology = build("base", 6)
    shown = panels(topology)
    assert len(shown) == topology.period == 4
    for t, axes in enumerate(shown):
        assert axes.get_title().startswith(f"round {t}\n")
        assert len(axes.patches) == topology.round(t).num_messages // 2


def test_panels_are_bounded_and_one_round_can_be_chosen():
    assert len(panels(build("random_matching", 6))) == 8
    (axes,) = panels(build("random_matching", 6), t=41)
    assert axes.get_title().startswith("round 41")


def test_directed_edges_are_arrows_and_weights_of_many_edges_are_left_out():
    (axes,) = panels(build("exponential", 16))
    assert len(axes.patches) == 64
    assert "1/5" not in texts(axes)
    assert "edges 1/5" in axes.get_title()
    arrow = axes.patches[0].get_arrowstyle()
    assert type(arrow).__name__ == "CurveFilledB"


def test_ranks_that_idle_look_different():
    (axes,) = panels(build("base", 6), t=0)
    colors = axes.collections[0].get_facecolors()
    assert not np.array_equal(colors[2], colors[0])  # rank 2 idles in round 0
    np.testing.assert_array_equal(colors[2], colors[5])


def places(topology):
    (axes,) = panels(topology, t=0)
    return np.asarray(axes.collections[-1].get_offsets())


def test_grids_stand_in_rows_and_rings_in_circles():
    grid = places(build("grid", 12, rows=3, cols=4))
    assert len({*grid[:, 0].round(9)}) == 4
    assert len({*grid[:, 1].round(9)}) == 3
    ring = places(build("ring", 10))
    np.testing.assert_allclose(np.linalg.norm(ring, axis=1), 1, rtol=0, atol=1e-12)
    path = places(build("path", 5))
    assert np.all(path[:, 1] == 0)


@pytest.mark.parametrize(
    ("name", "n", "params"),
    [("ring", 1, {}), ("ring", 2, {}), ("star", 3, {}), ("tree", 15, {}), ("erdos_renyi", 30, {}),
     ("small_world", 160, {}), ("torus", 1024, {}), ("ring", 12, {"hierarchical": {"local": 3}})],
)  # fmt: skip
def test_an_svg_shows_every_rank_apart(name, n, params):
    topology = build(name, n, **params)
    offsets = places(topology)
    assert offsets.shape == (n, 2)
    assert len({tuple(place) for place in offsets.round(6)}) == n
    assert ET.fromstring(svg(topology)).tag.endswith("svg")


def test_the_same_topology_gives_the_same_svg():
    assert svg(build("base", 6)) == svg(build("base", 6))


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_files_are_written_by_suffix(suffix, magic, tmp_path):
    path = tmp_path / f"ring{suffix}"
    draw(build("ring", 5), path)
    assert path.read_bytes().startswith(magic)


def test_too_many_ranks_and_unknown_suffixes_are_refused(tmp_path):
    with pytest.raises(TopologyParameterError, match="at most 1024 ranks, got 1025"):
        svg(build("ring", 1025))
    with pytest.raises(TopologyParameterError, match=r"a \.png, \.svg or \.pdf file"):
        draw(build("ring", 4), tmp_path / "ring.txt")
