"""Delta_m: formula, sign, errors."""

import pytest
import torch

from mtlgrad.metrics import delta_m


def test_formula_and_sign():
    # Error 10 % higher: worse; accuracy 10 % higher: better; both 10 % worse.
    assert delta_m([1.1], [1.0], [False]) == pytest.approx(10.0)
    assert delta_m([1.1], [1.0], [True]) == pytest.approx(-10.0)
    assert delta_m([2.2, 0.45], [2.0, 0.5], [False, True]) == pytest.approx(10.0)
    assert delta_m([3.0, 4.0], [3.0, 4.0], [True, False]) == 0.0


def test_takes_tensors():
    assert delta_m(torch.tensor([1.5, 1.0]), torch.tensor([1.0, 1.0]), [False, False]) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], [1.0, 2.0], [True]), "one entry a task, found 1, 2 and 1"),
        (([], [], []), "found 0, 0 and 0"),
        (([1.0], [0.0], [True]), r"baseline\[0\] must not be 0"),
        (([float("nan")], [1.0], [True]), "must be finite, found nan"),
    ],
)
def test_errors_name_what_was_found(arguments, words):
    with pytest.raises(ValueError, match=words):
        delta_m(*arguments)
