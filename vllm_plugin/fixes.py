"""Defects of vLLM 0.32 that change what ERNIE-4.5 computes, or end it, and their repair.

    name         where        without it
    delimiters   any device   IMAGE_START or IMAGE_END goes to the text experts when it is scheduled apart from its
                              image: with chunked prefill, and where a cached prefix ends at the image. Silent.
    vision_eps   any device   Norms of the vision tower use the language model's epsilon, 1e-5 for 1e-6. Silent.
    router       CPU          The correction bias of the routers is ignored. Silent.
    rotary       CPU          TypeError in the first forward pass of a vision-language model.
    experts      CPU          A weight update leaves the experts in the wrong order in memory. Silent.
    tied_head    CPU          After a weight update, a tied head still multiplies by the old embedding. Silent.
    seeds        CPU          The server dies of a request with a seed whose prompt is computed in several steps: a long
                              one, or one of several that are computed anew after a weight update.

Fixes for the CPU reach into details of one version and are applied to 0.32 alone; the others wherever what they replace
is there. tests/vllm shows for each that vLLM without it gives another answer.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

CPU_VERSIONS = re.compile(r"0\.32(\.|\+|$)")
MODEL = "vllm.model_executor.models.ernie45_vl"
LAYERS = "vllm.model_executor.layers"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


class Fix(NamedTuple):
    apply: Callable[[], None]
    cpu_only: bool
    replaces: tuple[str, ...]
    """module:Class.attribute"""


def why_not(fix: Fix) -> str | None:
    """The reason to leave vLLM alone; None if the fix belongs here."""
    if fix.cpu_only:
        from vllm.platforms import current_platform
        from vllm.version import __version__

        if not current_platform.is_cpu():
            return "this is not a CPU"
        if not CPU_VERSIONS.match(__version__):
            return f"it was made for vLLM 0.32, and this is {__version__}"
    for path in fix.replaces:
        try:
            find(path)
        except (ImportError, AttributeError) as error:
            return f"{path} is not there ({error})"
    return None


def find(path: str) -> Any:
    module, _, attributes = path.partition(":")
    value = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value


def delimiters() -> None:
    model = find(f"{MODEL}:Ernie4_5_VLMoeForConditionalGeneration")
    stock = model.embed_input_ids

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        out = stock(self, input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        if self.visual_token_mask is None:
            self._set_visual_token_mask(input_ids)
            # A mask of text alone would make every layer look at it, and wait for the device.
            if self.visual_token_mask is not None and not self.visual_token_mask.any():
                self.visual_token_mask = None
        return out

    model.embed_input_ids = embed_input_ids


def vision_eps() -> None:
    tower = find(f"{MODEL}:Ernie4_5_VisionTransformer")
    stock = tower.__init__

    def __init__(self, vision_config, norm_eps=1e-6, *args, **kwargs):
        stock(self, vision_config, 1e-6, *args, **kwargs)

    tower.__init__ = __init__


def router() -> None:
    import torch

    cpu_router = find(f"{LAYERS}.fused_moe.router.cpu_router:CPURouter")
    stock = cpu_router._compute_routing

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        plain = not self.use_grouped_topk and self.custom_routing_function is None and self.scoring_func == "softmax"
        if self.e_score_correction_bias is None or not plain:
            return stock(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        # Experts are chosen by probability + bias and weighted by probability.
        probability = router_logits.float().softmax(dim=-1)
        chosen = (probability + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1, sorted=False).indices
        weight = probability.gather(-1, chosen)
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return (weight * self.routed_scaling_factor).contiguous(), chosen.to(torch.int32).contiguous()

    cpu_router._compute_routing = _compute_routing


def rotary() -> None:
    embedding = find(f"{LAYERS}.rotary_embedding.ernie45_vl_rope:Ernie4_5_VLRotaryEmbedding")

    def forward_cpu(self, positions, query, key=None, offsets=None):
        return self.forward_native(positions, query, key)

    embedding.forward_cpu = forward_cpu


def experts() -> None:
    method = find(f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod")
    stock = method._setup_kernel

    def _setup_kernel(self, layer, w13, w2):
        is_update = self.moe_kernel is not None
        stock(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    method._setup_kernel = _setup_kernel


def tied_head() -> None:
    import torch

    method = find(f"{LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod")

    def process_weights_after_loading(self, layer):
        layer.cpu_linear = torch.nn.functional.linear  # no packed copy that could grow old

    method.process_weights_after_loading = process_weights_after_loading


def seeds() -> None:
    """A token is sampled after each part of a prompt, and left out but for the last one. vLLM then turns the random
    numbers back by setting an offset, which those of the CPU do not have."""
    runner = find(RUNNER)
    stock_sample, stock_sync = runner._sample, runner._bookkeeping_sync

    def left_out(self):
        mask = self.discard_request_mask.np
        return {index: one for index, one in self.input_batch.generators.items() if mask[index]}

    def _sample(self, *args, **kwargs):
        states = [(generator, generator.get_state()) for generator in left_out(self).values()]
        out = stock_sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return out

    def _bookkeeping_sync(self, *args, **kwargs):
        everyones, out = self.input_batch.generators, left_out(self)
        self.input_batch.generators = {index: one for index, one in everyones.items() if index not in out}
        try:
            return stock_sync(self, *args, **kwargs)
        finally:
            self.input_batch.generators = everyones

    runner._sample, runner._bookkeeping_sync = _sample, _bookkeeping_sync


FIXES = {
    "delimiters": Fix(
        delimiters,
        False,
        (
            f"{MODEL}:Ernie4_5_VLMoeForConditionalGeneration.embed_input_ids",
            f"{MODEL}:Ernie4_5_VLMoeForConditionalGeneration._set_visual_token_mask",
        ),
    ),
    "vision_eps": Fix(vision_eps, False, (f"{MODEL}:Ernie4_5_VisionTransformer",)),
    "router": Fix(router, True, (f"{LAYERS}.fused_moe.router.cpu_router:CPURouter._compute_routing",)),
    "rotary": Fix(rotary, True, (f"{LAYERS}.rotary_embedding.ernie45_vl_rope:Ernie4_5_VLRotaryEmbedding",)),
    "experts": Fix(
        experts, True, (f"{LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",)
    ),
    "tied_head": Fix(
        tied_head,
        True,
        (f"{LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.process_weights_after_loading",),
    ),
    "seeds": Fix(seeds, True, (f"{RUNNER}._sample", f"{RUNNER}._bookkeeping_sync")),
}
