"""The reported demo with a calculator: it works out what stands before each "="."""

import dataclasses
from pathlib import Path

from configs import arithmetic
from train.config import ToolConfig

CONFIG = dataclasses.replace(
    arithmetic.CONFIG,
    out=Path("runs/calculator"),
    tool=ToolConfig(
        function="train.tools:calculator",
        called_by="=",
        max_calls=24,  # one for each operation
    ),
)
