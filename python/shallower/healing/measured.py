"""The held-out losses that a healing knows, each measured once."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..storage import write_file
from ..values.healing import read_loss
from ..values.loss import Loss
from .ranks import agree


class MeasuredLosses:
    """Losses in a file of the healing's job, so that a resumed healing measures none again.

    Of processes that are together all must ask for the same losses, in the same order.

    Args:
        file: where the losses are kept.
        given: losses that are known from elsewhere, by name.
    """

    def __init__(self, file: Path, given: Mapping[str, Loss]) -> None:
        self._file, self._given = file, given

    def get(self, name: str, measure: Callable[[], Loss]) -> Loss:
        """Look a loss up, or measure it and keep it.

        Args:
            name: tells it from the other losses of the job.
            measure: gives the loss, if it is not known.

        Returns:
            The loss.

        Raises:
            OutputError: the file cannot be written.
        """
        if name in self._given:
            return self._given[name]
        found = agree(lambda: self._known().get(name))
        if found is not None:
            loss: Loss = read_loss(found)
            return loss
        return self.keep(name, measure())

    def keep(self, name: str, loss: Loss) -> Loss:
        """Keep a loss that was measured.

        Args:
            name: tells it from the other losses of the job.
            loss: the loss.

        Returns:
            The loss, as the main process measured it.

        Raises:
            OutputError: the file cannot be written.
        """
        return agree(lambda: self._keep(name, loss))

    def _known(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._file.read_bytes()) if self._file.is_file() else {}
        return found

    def _keep(self, name: str, loss: Loss) -> Loss:
        write_file(self._file, json.dumps({**self._known(), name: loss.to_json()}).encode())
        return loss
