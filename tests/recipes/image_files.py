"""Tiny data sets in the formats in which the public ones come, and ways to break their files."""

import csv
import io
import pickle
import struct

import numpy as np
from PIL import Image

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
