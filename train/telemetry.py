"""What a run shows beside its loss: losses by modality and dataset, and what the routers do, layer by layer.

    loss_text  loss_image  loss_video        mean over the target tokens of conversations with neither, with images,
                                             with videos (a conversation with both counts as video)
    loss_set_NAME                            of each dataset, where there are several
    router_text_drift  router_vision_drift   share of a fixed row's choices that are no longer those before training
    layer_text_entropy_03  ...               imbalance, dead, entropy, drift of each layer and pool, with each picture
    routing_text_000400.png                  the load of every expert in this update (train/heat_map.py)

Losses are added up on the device and travel with the step's other numbers. There is no number for padding: rows hold
conversations end to end, so every token that is computed is a token of the data.

Shape letters:  T tokens   S segments   G groups   L sparse layers   E experts of a pool   K experts per token
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.atomic import atomic_write
from ernie_model.config import ErnieConfig
from ernie_model.context import Packed
from ernie_model.model import ErnieModel
from ernie_model.moe import MoE, RouterStats, Routing
from train import heat_map
from train.loop import Beside
from train.policy import PolicyOutput

POOLS = ("text", "vision")
MODALITIES = ("text", "image", "video")


# ------------------------------------------------------------------------------------------ losses by what is learned


class SegmentLosses(Beside):
    """Mean negative log-likelihood per target token, by modality and by dataset.

    Args:
        datasets: every name that `PackedBatch.datasets` may hold; one name alone would repeat the loss.
    """

    def __init__(self, config: ErnieConfig, datasets: Sequence[str], device: torch.device):
        self.device = device
        self.image_id, self.video_id = config.image_token_id, config.video_token_id
        self.datasets = {name: len(MODALITIES) + i for i, name in enumerate(datasets)} if len(datasets) > 1 else {}
        self.keys = [f"loss_{name}" for name in (*MODALITIES, *plain_names(f"set_{name}" for name in self.datasets))]
        self._members: list[tuple[Tensor, Tensor]] = []
        self._sums_2G = torch.zeros(2, len(self.keys), dtype=torch.float64, device=device)

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        # On the host, where nobody waits for it; making a tensor from a list on a GPU would wait for all its work.
        self._members = [(batch.segment_T, self.members(batch)) for batch in microbatches]
        self._sums_2G = torch.zeros_like(self._sums_2G)

    def members(self, batch: PackedBatch) -> Tensor:
        """float64 (S, G): 1 where a segment belongs to a group."""
        member_SG = torch.zeros(batch.num_segments, len(self.keys), dtype=torch.float64)
        for segment, token_T in enumerate(batch.token_T.split(batch.lengths)):
            # A text model has no such tokens: comparing with None would be a plain False, not a tensor.
            has_video, has_image = (
                id is not None and bool((token_T == id).any()) for id in (self.video_id, self.image_id)
            )
            member_SG[segment, 2 if has_video else 1 if has_image else 0] = 1
            if self.datasets and (name := batch.datasets[segment]):  # a filler row comes from no dataset
                member_SG[segment, self.datasets[name]] = 1
        return member_SG

    @torch.no_grad()
    def terms(self, batch: PackedBatch, output: PolicyOutput) -> float:
        """Adds this micro-batch's sums; there is nothing to minimise."""
        segment_T, member_SG = (value.to(self.device, non_blocking=True) for value in self._members.pop(0))
        value_2T = torch.stack((-output.logprob_T * batch.weight_T, batch.weight_T.to(output.logprob_T.dtype))).double()
        value_2S = value_2T.new_zeros(2, batch.num_segments).index_add(1, segment_T, value_2T)
        self._sums_2G += value_2S @ member_SG
        return 0.0

    def sums(self) -> Tensor:
        return self._sums_2G

    def report(self, sums: Tensor) -> dict[str, float]:
        """Groups without a target in this update are left out."""
        return {key: loss / weight for key, loss, weight in zip(self.keys, *sums.tolist(), strict=True) if weight}


def plain_names(names: Any) -> list[str]:
    """Names that every tracker takes as a part of a key; those that become equal are numbered."""
    out: list[str] = []
    for name in names:
        base = plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)
        number = 1
        while plain in out:
            number += 1
            plain = f"{base}_{number}"
        out.append(plain)
    return out


# ------------------------------------------------------------------------------------------------ what the routers do


class RoutingRecord(Beside):
    """The routers' sums of the last update, and a probe of how far they have moved.

    Nothing is gathered over several updates, so that a resumed run records what an uninterrupted one does.

    Args:
        folder: of the run; pictures and the probe lie in its folder routing/. None on ranks that write nothing.
        every: updates between pictures, in any number of rhythms: that of evaluations, and one of their own; 0 is none.
        last: the update that is drawn whatever its number.
        step: where this start begins. Changes are counted from the first start in this folder.
        joint: a forward pass takes all ranks (`Layout.joint`), so those that write nothing run one beside the probe's.
    """

    def __init__(
        self,
        model: ErnieModel,
        folder: Path | None,
        *,
        every: Sequence[int] = (),
        last: int = 0,
        step: int = 0,
        joint: bool = False,
    ):
        self.model, self.every, self.last, self.new = model, every, last, step == 0
        sparse = any(isinstance(layer.mlp, MoE) for layer in model.layers)
        self.folder = folder / "routing" if folder is not None and sparse else None
        self.joint = joint and sparse
        self.batch: PackedBatch | None = None
        self.stats: RouterStats | None = None
        self.probe: Probe | None = None

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        self.stats = None
        if self.batch is not None or (self.folder is None and not self.joint):
            return
        self.batch = microbatches[0]
        path = None if self.folder is None else self.folder / "probe.safetensors"
        new = path is not None and (self.new or not path.exists())
        if self.joint:
            (new,) = broadcast_object_list([new])  # only the main rank can tell
        choice_LTK = choices(self.model, self.batch, join=self.joint) if new else None
        if path is not None:
            if choice_LTK is not None:
                Probe(self.batch, choice_LTK).save(path)
            self.probe = Probe.load(path)

    def after_update(self, optimizer: torch.optim.Optimizer, router: RouterStats | None) -> None:
        self.stats = router

    def due(self, step: int) -> bool:
        """By the number of the update alone: an evaluation that a stop has put off finds no routing to draw later."""
        return step == self.last or any(every and step % every == 0 for every in self.every)

    def publish(self, step: int, trackers: Sequence[Any]) -> None:
        """Draw the last update's routing, once, and hand pictures and numbers to the trackers."""
        stats, self.stats = self.stats, None
        if stats is not None and self.folder is None and self.joint and self.batch is not None:
            choices(self.model, self.batch, join=True)  # the main rank asks for its probe's
        if stats is None or self.folder is None:
            return
        drift_2L = None if self.probe is None else self.probe.drift(self.model, join=self.joint)
        self.folder.mkdir(parents=True, exist_ok=True)
        metrics: dict[str, float] = {}
        for index, pool in enumerate(POOLS):
            table = Layers.of(
                self.model.config.sparse_layers, stats, index, None if drift_2L is None else drift_2L[index]
            )
            if table is None:
                continue
            metrics |= table.metrics(pool)
            path = self.folder / f"routing_{pool}_{step:06d}.png"
            heat_map.draw(table, path, f"{pool} experts, step {step}")
            for tracker in trackers:
                tracker.log_image(f"routing_{pool}", path, step)
        for tracker in trackers:
            tracker.log(metrics, step)


class Layers(NamedTuple):
    """One pool's routing, a row for each sparse layer."""

    numbers: tuple[int, ...]
    """Of the layers, in the model."""
    share_LE: Tensor
    """Load of each expert over the mean load of its layer: 1 everywhere when even, 0 for an expert nobody chose."""
    entropy_L: Tensor
    """Of the router's softmax, as a share of the largest possible, log E."""
    drift_L: Tensor | None
    """Share of the probe's choices that have changed since training began; None where the probe has no such token."""

    @staticmethod
    def of(numbers: tuple[int, ...], stats: RouterStats, pool: int, drift_L: Tensor | None) -> "Layers | None":
        count_LE, token_L = stats.count_2E[:, pool], stats.token_2[:, pool]
        if not token_L.sum():
            return None
        largest = torch.tensor(float(count_LE.shape[1])).log()
        if drift_L is not None and drift_L.isnan().any():
            drift_L = None
        entropy_L = stats.entropy_2[:, pool] / token_L / largest
        return Layers(numbers, count_LE / count_LE.mean(1, keepdim=True), entropy_L, drift_L)

    def metrics(self, pool: str) -> dict[str, float]:
        columns = {
            "imbalance": self.share_LE.max(1).values,
            "dead": (self.share_LE == 0).sum(1),
            "entropy_share": self.entropy_L,
        }
        if self.drift_L is not None:
            columns["drift"] = self.drift_L
        out = {
            f"layer_{pool}_{name}_{layer:02d}": value
            for name, column in columns.items()
            for layer, value in zip(self.numbers, column.double().tolist(), strict=True)
        }
        return out if self.drift_L is None else {f"router_{pool}_drift": float(self.drift_L.mean()), **out}


class Probe(NamedTuple):
    """A row, and which experts its tokens chose before the first update."""

    batch: PackedBatch
    choice_LTK: Tensor

    def drift(self, model: ErnieModel, *, join: bool = False) -> Tensor:
        """(2, L): of the choices that text and vision tokens make now, the share they did not make then; NaN if none.

        The order of a token's K choices does not count.
        """
        now_LTK = choices(model, self.batch, join=join)
        kept_LT = (now_LTK[..., :, None] == self.choice_LTK[..., None, :]).any(-1).double().mean(-1)
        vision_T = torch.isin(self.batch.token_T, torch.tensor(model.config.vision_pool_token_ids, dtype=torch.int64))
        return torch.stack([1 - kept_LT[:, ~vision_T].mean(1), 1 - kept_LT[:, vision_T].mean(1)])

    def save(self, path: Path) -> None:
        batch = self.batch
        tensors = {"token_T": batch.token_T, "position_3T": batch.position_3T, "choice_LTK": self.choice_LTK}
        if batch.patch_PX is not None:
            tensors["patch_PX"] = batch.patch_PX
        # One entry: safetensors writes several in an order that differs between processes, and equal runs equal files.
        shape = {"shape": json.dumps({"lengths": batch.lengths, "stems": batch.stems, "grids": batch.grids})}
        atomic_write(path, save({key: value.contiguous() for key, value in tensors.items()}, shape))

    @staticmethod
    def load(path: Path) -> "Probe":
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            shape = json.loads(file.metadata()["shape"])
        choice_LTK = tensors.pop("choice_LTK")
        batch = PackedBatch(
            **tensors,
            target_T=torch.zeros_like(tensors["token_T"]),
            weight_T=torch.zeros(tensors["token_T"].shape),
            lengths=tuple(shape["lengths"]),
            stems=tuple(shape.get("stems", ())),  # a run that began before rows had them
            grids=tuple(tuple(grid) for grid in shape["grids"]),
        )
        return Probe(batch, choice_LTK)


@torch.no_grad()
def choices(model: ErnieModel, batch: PackedBatch, *, join: bool = False) -> Tensor:
    """int16 (L, T, K) on the host: the experts every token of the row visits, vision experts after text experts."""
    seen: list[Tensor] = []
    training = model.training
    batch = batch.to(model.head_VD.device)
    model.eval()  # adapters without dropout: the same model gives the same choices
    try:
        with _watched(model, seen):
            model(
                batch.token_T,
                batch.position_3T,
                Packed(batch.lengths, stems=batch.stems),
                patch_PX=batch.patch_PX,
                grids=batch.grids,
                join=join,
            )
    finally:
        model.train(training)
    return torch.stack(seen).to("cpu", torch.int16)


@contextmanager
def _watched(model: ErnieModel, seen: list[Tensor]):
    """While it lasts, every `MoE.route` also notes the choices it is given."""
    layers = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    originals = [layer.route for layer in layers]

    def watching(original: Callable[..., Tensor]):
        def route(x_TD: Tensor, routing: Routing, *rest: Any) -> Tensor:
            seen.append(routing.expert_TK)
            return original(x_TD, routing, *rest)

        return route

    for layer, original in zip(layers, originals, strict=True):
        layer.route = watching(original)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.route = original
