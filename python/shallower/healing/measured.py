"""The held-out losses that a healing knows, each measured once."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ..processes import is_main_process
from ..storage import write_file
from ..values.healing import read_loss
from ..values.loss import Loss


class MeasuredLosses:
    """Losses in a file of the healing's job, so that a resumed healing measures none again.

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
        known = json.loads(self._file.read_bytes()) if self._file.is_file() else {}
        if name in known:
            loss: Loss = read_loss(known[name])
            return loss
        loss = measure()
        if is_main_process():
            known[name] = loss.to_json()
            write_file(self._file, json.dumps(known).encode())
        return loss
