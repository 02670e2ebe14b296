"""Pictures of batched descents, each a function from solutions or plain arrays to a matplotlib `Figure`.

`loss_over_steps` (what `record=` kept), `final_loss` (over rates and other swept axes), `steps_to_convergence`,
`descent` (one problem on its loss curve) and `fits` (models per group). `save` writes a figure as PNG or SVG. Figures
show themselves in notebooks; nothing global of matplotlib is touched. Needs the extra `cli`.
"""

from gdjax.plot.curve import descent
from gdjax.plot.grid import final_loss
from gdjax.plot.histogram import steps_to_convergence
from gdjax.plot.history import loss_over_steps
from gdjax.plot.lines import fits
from gdjax.plot.style import DRAWABLE, save

__all__ = ["DRAWABLE", "descent", "final_loss", "fits", "loss_over_steps", "save", "steps_to_convergence"]
