"""Changes the dtype of a checkpoint."""

import torch
from torch import Tensor

from .checkpoint import architecture_of, check_checkpoint, config_from_json
from .source import Source
from .target import Piece


class Cast:
    """A DeepSeek-V2 checkpoint with every tensor in `dtype`, or as stored without one: `config` and `pieces`.

    Raises ValueError if the source does not fit its config, or holds a number beyond the range of `dtype`.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None):
        self.source, self.dtype = source, dtype
        self.config = config_from_json(source.config, source.folder)
        problems = check_checkpoint(source.folder, self.config).problems
        if problems:
            raise ValueError(f"{source.folder} does not fit its config.json: {problems[0]} (inspect lists all).")
        self.config.architectures = [architecture_of(self.config)]
        self.config.dtype = dtype or self.config.dtype

    def pieces(self) -> list[Piece]:
        return [self._piece(name) for name in self.source.tensors]

    def _piece(self, name: str) -> Piece:
        unchanged, dtype = self.source.piece(name), self.dtype
        if dtype is None or dtype == unchanged.dtype:
            return unchanged

        def make() -> Tensor:
            tensor = unchanged.make().to(dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds numbers beyond the range of {dtype}; choose bfloat16 or float32.")
            return tensor

        return unchanged._replace(dtype=dtype, make=make)
