"""What a server allows."""

from dataclasses import dataclass, field

from ernie_model.inference.moderation import Moderation
from ernie_model.inference.request import SamplingParams
from ernie_model.inference.tools import Limits as AgentLimits
from ernie_model.inference.tools import ToolBox


@dataclass(kw_only=True)
class Limits:
    """What a server allows one client, and all of them together.

    Raises:
        ValueError: a value outside its range; it is named as on the command line.
    """

    concurrency: int = 64
    """Requests read, prepared and answered at once."""
    queue: int = 256
    """Requests that wait for that, their bodies unread; more are refused (429)."""
    body_mib: float = 64.0
    images: int = 16
    """Images of one request."""
    videos: int = 2
    """Videos of one request."""
    megapixels: float = 64.0
    """Of all images of one request together, before any resizing; a megapixel takes 3 MB."""
    new_tokens: int = 32768
    """Of one answer."""
    attempts: int = 16
    """Answers to one request (`n`)."""
    time_s: float = 600.0
    """From a request's first byte to the last one of its answer."""
    lag_s: float = 30.0
    """A client that takes nothing of its answer for so long is cancelled."""
    lag_tokens: int = 16384
    """So is one for whom so many pieces of a stream wait."""
    workers: int = 2
    """Threads that decode images and tokenise."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in ("queue", "images", "videos"):
                holds, rule = value >= 0, "0 or more"
            elif isinstance(value, float):
                holds, rule = 0 < value < float("inf"), "more than 0, and finite"
            else:
                holds, rule = value >= 1, "1 or more"
            if not holds:
                raise ValueError(f"limits.{name} is {value}; it must be {rule}.")

    @property
    def body_bytes(self) -> int:
        return int(self.body_mib * 2**20)

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    name: str
    """What clients call the model."""
    keys: tuple[str, ...] = ()
    """Any of them lets in; none: everybody may."""
    limits: Limits = field(default_factory=Limits)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """What holds where a request says nothing else."""
    moderation: Moderation = field(default_factory=Moderation)
    """Filters of what is asked and of what is answered."""
    toolbox: ToolBox = field(default_factory=lambda: ToolBox(()))
    """Tools that the server runs, for requests that bring none of their own."""
    agent: AgentLimits = field(default_factory=AgentLimits)
    """What an answer with them may take."""
    thinking: bool = False
    """Does an answer begin with a thought where a request does not say?"""
