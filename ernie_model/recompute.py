"""What a layer leaves behind for the backward pass: the seams `ErnieModel.run_layer` and `VisionTower.run_block`.

    keep_activations    everything that its operators ask for                  fastest
    recompute           its input; the rest is computed again                  a third more time
    recompute_offload   nothing on the GPU: its input waits in host memory     and a copy each way

All three give the same gradients to the last bit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

Runner = Callable[..., Any]
"""(layer, *arguments) → layer(*arguments)"""


def keep_activations(layer: nn.Module, *arguments: Any) -> Any:
    return layer(*arguments)


def recompute(layer: nn.Module, *arguments: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(layer, *arguments, use_reentrant=False)


def recompute_offload(layer: nn.Module, *arguments: Any) -> Any:
    """Tensors on the CPU stay where they are. Only tensors among `arguments` themselves move, none inside tuples."""
    learns = any(p.requires_grad for p in layer.parameters())
    if not learns and not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return layer(*arguments)  # nothing will ask for the input again: spare the copy
    # Inside the layer checkpoint's own hooks lie on top of these, so that these see its inputs only.
    with saved_tensors_hooks(_to_host, _to_device):
        return recompute(layer, *arguments)


class _OnHost(NamedTuple):
    host: Tensor
    device: torch.device
    copied: torch.cuda.Event


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _to_host(x: Tensor) -> Tensor | _OnHost:
    """Copy on a stream of its own, while the layer already computes."""
    if not x.is_cuda:
        return x
    if x.device not in _streams:
        _streams[x.device] = torch.cuda.Stream(x.device)
    stream, copied = _streams[x.device], torch.cuda.Event()
    host = torch.empty_like(x, device="cpu", pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not given away before the copy is done
    copied.record(stream)
    return _OnHost(host, x.device, copied)


def _to_device(kept: Tensor | _OnHost) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    torch.cuda.current_stream(kept.device).wait_event(kept.copied)
    return kept.host.to(kept.device, non_blocking=True)
