"""An objective that ends its process where a file tells it to: for tests of workers that die at their work."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn


class Mortal:
    """Mean of ``log cosh`` of the outputs.

    Attributes:
        once: A file; whoever meets it on a batch of so many samples as it says removes it and dies.
        always: A file; whoever meets it on such a batch dies.
    """

    def __init__(self, folder: Path) -> None:
        self.once, self.always = folder / "once", folder / "always"

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The objective, or the end."""
        for path in (self.once, self.always):
            if path.exists() and int(path.read_text()) == len(batch):
                if path == self.once:
                    path.unlink()
                os._exit(1)
        return model(batch).cosh().log().mean()
