"""How far engine and trainer disagree on the tokens that the engine sampled, and when that is too far.

With d = log p_old - log p_engine and k = exp(d), over the sampled tokens of an update whose log p_engine is known, of
attempts that were sampled for this rollout:

    mismatch_mean    mismatch_max      of |d|
    mismatch_p_mean  mismatch_p_max    of |p_old - p_engine|
    mismatch_k1      mismatch_k3       estimates of KL(engine || trainer): means of -d, and of k - 1 - d
    mismatch_chi2                      mean of k^2, - 1
    mismatch_ess                       (sum of k)^2 / (N sum of k^2): share of the tokens that k leaves in effect
    mismatch_ppl                       perplexity of the trainer over the engine's: exp of the mean of -d
    mismatch_low     mismatch_high     share of tokens with k outside of objective.band, whatever the correction does
    mismatch_masked                    their sum
    mismatch_unknown                   share of all sampled tokens whose log p_engine is nan
    ..._text  ..._image  ..._video     the same of attempts that saw neither, an image, a video; if there are several.
                                       An offset of one modality alone is a bug in how it is computed, not noise.
    ..._queued                         the same of attempts that waited in the queue. Older weights sampled them, so
                                       what has been learned since is in k, too; no limit goes by it.

A difference beyond 20 nats counts as 20. Reference 2.7.

Shape letters:  T tokens   S segments   G modalities, and attempts of the queue   M sums
"""

import math
from collections import deque
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.config import ErnieConfig
from train.config import UserError
from train.loop import Beside
from train.objectives.correction import LIMIT
from train.objectives.policy_gradient import gather_attempts
from train.objectives.policy_record import one_of_ranks
from train.policy import PolicyOutput
from train.rl_config import MismatchConfig, RLObjectiveConfig
from train.telemetry import MODALITIES

WINDOW = 20
"""Updates whose mean is compared with that of as many before them."""
NOISE = 1e-3
"""A mean difference, in nats, that nobody needs to hear of."""

QUEUED = "queued"
GROUPS = (*MODALITIES, QUEUED)
SUMS = ("known", "unknown", "d", "abs_d", "abs_p", "k", "square", "low", "high")


class Mismatch(Beside):
    """Goes last among what adds to the rows.

    Raises:
        UserError: at the begin of an update, on all ranks: the last ones were beyond `config.stop`.
    """

    def __init__(
        self, config: MismatchConfig, objective: RLObjectiveConfig, model: ErnieConfig, accelerator: Accelerator
    ):
        self.config, self.accelerator = config, accelerator
        self.bounds = objective.bounds
        self.media_ids = (model.image_token_id, model.video_token_id)
        self._beyond: dict[str, list[float]] = {}  # of each number, its values in the last updates if all are too large
        self._means: deque[float] = deque(maxlen=2 * WINDOW)
        self._told: set[str] = set()
        self._start()

    def _start(self) -> None:
        device = self.accelerator.device
        self._sums_MG = torch.zeros(len(SUMS), len(GROUPS), dtype=torch.float64, device=device)
        self._most_2G = torch.zeros(2, len(GROUPS), dtype=torch.float64, device=device)

    # --------------------------------------------------------------------------------------------- numbers of an update

    def before(self, microbatches: Sequence[PackedBatch]) -> None:
        for name, values in self._beyond.items():
            # The limit again: it may have been raised since the values were saved.
            if len(values) >= self.config.patience and min(values) > self.config.stop.get(name, math.inf):
                raise UserError(
                    f"engine and trainer disagree too much: mismatch_{name} was "
                    f"{', '.join(f'{value:.3g}' for value in values)} in the last {len(values)} updates, and "
                    f"mismatch.stop.{name} allows {self.config.stop[name]:g}. What is learned then is noise. Does the "
                    "engine run the same weights, sampling settings and precision? mismatch_*_image in metrics.jsonl "
                    "tells whether pictures alone are concerned. rollout.exact=true takes the difference away, "
                    "rollout.replay_experts=true most of it; to go on as it is, raise the limit."
                )
        self._start()

    @torch.no_grad()
    def terms(self, batch: PackedBatch, output: PolicyOutput) -> float:
        attempts = gather_attempts(output.logprob_T, batch)
        known_T = attempts.sampled_T & ~attempts.unknown_T
        d_T = torch.where(known_T, attempts.log_k_T, 0.0).clamp(-LIMIT, LIMIT)
        old_T = attempts.logprob_T - attempts.log_ratio_T
        p_T = torch.where(known_T & ~attempts.impossible_T, old_T.exp(), 0.0)
        k_T = d_T.exp()
        abs_p_T = (p_T * -torch.expm1(-d_T)).abs()
        low, high = self.bounds
        values = {
            "known": known_T,
            "unknown": attempts.unknown_T,
            "d": d_T,
            "abs_d": d_T.abs(),
            "abs_p": abs_p_T,
            "k": k_T,
            "square": k_T.square(),
            "low": d_T < (math.log(low) if low else -math.inf),
            "high": d_T > math.log(high),
        }
        member_TG = self.members(batch)[attempts.segment_T] * attempts.sampled_T[:, None]
        known_TG = member_TG * known_T[:, None]
        value_MT = torch.stack([values[name].double() for name in SUMS])
        self._sums_MG += torch.cat([value_MT[:1] @ known_TG, value_MT[1:2] @ member_TG, value_MT[2:] @ known_TG])
        most_2TG = torch.stack([d_T.abs(), abs_p_T])[:, :, None] * known_TG
        self._most_2G = torch.maximum(self._most_2G, most_2TG.amax(1))
        return 0.0

    def members(self, batch: PackedBatch) -> Tensor:
        """float64 (S, G): 1 for what an attempt saw, its prompt included; both images and videos count as video. One of
        the queue is in no other group."""
        segment_T, device = batch.segment_T, batch.token_T.device
        stem_S = torch.tensor(batch.stems or (-1,) * batch.num_segments, device=device)
        saw = []
        for media_id in self.media_ids:
            here_T = torch.zeros_like(segment_T) if media_id is None else (batch.token_T == media_id).long()
            count_S = here_T.new_zeros(batch.num_segments).index_add(0, segment_T, here_T)
            saw.append((count_S + count_S[stem_S] * (stem_S >= 0)) > 0)
        image_S, video_S = saw
        queued_S = torch.tensor(batch.waited or (0,) * batch.num_segments, device=device) > 0
        saw_SG = torch.stack([~image_S & ~video_S, image_S & ~video_S, video_S], 1) & ~queued_S[:, None]
        return torch.cat([saw_SG, queued_S[:, None]], 1).double()

    def sums(self) -> Tensor:
        return torch.cat([self._sums_MG.flatten(), one_of_ranks(self._most_2G, self.accelerator).flatten()])

    def report(self, sums: Tensor) -> dict[str, float]:
        split = self._sums_MG.numel()
        sums_MG = sums[:split].view(len(SUMS), len(GROUPS))
        most_2G = sums[split:].view(2, len(GROUPS), -1).amax(2)
        fresh = slice(len(MODALITIES))
        whole = numbers(sums_MG[:, fresh].sum(1), most_2G[:, fresh].amax(1))
        out = {f"mismatch_{name}": value for name, value in whole.items()}
        seen = [index for index, group in enumerate(GROUPS) if group != QUEUED and sums_MG[:2, index].sum()]
        for index in [*(seen if len(seen) > 1 else ()), GROUPS.index(QUEUED)]:
            own = numbers(sums_MG[:, index], most_2G[:, index])
            out |= {f"mismatch_{name}_{GROUPS[index]}": value for name, value in own.items()}
        self._watch(out)
        return out

    # ---------------------------------------------------------------------------------------------------------- too far

    def _watch(self, metrics: dict[str, float]) -> None:
        for name, limit in self.config.stop.items():
            value = metrics.get(f"mismatch_{name}")
            if value is None:
                continue
            before = self._beyond.get(name, [])
            self._beyond[name] = [*before, value][-self.config.patience :] if value > limit else []
        if "mismatch_mean" in metrics:
            self._means.append(metrics["mismatch_mean"])

    def warnings(self, metrics: dict[str, float]) -> list[str]:
        """Of what is too large, once, and again when it was smaller in between."""
        out = []
        for name, limit in self.config.warn.items():
            value = metrics.get(f"mismatch_{name}")
            if value is None:
                continue
            if value <= limit:
                self._told.discard(name)
            elif name not in self._told:
                self._told.add(name)
                stop = self.config.stop.get(name)
                ends = "" if stop is None else f" The run stops when it stays above mismatch.stop.{name}={stop:g}."
                out.append(
                    f"engine and trainer disagree: mismatch_{name} is {value:.3g}, and mismatch.warn.{name} "
                    f"{limit:g}.{ends} Does the engine run the same weights, sampling settings and precision?"
                )
        if len(self._means) == 2 * WINDOW and "rise" not in self._told:
            before, now = list(self._means)[:WINDOW], list(self._means)[WINDOW:]
            if sum(now) > self.config.rise * sum(before) and sum(now) / WINDOW > NOISE:
                self._told.add("rise")
                out.append(
                    f"engine and trainer drift apart: mismatch_mean was {sum(before) / WINDOW:.3g} over {WINDOW} "
                    f"updates and {sum(now) / WINDOW:.3g} over the {WINDOW} after them. Runs that collapse show it "
                    "first. A lower optim.lr, rollout.replay_experts=true or rollout.exact=true hold it down."
                )
        return out

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint, JSON-able."""
        return {"beyond": self._beyond, "means": list(self._means), "told": sorted(self._told)}

    def load_state_dict(self, state: dict) -> None:
        self._beyond = state["beyond"]
        self._means.extend(state["means"])
        self._told = set(state["told"])


def numbers(sums_M: Tensor, most_2: Tensor) -> dict[str, float]:
    of = dict(zip(SUMS, sums_M.tolist(), strict=True))
    count, sampled = of["known"], of["known"] + of["unknown"]
    if not sampled:
        return {}
    out = {"unknown": of["unknown"] / sampled}
    if not count:
        return out
    mean = of["d"] / count
    return out | {
        "mean": of["abs_d"] / count,
        "max": float(most_2[0]),
        "p_mean": of["abs_p"] / count,
        "p_max": float(most_2[1]),
        "k1": -mean,
        "k3": (of["k"] - count) / count - mean,
        "chi2": of["square"] / count - 1,
        "ess": of["k"] ** 2 / (count * of["square"]),
        "ppl": math.exp(-mean),
        "low": of["low"] / count,
        "high": of["high"] / count,
        "masked": (of["low"] + of["high"]) / count,
    }
