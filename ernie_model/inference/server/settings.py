"""What a server allows."""

from dataclasses import dataclass, field

from ernie_model.inference.moderation import Moderation
from ernie_model.inference.request import SamplingParams
from ernie_model.inference.tools import Limits as AgentLimits
from ernie_model.inference.tools import ToolBox


@dataclass(frozen=True, kw_only=True)
class Limits:
    concurrency: int = 64
    """Requests read, prepared and answered at once."""
    queue: int = 256
    """Requests that wait for that, their bodies unread; more are refused (429)."""
    body_bytes: int = 64 * 2**20
    images: int = 16
    """Images of one request."""
    videos: int = 2
    """Videos of one request."""
    pixels: int = 64_000_000
    """Of all images of one request together, before any resizing; a decoded pixel takes 3 bytes."""
    new_tokens: int = 32768
    """Of one answer."""
    attempts: int = 16
    """`n`."""
    time_s: float = 600.0
    """From a request's first byte to the last one of its answer."""
    lag_s: float = 30.0
    """A client that takes nothing for so long is cancelled."""
    lag_tokens: int = 16384
    """So is one for whom so many pieces of a stream wait."""
    workers: int = 2
    """Threads that decode images and tokenise."""


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
