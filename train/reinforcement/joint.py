"""Sampling where every forward pass takes all ranks: experts that are shared out, weights that ZeRO-3 has cut up.

Attempts end at different times, pictures come up at different times, and a rank that has nothing to do may leave nobody
waiting. So before anything that others must take part in, a rank says what it wants, and all do the same thing:

    rank 0    pixels    run      run      over
    rank 1    run       run      over     over          what each wants next
              ──────    ───      ───      ────
              pixels    run      run      over          what all do: pixels first, then a step, over when all are
    rank 1    nothing's  its own  nothing's

Whoever did not want what is done takes part with a row of two tokens, or four patches, of nothing.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from ernie_model.context import Packed
from ernie_model.inference.request import MediaItem
from ernie_model.inference.runner import Row, Runner, StepOutput
from ernie_model.model import ErnieModel
from train.checkpoint import everyones
from train.parallel.partition import found_by_reading, whole


class Want(IntEnum):
    OVER = 0
    RUN = 1
    PIXELS = 2


Said = tuple[Want, bool, bool]
"""By one rank: what it wants, whether it has attempts left, whether it was asked to stop."""


class Meeting:
    """What all ranks do next.

    Args:
        nothing: of what is to be done, this rank's part when it did not ask for it.
        exchange: what every rank says, in order.
    """

    def __init__(
        self,
        nothing: Callable[[Want], None],
        exchange: Callable[[Said], list[Said]] = everyones,
    ):
        self._nothing, self._exchange = nothing, exchange

    def join(self, want: Want, alive: bool = True, stops: bool = False) -> tuple[bool, bool]:
        """Returns when all are ready for what this rank wants. With OVER: is one `alive`, was one told to stop?"""
        while True:
            said = self._exchange((want, alive, stops))
            most = max(one for one, _, _ in said)
            if most is want:
                return any(alive for _, alive, _ in said), any(stops for _, _, stops in said)
            self._nothing(Want(most))


class JointRunner(Runner):
    """The model itself, whose layers know of the other ranks; no copies of its weights, which may not be here."""

    def __init__(self, model: ErnieModel, *, num_pages: int, page_tokens: int, max_rows: int):
        super().__init__(model, num_pages=num_pages, page_tokens=page_tokens, max_rows=max_rows)
        self.meeting = Meeting(self._take_part)
        self._sees = model.vision is not None

    def _kernels(self, model: ErnieModel) -> ErnieModel:
        return model

    def media_features(self, media: Sequence[MediaItem]) -> list[Tensor]:
        if not media:
            return []
        self.meeting.join(Want.PIXELS)
        with found_by_reading(self.model):
            return super().media_features(media)

    def run(self, rows: Sequence[Row]) -> StepOutput:
        self.meeting.join(Want.RUN)
        with found_by_reading(self.model):
            return super().run(rows)

    def _logits(self, hidden_SD: Tensor) -> Tensor:
        with whole(self.model.head):
            return super()._logits(hidden_SD)

    @property
    def _joins(self) -> bool:
        return True

    @property
    def _no_features(self) -> Tensor:
        # Told that there are none, the model does not look for them: pixels are met about apart from steps.
        return torch.zeros(0, self.model.config.hidden_size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def _take_part(self, want: Want) -> None:
        with found_by_reading(self.model):
            self._compute_nothing(want)

    def _compute_nothing(self, want: Want) -> None:
        if want is Want.PIXELS:
            assert self.model.vision is not None
            patch_PX = torch.zeros(4, self.model.vision.config.patch_dim, device=self.device)
            self.model.media_features(patch_PX, [(1, 2, 2)])
            return
        token_T = torch.zeros(2, dtype=torch.int64, device=self.device)
        position_3T = torch.arange(2, device=self.device).expand(3, -1)
        hidden_TD = self.model(
            token_T, position_3T, Packed([2]), feature_MD=self._no_features, join=True, stats=False
        ).hidden_TD
        self._logits(hidden_TD[-1:])
