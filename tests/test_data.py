"""The data that ships with the package."""

import pytest
import torch

from mtlgrad.data import load_clothing, load_river
from mtlgrad.recipes.river import SITES


@pytest.fixture(scope="module")
def data():
    return load_clothing()


def test_shapes_types_and_ranges(data):
    n = 22_628
    assert data.offsets.shape == (n + 1,)
    assert data.offsets[0] == 0
    assert data.offsets[-1] == len(data.tokens)
    assert data.tokens.dtype == data.offsets.dtype == data.department.dtype == torch.int64
    assert data.rating.dtype == data.recommended.dtype == data.age.dtype == torch.float32
    assert (data.offsets.diff() > 0).all()
    assert data.tokens.min() >= 0
    assert data.tokens.max() < len(data.vocabulary) == 2000
    assert set(data.rating.unique().tolist()) == {1, 2, 3, 4, 5}
    assert set(data.recommended.unique().tolist()) == {0, 1}
    assert set(data.department.unique().tolist()) == set(range(len(data.departments))) == set(range(6))
    assert data.age.min() >= 18
    assert data.age.max() <= 99


def test_splits_cover_every_row_once(data):
    rows = [data.rows(s) for s in ("train", "validation", "test")]
    assert [len(r) for r in rows] == [15_839, 2_263, 4_526]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(22_628))
    with pytest.raises(ValueError, match="must be one of train, validation, test, found 'dev'"):
        data.rows("dev")


def test_pack_is_what_slicing_row_by_row_gives(data):
    rows = torch.tensor([5, 0, 22_627, 5, 17])
    tokens, offsets = data.pack(rows)
    for i, row in enumerate(rows.tolist()):
        expected = data.tokens[data.offsets[row] : data.offsets[row + 1]]
        assert torch.equal(tokens[offsets[i] : offsets[i + 1]], expected)
    assert offsets[-1] == len(tokens)


def test_pack_of_nothing(data):
    tokens, offsets = data.pack(torch.empty(0, dtype=torch.int64))
    assert len(tokens) == 0
    assert offsets.tolist() == [0]


def test_river_shapes_types_and_gaps():
    river = load_river()
    assert river.inputs.shape == (9125, 64)
    assert river.targets.shape == (9125, 8)
    assert river.inputs.dtype == river.targets.dtype == torch.float32
    assert river.inputs.isnan().sum() == 3264
    assert not river.targets.isnan().any()
    assert (river.targets > 0).all()
    assert river.sites == SITES
    assert river.columns[:8] == tuple(f"{site}__0" for site in SITES)


def test_river_rows_are_hours_and_targets_lie_two_days_ahead():
    river = load_river()
    for i in range(8):
        now, six_ago = river.inputs[:, i], river.inputs[:, river.columns.index(f"{SITES[i]}__-6")]
        both = ~(now[:-6].isnan() | six_ago[6:].isnan())
        assert (now[:-6] == six_ago[6:])[both].float().mean() > 0.99
        there = ~now[48:].isnan()
        assert (now[48:] == river.targets[:-48, i])[there].float().mean() > 0.99
