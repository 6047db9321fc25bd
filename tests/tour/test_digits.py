import numpy as np

from jaxnum.tour import _digits as stop


def test_split_keeps_every_digit_once():
    data = stop.load(0)
    assert sum(part[0].shape[0] for part in data) == 1797
    assert all(part[0].shape == (part[1].shape[0], 64) for part in data)


def test_every_method_learns():
    found = stop.digits(epochs=4, width=32)
    rows = dict(found.rows)
    for name in stop.COLOURS:
        assert float(rows[f"test accuracy, {name}"].rstrip("%")) > 85
        assert float(rows[f"training loss over the last epoch, {name}"]) < np.log(10) / 4
