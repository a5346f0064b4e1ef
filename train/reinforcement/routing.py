"""Do the routers of the trainer choose the experts that the engine sent tokens to?

Two engines round differently, and where two experts are nearly tied a rounding decides: the token is computed by
another one, and log-probabilities move by far more than a rounding (reference 6.3). Told for tokens whose experts the
engine reported (`PackedBatch.expert_TLK`), in three groups: text tokens, image and video tokens, and those that a
sampled token was predicted from.

    routing_text_agreement       share of (token, layer) whose K experts are the same, in any order
    routing_text_agreement_min   in the layer where it is smallest
    routing_text_differing       share of tokens for which any layer differs
    routing_vision_...  routing_sampled_...

Where experts are replayed, it is what the routers would have chosen, layer by layer, for tokens that came the engine's
way until there; without, a token that went astray in one layer is another one in the next.

Shape letters:  T tokens   L sparse layers   K experts per token   G groups of tokens
"""

import torch
from torch import Tensor

from data.batch import PackedBatch
from ernie_model.config import ErnieConfig
from train.loop import Beside
from train.policy import Policy, PolicyOutput

GROUPS = ("text", "vision", "sampled")


def agreement(chosen_LTK: Tensor, engine_TLK: Tensor, member_GT: Tensor) -> Tensor:
    """float64 (G, 2 + L): of each group, tokens whose experts are known, those of them for which any layer differs, and
    in each layer those that agree. Sums, so that rows and ranks add up.

    Args:
        chosen_LTK: by the trainer's routers.
        engine_TLK: by the engine; -1 where not known.
        member_GT: bool, which tokens are in a group.
    """
    engine_LTK = engine_TLK.transpose(0, 1)
    same_LT = (chosen_LTK.sort(-1).values == engine_LTK.sort(-1).values).all(-1)
    known_T = (engine_LTK >= 0).all(-1).all(0)
    member_GT = (member_GT & known_T).double()
    differing_T = ~same_LT.all(0)
    about_NT = torch.cat([torch.ones_like(differing_T)[None], differing_T[None], same_LT])
    return member_GT @ about_NT.T.double()


class RoutingAgreement(Beside):
    """Args:
    policy: that trains; it is told to report its routers' choices.
    """

    def __init__(self, policy: Policy, config: ErnieConfig, device: torch.device):
        policy.wants_experts = True
        self.policy = policy
        self.vision_ids = torch.tensor(config.vision_pool_token_ids, dtype=torch.int64, device=device)
        self.num_layers, self.device = len(config.sparse_layers), device
        self.layers: dict[str, list[float]] = {}
        """Agreement in each sparse layer, by group, in the last update."""
        self._clear()

    def _clear(self) -> None:
        self._sums_GN = torch.zeros(len(GROUPS), 2 + self.num_layers, dtype=torch.float64, device=self.device)

    def before(self, microbatches: object) -> None:
        self._clear()

    @torch.no_grad()
    def terms(self, batch: PackedBatch, output: PolicyOutput) -> float:
        """Adds the tokens that this rank computed; there is nothing to minimise."""
        if output.chosen_LTK is not None and batch.expert_TLK is not None:
            first = self.policy.first_token(batch)
            here = slice(first, first + output.chosen_LTK.shape[1])
            vision_T = torch.isin(batch.token_T[here], self.vision_ids)
            member_GT = torch.stack([~vision_T, vision_T, batch.weight_T[here] > 0])
            self._sums_GN += agreement(output.chosen_LTK, batch.expert_TLK[here], member_GT)
        return 0.0

    def sums(self) -> Tensor | None:
        return self._sums_GN if self.num_layers else None

    def report(self, sums: Tensor) -> dict[str, float]:
        """Groups of which nothing is known are left out."""
        out: dict[str, float] = {}
        self.layers = {}
        for group, (tokens, differing, *same) in zip(GROUPS, sums.tolist(), strict=True):
            if tokens:
                self.layers[group] = [count / tokens for count in same]
                out[f"routing_{group}_agreement"] = sum(self.layers[group]) / self.num_layers
                out[f"routing_{group}_agreement_min"] = min(self.layers[group])
                out[f"routing_{group}_differing"] = differing / tokens
        return out
