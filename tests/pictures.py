"""What the tests of pictures ask of a figure."""

import numpy as np

from gdjax import plot

PNG = b"\x89PNG\r\n\x1a\n"
RATES = np.array([0.001, 0.01, 0.1, 1.0])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []


def note(axes):
    """The small print under the heading."""
    return "".join(text.get_text() for text in axes.texts if text.get_gid() == "note")


def line(axes, label):
    (found,) = (one for one in axes.lines if one.get_label() == label)
    return np.asarray(found.get_ydata())


def written(figure, tmp_path):
    plot.save(figure, tmp_path / "a.png")
    return (tmp_path / "a.png").read_bytes().startswith(PNG)
