"""Recipes of data sets that users put on disk: tiny files in each format, read right; broken ones refused by name."""

import csv
import importlib
import io
import math
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mtlgrad.data.nyuv2 import Angle, one_minus_cosine
from mtlgrad.recipes.comparison import checked, packaged, recipe_class
from mtlgrad.recipes.recipe import TrainError
from mtlgrad.recipes.training import Job, Training
from tests.recipes.small_recipe import CPU, quiet

DENSE = ("nyuv2", "cityscapes")

# ---- tiny data sets in the formats in which the public ones come, and ways to break their files

SIZE = (64, 96)  #: of the scenes


def image(path, level, mode="L"):
    """An image of one grey level, which no codec and no resizing changes by much."""
    Image.new(mode, (20, 16), level if mode == "L" else (level, level, level, 255)[: len(mode)]).save(path)


def write_utkface(folder):
    for i in range(18):
        image(folder / f"{20 + i}_{i % 2}_{i % 5}_201701{10 + i}204500123.jpg.chip.jpg", 5 * (20 + i), "RGB")
    image(folder / "61_3_20170109150557335.jpg", 5 * 40, "RGB")  # as in the distribution
    image(folder / "53__0_20170116184028385.jpg", 5 * 40, "RGB")
    (folder / "readme.txt").write_text("not an image")


class Python2(pickle._Pickler):
    """Writes what Python 2, and with it the archive of CIFAR-100, wrote: one kind of strings, an older numpy."""

    def string(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch = {**pickle._Pickler.dispatch, bytes: string, str: string}  # noqa: RUF012


def cifar_file(path, labels, data=None):
    if data is None:
        data = np.arange(len(labels), dtype=np.uint8)[:, None].repeat(3072, 1)
        data[:, 1024:2048] += 100  # green
    buffer = io.BytesIO()
    Python2(buffer, 2).dump({"data": data, "coarse_labels": labels, "filenames": ["a.png"] * len(labels)})
    path.write_bytes(buffer.getvalue().replace(b"numpy._core", b"numpy.core"))


def write_cifar(folder):
    cifar_file(folder / "train", [(3 * i) % 20 for i in range(40)])
    cifar_file(folder / "test", list(range(20)))


def write_chestxray(folder):
    (folder / "images").mkdir()
    names = [f"{patient:08}_{visit:03}.png" for patient in range(6) for visit in range(3)]
    findings = ["No Finding", "Hernia", "Effusion|Pleural_Thickening"]
    with (folder / "Data_Entry_2017.csv").open("w", newline="") as file:
        rows = [(name, findings[i % 3], i // 3, "PA") for i, name in enumerate(names)]
        csv.writer(file).writerows([("Image Index", "Finding Labels", "Patient ID", "View Position"), *rows])
    for i, name in enumerate(names):
        image(folder / "images" / name, 10 * i, "RGBA" if i == 1 else "L")  # a few are
    (folder / "train_val_list.txt").write_text("\n".join(names[:12]))
    (folder / "test_list.txt").write_text("\r\n".join(names[12:]) + "\r\n")


def write_scenes(folder, normals):
    draw = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for kind in ("image", "label", "depth", *(["normal"] if normals else [])):
            (folder / part / kind).mkdir(parents=True)
            for number in range(count):
                if kind == "label":
                    array = draw.integers(-1, 7, SIZE).astype(np.float64)
                else:
                    array = draw.uniform(0.1, 1.0, (*SIZE, 1 if kind == "depth" else 3)).astype(np.float32)
                    array[: number + 1, :, :] *= kind == "image"
                np.save(folder / part / kind / f"{number}.npy", array)


WRITE = {
    "utkface": write_utkface,
    "cifar-mtl": write_cifar,
    "chestxray": write_chestxray,
    "nyuv2": lambda folder: write_scenes(folder, normals=True),
    "cityscapes": lambda folder: write_scenes(folder, normals=False),
}
#: A recipe -> its folder.
FOLDERS = {**dict(zip(WRITE, WRITE, strict=True)), "cifar-mtl": "cifar-100-python"}


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def gone(path):
    path.rename(path.parent.parent.parent / "elsewhere")  # out of the data set


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content):
    return lambda path: path.write_text(content)


def pickled(value):
    return lambda path: path.write_bytes(pickle.dumps(value))


def cifar(labels, shape, dtype="uint8"):
    return lambda path: cifar_file(path, labels, np.zeros(shape, dtype))


def array(shape, value=0.5, dtype="float32"):
    return lambda path: np.save(path, np.full(shape, value, dtype))


def emptied(folder):
    for path in [p for p in folder.rglob("*") if p.suffix in (".jpg", ".npy", ".txt")]:
        path.write_text("") if path.suffix == ".txt" else path.unlink()


@pytest.fixture
def put(tmp_path, monkeypatch, one_thread):
    """Writes a data set; returns its recipe's class, and its folder."""

    def write(name):
        folder = tmp_path / "sets" / FOLDERS[name]
        folder.mkdir(parents=True)
        WRITE[name](folder)
        monkeypatch.setenv("MTLGRAD_DATA", str(tmp_path / "sets"))
        recipe = recipe_class(name)
        monkeypatch.setattr(recipe, "workers", 0)
        if name in DENSE:
            monkeypatch.setattr(recipe, "size", SIZE)
        return recipe, folder

    return write


def splits(recipe):
    return recipe.train, recipe.validation, recipe.test


def content(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


# ---- reading


def test_faces(put):
    make, _ = put("utkface")
    recipe = checked(make(0))
    assert [len(split) for split in splits(recipe)] == [14, 2, 4]
    assert make(1).train.paths != recipe.train.paths
    ages = torch.tensor([float(path.name[:2]) for path in recipe.train.paths])
    scale, missing = recipe.tasks[0].scale, 0
    assert scale == pytest.approx(float(ages.std()))
    for split in splits(recipe):
        for path, (pixels, targets) in zip(split.paths, split, strict=True):
            age, *labels = path.name.split("_")
            assert float(targets["age"]) * scale + float(ages.mean()) == pytest.approx(float(age), abs=1e-4)
            if len(labels) == 3 and labels[0]:
                level, wanted = 5 * int(age), [float(labels[0]), int(labels[1])]
            else:
                level, wanted, missing = 200, [math.nan, -100], missing + 1
            assert [targets["gender"].item(), targets["ethnicity"].item()] == pytest.approx(wanted, nan_ok=True)
            torch.testing.assert_close(pixels, torch.full((3, 64, 64), level / 127.5 - 1), rtol=0, atol=0.02)
    assert missing == 2


def test_training_faces_are_mirrored_at_random(put):
    make, folder = put("utkface")
    for path in folder.glob("*.jpg"):
        Image.linear_gradient("L").rotate(90).save(path)
    falling = [{bool(pixels[0, 0, 0] > pixels[0, 0, -1]) for pixels, _ in split} for split in splits(make(0))]
    assert falling == [{True, False}, falling[1], falling[1]]
    assert len(falling[1]) == 1


def test_superclasses(put):
    make, _ = put("cifar-mtl")
    recipe = checked(make(0))
    assert [len(split) for split in splits(recipe)] == [36, 4, 20]
    pixels, targets = recipe.test[[4, 19]]
    assert (pixels.shape, pixels.dtype) == ((2, 3, 32, 32), torch.float32)
    torch.testing.assert_close((pixels[1, :, 5, 9] + 1) * 127.5, torch.tensor([19.0, 119.0, 19.0]))
    assert list(targets) == [task.name for task in recipe.tasks]
    assert [name for name, values in targets.items() if values.tolist() == [1.0, 0.0]] == ["fruit and vegetables"]
    assert [name for name, values in targets.items() if values.tolist() == [0.0, 1.0]] == ["vehicles 2"]
    assert sorted(int(image[0, 0, 0]) for split in splits(recipe)[:2] for image in split.inputs) == list(range(40))


def test_radiographs(put):
    make, _ = put("chestxray")
    recipe = checked(make(0))
    assert [len(split) for split in splits(recipe)] == [9, 3, 6]
    for split in splits(recipe):
        for path, (pixels, targets) in zip(split.paths, split, strict=True):
            patient, visit = int(path.name[:8]), int(path.name[9:12])
            torch.testing.assert_close(pixels, torch.full((3, 224, 224), 10 * (3 * patient + visit) / 127.5 - 1))
            found = {name for name, value in targets.items() if value == 1.0}
            assert found == [set(), {"Hernia"}, {"Effusion", "Pleural_Thickening"}][visit]
    patients = [{path.name[:8] for path in split.paths} for split in splits(recipe)]
    assert [len(own) for own in patients] == [3, 1, 2]
    assert not patients[0] & patients[1]
    assert patients[2] == {"00000004", "00000005"}


@pytest.mark.parametrize("name", DENSE)
def test_scenes(put, name):
    make, folder = put(name)
    recipe = checked(make(0))
    assert [len(split) for split in splits(recipe)] == [10, 2, 3]
    assert sorted([*recipe.train.indices, *recipe.validation.indices]) == list(range(12))
    assert recipe.train.dataset.names[9:] == ["9.npy", "10.npy", "11.npy"]
    for i, (pixels, targets) in enumerate(recipe.test):
        arrays = {kind: torch.from_numpy(np.load(folder / "val" / kind / f"{i}.npy")) for kind in make.channels}
        label = arrays["label"]
        assert torch.equal(pixels, arrays["image"].permute(2, 0, 1))
        assert list(targets) == [task.name for task in recipe.tasks]
        assert torch.equal(targets["segmentation"], torch.where(label == -1, -100, label).long())
        for task in list(targets)[1:]:
            assert targets[task][:, : i + 1].isnan().all()
            assert torch.equal(targets[task][:, i + 1 :], arrays[task].permute(2, 0, 1)[:, i + 1 :])


def test_normals():
    output = torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0], [3.0, 2.0, 1.0]]).T[None, :, :, None].requires_grad_()
    target = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [math.nan] * 3]).T[None, :, :, None]  # [1, 3, 3, 1]
    loss, angle = one_minus_cosine(output, target), Angle()
    assert loss.item() == pytest.approx((1 + 1 - 0.5**0.5) / 2)
    assert not torch.autograd.grad(loss, output)[0][:, :, 2].any()
    angle.update(output.detach(), target)
    assert angle.value() == pytest.approx((90 + 45) / 2)
    assert one_minus_cosine(output, torch.full_like(target, math.nan)) == 0.0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_read_the_same(put, monkeypatch):
    recipe = put("nyuv2")[0](0)
    alone = list(recipe.loader(recipe.test, range(3), 2))
    monkeypatch.setattr(type(recipe), "workers", 1)
    torch.testing.assert_close(list(recipe.loader(recipe.test, range(3), 2)), alone, rtol=0, atol=0, equal_nan=True)


# ---- training


def tiny():
    return nn.Sequential(nn.Conv2d(3, 512, 32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in FOLDERS for m in ("sum", "aligned-ub", "bayesagg") if n not in DENSE or m != "bayesagg"],
)
def test_an_epoch(put, monkeypatch, name, method):
    make, folder = put(name)
    module = "nyuv2" if name in DENSE else packaged()[name].__module__.rpartition(".")[2]
    monkeypatch.setattr(importlib.import_module(f"mtlgrad.data.{module}"), "resnet18", tiny)
    before = content(folder)
    training = Training(make(0), Job(method, 0, 1e-3), 1, 8, CPU)
    training.run_epoch(quiet)
    assert all(map(math.isfinite, training.result.history[0]["train"]))
    metrics = dict(zip(training.result.tasks, training.finish().metrics, strict=True))
    known = ["Effusion", "Pleural_Thickening", "Hernia"] if name == "chestxray" else list(metrics)
    assert [task for task, value in metrics.items() if math.isfinite(value)] == known
    assert content(folder) == before


@pytest.mark.parametrize("name", FOLDERS)
def test_the_nets_fit_the_data(put, name):
    recipe = put(name)[0](0)
    model, (inputs, targets) = recipe.model(), next(iter(recipe.loader(recipe.train, range(2), 2)))
    features = model.backbone(inputs)
    for task in recipe.tasks:
        output = model.heads[task.name](features)
        assert (output.shape[0], output.shape[2:]) == (2, SIZE if name in DENSE else ())
        assert bool(task.loss(output, targets[task.name]).isfinite())


def test_scenes_are_of_the_public_sizes():
    found = [(recipe_class(name).size, recipe_class(name).classes) for name in DENSE]
    assert found == [((288, 384), 13), ((128, 256), 7)]


# ---- refusals


FACE, SCAN = "20_0_0_20170110204500123.jpg.chip.jpg", "images/00000005_002.png"
TABLE, LISTS = "Data_Entry_2017.csv", ("train_val_list.txt", "test_list.txt")
BROKEN = [
    *[(name, ".", emptied) for name in FOLDERS if name != "cifar-mtl"],
    *[("utkface", name + "_20170110204500123.jpg", text("")) for name in ("20_2_0", "20_0_5", "20_0_0_0", "x20_0_0")],
    *[("utkface", FACE, what) for what in (cut, text(""), text("no image"))],
    *[("cifar-mtl", name, what) for name in ("train", "test") for what in (gone, cut, text(""), text("no pickle"))],
    *[("cifar-mtl", "train", pickled(value)) for value in (Evil(), {b"data": 3}, [])],
    *[("cifar-mtl", "test", cifar([0, 19, label], (3, 3072))) for label in (20, -1, 0.5, "fish")],
    *[("cifar-mtl", "test", cifar([0] * 3, *bad)) for bad in [((3, 3071),), ((2, 3072),), ((3, 3072), "float32")]],
    *[("chestxray", name, gone) for name in (TABLE, *LISTS, "images", SCAN)],
    *[("chestxray", name, text("other.png")) for name in (*LISTS, SCAN)],
    *[("chestxray", SCAN, what) for what in (cut, text(""))],
    *[("chestxray", TABLE, text("Image Index,Finding Labels\na.png" + rest)) for rest in (",Hernia|Cold\n", "\n", ",")],
    ("chestxray", TABLE, text("Name,Label\n1,2\n")),
    *[("nyuv2", name, gone) for name in ("train/normal", "val", "train/label/3.npy", "train/image/0.npy")],
    *[("nyuv2", f"val/{kind}/1.npy", what) for kind in ("image", "label", "depth", "normal") for what in (
        cut, text(""), array((64, 95, 3)), array((*SIZE, 3), math.nan), array(SIZE, "x", "U1"), pickled(Evil()))],
    *[("cityscapes", f"val/{kind}", gone) for kind in ("depth", "depth/2.npy")],
    *[("cityscapes", "train/label/0.npy", array(SIZE, value)) for value in (-2, 7, 0.5, math.nan)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "broken", "how"), BROKEN)
def test_broken_files_are_refused_by_name(put, monkeypatch, tmp_path, name, broken, how):
    make, folder = put(name)
    monkeypatch.chdir(tmp_path)
    how(folder / broken)
    before = content(folder)
    with pytest.raises(TrainError) as refusal:
        [split[row] for split in splits(make(0)) for row in range(len(split))]
    assert str(folder / broken) in str(refusal.value)
    assert ": expected " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert content(folder) == before
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_no_folder_is_said_with_where_to_get_it(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for value, path in [(str(tmp_path / "sets"), tmp_path / "sets"), ("", "data")]:
        monkeypatch.setenv("MTLGRAD_DATA", value)
        with pytest.raises(TrainError, match=rf"^{path}/{FOLDERS[name]}: expected .* from .*MTLGRAD_DATA"):
            recipe_class(name)(0)


def test_pillow_is_asked_for_by_its_extra(put, monkeypatch):
    recipe = put("utkface")[0](0)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TrainError, match=r"pip install 'mtlgrad\[data\]'"):
        recipe.train[0]
