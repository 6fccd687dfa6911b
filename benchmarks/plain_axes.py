"""How the benchmarks' plots look."""

from __future__ import annotations

from typing import Any


def plain_axes(panel: Any) -> None:
    """No box, a faint grid, and on logarithmic axes 0.5, 1, 2, 5, 10 and so on instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, scale in ((panel.xaxis, panel.get_xscale()), (panel.yaxis, panel.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axis.set_minor_formatter(NullFormatter())
    panel.grid(color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def short(value: float) -> str:
    """2000000 as 2M, 5000 as 5k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
