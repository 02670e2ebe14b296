"""The figure that every picture is drawn on; the one module that imports matplotlib when it is imported."""

import io
from typing import Any

from matplotlib.figure import Figure


class Canvas(Figure):
    """A `Figure` without pyplot behind it, so that nothing global is touched, which notebooks show all the same."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


def canvas(width: float, height: float) -> Any:
    """An empty figure, in inches, whose parts find room for their labels by themselves."""
    return Canvas(figsize=(width, height), layout="constrained")
