"""Format of states files: the names in them, and what they remember."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import PositionsError
from ..values.identity import ModelIdentity, TextsIdentity
from ..values.plan import Rejection, positions_of
from ..values.positions import Positions
from ..values.schema import from_fields, of_type

FORMAT = "shallower.states.1"
"""The key of a states file's metadata."""

HIDDEN_STATES = "hidden_states"
"""The name of the tensor of states."""

SAMPLES = "samples"
"""The name of the tensor that numbers the samples, (samples,) int64."""

SEQUENCES = "sequences"
"""The name of the tensor that tells the sequence of every sample, (samples,) int64."""

DTYPES: Mapping[str, Any] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
"""Dtypes of states in a safetensors file, and how the core takes them."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Memory of a states file of the scan that wrote it.

    Attributes:
        model: the model that the states come from, if known.
        texts: the texts behind them.
        num_rejected: texts that never became states.
        rejections: the first of those, by name.
        positions: which tokens of the texts the samples are, if that is known.
    """

    model: ModelIdentity | None = None
    texts: tuple[TextsIdentity, ...] = ()
    num_rejected: int = 0
    rejections: tuple[Rejection, ...] = ()
    positions: Positions | None = None

    def to_json(self) -> str:
        """Give the origin as the metadata of a file holds it.

        Returns:
            JSON.
        """
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        """Read an origin from the metadata of a file.

        Args:
            text: JSON.

        Returns:
            The origin.

        Raises:
            ValueError, TypeError, KeyError, RecursionError, PositionsError: it is damaged;
                ``NO_ORIGIN`` has them all.
        """
        data = of_type(dict, json.loads(text))
        if not 0 <= of_type(int, data["num_rejected"]) < 2**31:
            raise ValueError(f"num_rejected is {data['num_rejected']}")
        return cls(
            None if data["model"] is None else from_fields(ModelIdentity, data["model"]),
            tuple(from_fields(TextsIdentity, texts) for texts in of_type(list, data["texts"])),
            data["num_rejected"],
            tuple(from_fields(Rejection, item) for item in of_type(list, data["rejections"])),
            positions_of(data["positions"]),
        )


NO_ORIGIN = (ValueError, TypeError, KeyError, RecursionError, PositionsError)
"""Raised where the metadata of a file holds no origin."""
