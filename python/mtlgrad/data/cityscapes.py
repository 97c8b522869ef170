"""Cityscapes (Cordts et al., CVPR 2016): a street -> a class and the inverse depth at each pixel."""

from __future__ import annotations

from ..recipes.tasks import MAE, MeanIoU, Task, absolute_error, multiclass
from .nyuv2 import DenseScenes


class Cityscapes(DenseScenes):
    """2,975 scenes to train on and 500 for the test, of 128 x 256, in $MTLGRAD_DATA/cityscapes; 7 classes.

    As preprocessed for MTAN (Liu et al., CVPR 2019). Batch size, epochs and losses are those of LibMTL's example;
    of its metrics this has one a task.
    """

    name = "cityscapes"
    source = (
        "Cityscapes as preprocessed for MTAN (train/ and val/, each with image/, label/ and depth/ of N.npy), "
        "from github.com/lorenmt/mtan"
    )
    size, classes, batch_size = (128, 256), 7, 64
    tasks = (multiclass("segmentation", MeanIoU), Task("depth", absolute_error, MAE))
