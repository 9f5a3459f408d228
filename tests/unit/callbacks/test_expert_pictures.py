"""A picture of the experts' load shows a row for each layer, and a column with the number of each expert."""

import pytest
from matplotlib.figure import Figure

from lightning_megatron.callbacks.expert_load import ExpertLoad, LayerLoad


def load_of(layers: dict[int, tuple[float, ...]], dropped: float = 0.0) -> ExpertLoad:
    return ExpertLoad(tuple(LayerLoad(n, tokens, None, 0.0, 0.0, dropped) for n, tokens in layers.items()), step=7)


def test_rows_are_layers_and_columns_are_experts(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    assert load_of({1: (3.0, 1.0, 2.0), 4: (0.0, 0.0, 6.0)}, 0.125).draw(tmp_path / "load.png") == tmp_path / "load.png"
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[1.5, 0.5, 1.0], [0.0, 0.0, 3.0]]
    assert [text.get_text() for text in axes.texts] == ["1.50", "0.50", "1.00", "0.00", "0.00", "3.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "4"]
    assert axes.get_title() == "step 7: the busiest expert has 3.00 times its share, 12.5% of the choices dropped"
    assert axes.images[0].norm.vcenter == 1.0


@pytest.mark.parametrize(("experts", "shown"), [(200, 400), (201, 0)])
def test_of_many_experts_the_colours_alone_are_shown(experts, shown, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    load_of(dict.fromkeys((0, 1), (1.0,) * experts)).draw(tmp_path / "load.png")
    assert len(drawn[0].axes[0].texts) == shown
    assert drawn[0].axes[0].get_title() == "step 7: the busiest expert has 1.00 times its share"
