"""python scripts/write_presets.py

Write configs/preset/fast.yaml and paper.yaml from stnerp/presets.py; run it after a change there.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stnerp.presets import FAST, PAPER, DefNetSettings, Preset, RefNetSettings

FOLDER = Path(__file__).parents[1] / "configs" / "preset"


def text_of(preset: Preset) -> str:
    """All settings of a preset as YAML, levels as triples."""
    return "\n".join(
        [
            "# Written by scripts/write_presets.py from stnerp/presets.py, which says what each setting means.",
            "ref_net:",
            *_lines(preset.ref_net),
            "def_net:",
            *_lines(preset.def_net),
            "",
        ]
    )


def _lines(settings: RefNetSettings | DefNetSettings) -> list[str]:
    values: dict[str, Any] = asdict(settings)
    lines = []
    for name, value in values.items():
        if name == "levels":
            value = [list(level.values()) for level in value]
            lines.append("  # spacing_mm, lattice_mm (null: the image's own, the voxels'), iterations,")
            lines.append(
                "  # targets per step (null: all of them), rate of a new Adam (null: the old one goes on)"
            )
        shown = json.dumps(value)  # YAML reads JSON
        lines.append(f"  {name}: {shown}")
    return lines


if __name__ == "__main__":
    for name, preset in (("fast", FAST), ("paper", PAPER)):
        path = FOLDER / f"{name}.yaml"
        path.write_text(text_of(preset), encoding="utf-8")
        print(f"wrote {path}")
