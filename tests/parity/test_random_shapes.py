"""Random architectures, grids and packings against transformers, in float64 to 1e-10."""

import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parity.measure import float64_errors
from tests.parity.reference import MODELS, VOCAB, Shape, _vl

half = st.integers(1, 3).map(lambda n: 2 * n)
images = st.tuples(st.just(1), half, half)
videos = st.tuples(half, half, half)


@st.composite
def shapes(draw) -> Shape:
    model_type = draw(st.sampled_from(sorted(MODELS)))
    keys = draw(st.integers(1, 3))
    spatial = draw(st.integers(1, 3))
    sections = (spatial, spatial, draw(st.integers(1, 4)))
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(1, 9))
    tied = draw(st.booleans())
    config = dict(
        vocab_size=VOCAB,
        hidden_size=draw(st.integers(8, 40)),
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=layers,
        num_attention_heads=keys * draw(st.integers(1, 4)),
        num_key_value_heads=keys,
        head_dim=2 * sum(sections),
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([100.0, 500000.0]))},
    )
    if model_type != "ernie4_5":
        config |= dict(
            moe_num_experts=experts,
            moe_k=draw(st.integers(1, min(experts, 6))),
            moe_num_shared_experts=draw(st.integers(0, 3)),
            moe_intermediate_size=draw(st.integers(1, 24)),
        )
    items = st.integers(1, 12)
    if model_type == "ernie4_5_moe":
        start = draw(st.integers(0, layers - 1))
        config |= dict(moe_layer_start_index=start, moe_layer_end_index=draw(st.integers(start, layers - 1)))
    if model_type == "ernie4_5_vl_moe":
        kinds = draw(st.lists(st.sampled_from(["dense", "sparse"]), min_size=layers, max_size=layers))
        config |= dict(
            moe_intermediate_size=[config["moe_intermediate_size"], draw(st.integers(1, 12))], mlp_layer_types=kinds
        )
        config = _vl(mrope_section=sections, depth=draw(st.integers(1, 2)), **_without_rope(config))
        items = st.one_of(items, images, videos)
    # Every conversation has a word to predict, and ends with one.
    row = st.lists(items, max_size=3).map(lambda row: (*row, 2))
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return Shape("random", model_type, config, tuple(rows))


def _without_rope(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "rope_parameters"}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(shape=shapes())
def test_any_shape_is_the_same_function(shape: Shape):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        errors = float64_errors(shape, Path(folder))
    assert max(errors.logits, errors.loss, errors.grads) <= 1e-10, errors
