"""Who shares rows of tokens, in the grid of ranks, and what is said where they are on several machines."""

from lightning_megatron.cli.rank_grid import RankGrid


def test_rows_that_are_shared(tmp_path):
    inside = RankGrid.parse("tp=2,cp=2,pp=2,dp=2")
    assert "stage 1   8  9 | 10 11  node 1    12 13 | 14 15  node 1" in inside.text()
    assert "Each row of tokens is in 2 parts" in inside.text()
    assert list(inside.warnings()) == []
    assert inside.draw(tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_are_shared_over_machines():
    grid = RankGrid.parse("tp=4,cp=4")
    assert grid.ranks(0, 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    (warning,) = grid.warnings()
    assert "context parallelism crosses nodes: ranks [0, 4, 8, 12] are on nodes 0 and 1" in warning
    assert "a smaller tp, so that tp · cp divides 8" in warning
    (warning,) = RankGrid.parse("cp=16").warnings()
    assert "a smaller cp, which divides 8" in warning
    (warning,) = RankGrid.parse("tp=16,cp=2").warnings()
    assert warning.startswith("tensor parallelism crosses nodes")


def test_experts():
    text = RankGrid.parse("tp=2,ep=4,etp=1,dp=4").text()
    assert "tp=2, pp=1, dp=4, ep=4, etp=1" in text
    assert text.endswith("divided over 4 ranks (ep=4, etp=1), on the first stage 0 to 3, 4 to 7.")
    (warning,) = RankGrid.parse("ep=16,dp=16").warnings()
    assert warning.startswith("expert parallelism crosses nodes: etp=1 × ep=16 ranks do not divide the 8 of a node")
