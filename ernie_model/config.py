"""Model configuration: one frozen dataclass for the whole family.

`ErnieConfig` reads and writes `config.json` in every form the family is published in:

    model_type            form     what it is
    ernie4_5              flat     dense text (0.3B)
    ernie4_5_moe          flat     text mixture of experts (21B-A3B, 300B-A47B)
    ernie4_5_vl_moe       nested   vision-language, as transformers writes it (text_config, vision_config)
    ernie4_5_moe_vl       flat     vision-language, as Baidu publishes it; read only, written as the nested form

Source: reference section 1 (configuration table, flat to nested mapping).
"""

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

MODEL_TYPES = ("ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_moe_vl")


class ConfigError(ValueError):
    """A config.json that this suite cannot honour exactly."""


class PositionAfterVideo(Enum):
    """Where the text that follows an image or video continues (reference trap 7.1).

    The two rules agree for images and for clips with t/2 <= max(h, w)/2 frame pairs; they differ for longer clips.
    """

    SPATIAL = "spatial"
    """Advance by max(h, w) / 2, ignoring time. What transformers does."""
    LAST = "last"
    """Advance to the largest position used so far, plus 1. What Baidu's FastDeploy and vLLM do."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower and the resampler that follows it."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_merge_size: int = 2
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"vision_config.hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})."
            )
        if (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"vision_config: the head width {self.hidden_size // self.num_heads} must be a multiple of 4, so that "
                "rows and columns get the same number of rotary frequencies."
            )
        if self.spatial_merge_size != 2 or self.temporal_merge_size != 2:
            raise ConfigError(
                f"vision_config: spatial_merge_size={self.spatial_merge_size}, temporal_merge_size="
                f"{self.temporal_merge_size}; every released model uses 2 and 2 and nothing else is implemented."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch (X)."""
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class ErnieConfig:
    """Dense text, mixture-of-experts text, or vision-language: the same fields, some of them zero or None."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    """Width of the dense MLP in layers that have no experts."""
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    tie_word_embeddings: bool = True
    use_bias: bool = False
    initializer_range: float = 0.02

    num_experts: int = 0
    """Experts in each pool (E); 0 in a dense model."""
    experts_per_token: int = 0
    """Experts each token visits in its own pool (K)."""
    text_expert_width: int = 0
    vision_expert_width: int = 0
    """0 in a text-only model: there is no vision pool."""
    num_shared_experts: int = 0
    """The shared MLP is this many times `text_expert_width` wide; 0 means there is none."""
    sparse_layers: tuple[int, ...] = ()
    """Indices of the layers that hold experts, ascending."""
    moe_norm_min: float = 1e-12
    router_aux_loss_coef: float = 0.001
    """Carried through to config.json for transformers; our balance losses are configured in objective/."""

    mrope_section: tuple[int, int, int] | None = None
    """Rotary frequencies for height, width, time; None in text-only models."""
    vision: VisionConfig | None = None
    image_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    video_token_id: int | None = None
    video_start_token_id: int | None = None
    video_end_token_id: int | None = None
    position_after_video: PositionAfterVideo = PositionAfterVideo.SPATIAL

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
        if self.sparse_layers and not 1 <= self.experts_per_token <= self.num_experts:
            raise ConfigError(
                f"moe_k is {self.experts_per_token}; it must be between 1 and moe_num_experts ({self.num_experts})."
            )
        outside = [layer for layer in self.sparse_layers if not 0 <= layer < self.num_hidden_layers]
        if outside:
            raise ConfigError(f"layers {outside} are marked sparse, but the model has {self.num_hidden_layers} layers.")
        if self.vision is not None:
            if self.mrope_section is None:
                raise ConfigError("a vision-language model needs mrope_section, e.g. [22, 22, 20].")
            if sum(self.mrope_section) != self.head_dim // 2:
                raise ConfigError(
                    f"mrope_section {list(self.mrope_section)} adds up to {sum(self.mrope_section)}; it must add up to "
                    f"head_dim / 2 = {self.head_dim // 2}."
                )
            if self.mrope_section[0] != self.mrope_section[1]:
                raise ConfigError(
                    f"mrope_section {list(self.mrope_section)}: height and width alternate over the first frequencies, "
                    "so their shares must be equal."
                )
            missing = [name for name in MEDIA_TOKEN_FIELDS if getattr(self, name) is None]
            if missing:
                raise ConfigError(f"a vision-language model needs the token ids {missing}.")
            if self.sparse_layers and self.vision_expert_width <= 0:
                raise ConfigError("a vision-language mixture of experts needs a vision expert width above 0.")

    # ---------------------------------------------------------------------------------------------- derived values

    @property
    def model_type(self) -> str:
        if self.vision is not None:
            return "ernie4_5_vl_moe"
        return "ernie4_5_moe" if self.sparse_layers else "ernie4_5"

    @property
    def vision_pool_token_ids(self) -> tuple[int, ...]:
        """Tokens that visit the vision experts: placeholders and start/end tokens (reference 2.9, trap 7.4)."""
        if self.vision is None:
            return ()
        return tuple(sorted({getattr(self, name) for name in MEDIA_TOKEN_FIELDS}))

    @property
    def placeholder_token_ids(self) -> tuple[int, ...]:
        """Tokens whose embedding is replaced by an image or video feature."""
        if self.vision is None:
            return ()
        assert self.image_token_id is not None and self.video_token_id is not None
        return tuple(sorted({self.image_token_id, self.video_token_id}))

    # ------------------------------------------------------------------------------------------------ config.json

    @classmethod
    def load(cls, path: str | Path) -> "ErnieConfig":
        """Read `config.json`, given the file or the folder that holds it."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; a checkpoint folder holds a config.json.")
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        try:
            return cls.from_json(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ErnieConfig":
        """Build from the dictionary in a config.json of any of `MODEL_TYPES`.

        Raises:
            ConfigError: unknown `model_type`, a missing key, or a setting that is not implemented.
        """
        model_type = raw.get("model_type")
        readers = {
            "ernie4_5": _read_text,
            "ernie4_5_moe": _read_text,
            "ernie4_5_vl_moe": _read_nested_vl,
            "ernie4_5_moe_vl": _read_flat_vl,
        }
        if model_type not in readers:
            raise ConfigError(f"model_type is {model_type!r}; this suite knows {', '.join(MODEL_TYPES)}.")
        try:
            return readers[model_type](raw)
        except KeyError as error:
            raise ConfigError(f"key {error.args[0]!r} is missing from a {model_type} configuration.") from error

    def to_json(self) -> dict[str, Any]:
        """The dictionary transformers expects in config.json (nested for vision-language models)."""
        return _write_vl(self) if self.vision is not None else _write_text(self)

    def to_flat_json(self) -> dict[str, Any]:
        """The flat dictionary of Baidu's own repositories, which vLLM reads (reference 1.4).

        Raises:
            ConfigError: a text-only model, which has one form, or sparse layers that are no range.
        """
        return _write_flat_vl(self)

    def replace(self, **changes: Any) -> "ErnieConfig":
        return dataclasses.replace(self, **changes)


MEDIA_TOKEN_FIELDS = (
    "image_token_id",
    "image_start_token_id",
    "image_end_token_id",
    "video_token_id",
    "video_start_token_id",
    "video_end_token_id",
)
ARCHITECTURES = {
    "ernie4_5": "Ernie4_5ForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration",
}
RELEASED_MROPE_SECTION = (22, 22, 20)
# Token ids of the released vision-language models (reference 1.3): the flat configuration names only `im_patch_id`.
RELEASED_MEDIA_TOKEN_IDS = {
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
    "video_token_id": 103367,
}


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) else value


def _refuse(raw: dict[str, Any], where: str) -> None:
    """Settings that exist in configuration files but that no released model uses and this model does not compute."""
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{where}hidden_act is {act!r}; only 'silu' is implemented.")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "ernie_3d", "3d", "mrope"):
        raise ConfigError(f"{where}rope_type is {kind!r}; only the family's own rotary positions are implemented.")
    if raw.get("moe_gate_act", "softmax") != "softmax":
        raise ConfigError(f"{where}moe_gate_act is {raw['moe_gate_act']!r}; the family routes by softmax.")


def _common(raw: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Fields that every form spells the same way."""
    _refuse(raw, where)
    heads = raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return dict(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=_head_dim(raw),
        intermediate_size=raw["intermediate_size"],
        max_position_embeddings=raw.get("max_position_embeddings", 131072),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 500000.0),
        use_bias=raw.get("use_bias", False),
        initializer_range=raw.get("initializer_range", 0.02),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        bos_token_id=raw.get("bos_token_id", 1),
        eos_token_id=_first(raw.get("eos_token_id", 2)),
        pad_token_id=raw.get("pad_token_id", 0),
    )


def _head_dim(raw: dict[str, Any]) -> int:
    """A dense configuration that leaves it out means 128, not hidden / heads (trap 7.23); null means the latter."""
    default = 128 if raw.get("model_type") == "ernie4_5" else None
    return raw.get("head_dim", default) or raw["hidden_size"] // raw["num_attention_heads"]


def _experts(raw: dict[str, Any]) -> dict[str, Any]:
    return dict(
        num_experts=_first(raw["moe_num_experts"]),
        experts_per_token=raw["moe_k"],
        num_shared_experts=raw.get("moe_num_shared_experts") or 0,
        moe_norm_min=raw.get("moe_norm_min", 1e-12),
        router_aux_loss_coef=raw.get("router_aux_loss_coef", 0.001),
    )


def _layers_from_range(raw: dict[str, Any]) -> tuple[int, ...]:
    """Indices of sparse layers from start, end and interval; per-modality lists use their extremes (trap 7.22)."""
    layers = raw["num_hidden_layers"]
    start, end = raw.get("moe_layer_start_index", 1), raw.get("moe_layer_end_index", -1)
    start = min(start) if isinstance(start, list | tuple) else start
    end = max(end) if isinstance(end, list | tuple) else end
    end = layers - 1 if end == -1 else end
    interval = raw.get("moe_layer_interval", 1)
    return tuple(i for i in range(layers) if (i + 1) % interval == 0 and start <= i <= end)


def _read_text(raw: dict[str, Any]) -> ErnieConfig:
    fields = _common(raw)
    if raw["model_type"] == "ernie4_5":
        return ErnieConfig(**fields)
    sparse = _layers_from_range(raw)
    if not sparse:
        raise ConfigError("moe_layer_start_index, _end_index and _interval leave no layer with experts.")
    return ErnieConfig(
        **fields, **_experts(raw), text_expert_width=_first(raw["moe_intermediate_size"]), sparse_layers=sparse
    )


def _read_nested_vl(raw: dict[str, Any]) -> ErnieConfig:
    text, vision = raw["text_config"], raw["vision_config"]
    fields = _common(text, "text_config.")
    # transformers reads the tie from both levels; the top level wins when only it is given (trap 7.28).
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    kinds = text.get("mlp_layer_types") or ["dense"] + ["sparse"] * (text["num_hidden_layers"] - 1)
    widths = text["moe_intermediate_size"]
    rope = text.get("rope_parameters") or {}
    return ErnieConfig(
        **fields,
        **_experts(text),
        text_expert_width=widths[0],
        vision_expert_width=widths[1],
        sparse_layers=tuple(i for i, kind in enumerate(kinds) if kind == "sparse"),
        mrope_section=_section(rope),
        vision=_read_vision(vision, merge=vision),
        image_token_id=raw["image_token_id"],
        image_start_token_id=raw["image_start_token_id"],
        image_end_token_id=raw["image_end_token_id"],
        video_token_id=raw["video_token_id"],
        video_start_token_id=raw["video_start_token_id"],
        video_end_token_id=raw["video_end_token_id"],
        position_after_video=PositionAfterVideo(raw.get("position_after_video", "spatial")),
    )


def _read_flat_vl(raw: dict[str, Any]) -> ErnieConfig:
    experts = raw["moe_num_experts"]
    if isinstance(experts, list) and len(set(experts)) != 1:
        raise ConfigError(f"moe_num_experts is {experts}; both pools must have the same number of experts.")
    widths = raw["moe_intermediate_size"]
    merge = {
        "spatial_merge_size": raw.get("spatial_conv_size", 2),
        "temporal_merge_size": raw.get("temporal_conv_size", 2),
    }
    ids = {name: raw.get(name, default) for name, default in RELEASED_MEDIA_TOKEN_IDS.items()}
    return ErnieConfig(
        **_common(raw),
        **_experts(raw),
        text_expert_width=widths[0],
        vision_expert_width=widths[1],
        sparse_layers=_layers_from_range(raw),
        mrope_section=_section(raw.get("rope_scaling") or {}),
        vision=_read_vision(raw["vision_config"], merge=merge),
        image_token_id=raw["im_patch_id"],
        **ids,
        position_after_video=PositionAfterVideo(raw.get("position_after_video", "spatial")),
    )


def _section(rope: dict[str, Any]) -> tuple[int, int, int]:
    height, width, time = rope.get("mrope_section") or RELEASED_MROPE_SECTION
    return height, width, time


def _read_vision(raw: dict[str, Any], merge: dict[str, Any]) -> VisionConfig:
    hidden = raw.get("hidden_size") or raw["embed_dim"]
    if (act := raw.get("hidden_act", "quick_gelu")) != "quick_gelu":
        raise ConfigError(f"vision_config.hidden_act is {act!r}; only 'quick_gelu' is implemented.")
    return VisionConfig(
        depth=raw["depth"],
        hidden_size=hidden,
        num_heads=raw["num_heads"],
        intermediate_size=raw.get("intermediate_size") or int(hidden * raw.get("mlp_ratio", 4)),
        in_channels=raw.get("in_channels", 3),
        patch_size=raw.get("patch_size", 14),
        spatial_merge_size=merge.get("spatial_merge_size", 2),
        temporal_merge_size=merge.get("temporal_merge_size", 2),
        layer_norm_eps=raw.get("rms_norm_eps", 1e-6),
    )


def _write_base(config: ErnieConfig) -> dict[str, Any]:
    return dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act="silu",
        use_bias=config.use_bias,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _write_experts(config: ErnieConfig) -> dict[str, Any]:
    return dict(
        moe_num_experts=config.num_experts,
        moe_k=config.experts_per_token,
        moe_num_shared_experts=config.num_shared_experts,
        moe_norm_min=config.moe_norm_min,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )


def _write_text(config: ErnieConfig) -> dict[str, Any]:
    out: dict[str, Any] = dict(
        model_type=config.model_type, architectures=[ARCHITECTURES[config.model_type]], **_write_base(config)
    )
    out["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.sparse_layers:
        out |= _write_experts(config) | dict(moe_intermediate_size=config.text_expert_width)
        out |= _range_from_layers(config)
    return out


def _range_from_layers(config: ErnieConfig) -> dict[str, int]:
    sparse = list(config.sparse_layers)
    interval = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    keys = dict(moe_layer_start_index=sparse[0], moe_layer_end_index=sparse[-1], moe_layer_interval=interval)
    if list(_layers_from_range({"num_hidden_layers": config.num_hidden_layers} | keys)) != sparse:
        raise ConfigError(f"sparse_layers {sparse} cannot be written as start, end and interval.")
    return keys


def _write_vl(config: ErnieConfig) -> dict[str, Any]:
    assert config.vision is not None and config.mrope_section is not None
    vision = config.vision
    kinds = ["sparse" if i in set(config.sparse_layers) else "dense" for i in range(config.num_hidden_layers)]
    text = dict(model_type="ernie4_5_vl_moe_text", **_write_base(config), **_write_experts(config))
    text |= dict(
        moe_intermediate_size=[config.text_expert_width, config.vision_expert_width],
        mlp_layer_types=kinds,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.mrope_section),
        },
    )
    return dict(
        model_type=config.model_type,
        architectures=[ARCHITECTURES[config.model_type]],
        tie_word_embeddings=config.tie_word_embeddings,
        text_config=text,
        vision_config=dict(
            model_type="ernie4_5_vl_moe_vision",
            depth=vision.depth,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_heads,
            intermediate_size=vision.intermediate_size,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            temporal_merge_size=vision.temporal_merge_size,
            hidden_act="quick_gelu",
            rms_norm_eps=vision.layer_norm_eps,
        ),
        **{name: getattr(config, name) for name in MEDIA_TOKEN_FIELDS},
        position_after_video=config.position_after_video.value,
    )


def _write_flat_vl(config: ErnieConfig) -> dict[str, Any]:
    if config.vision is None or config.mrope_section is None:
        raise ConfigError(f"{config.model_type} has no flat form of its own; to_json writes what everyone reads.")
    vision, section = config.vision, list(config.mrope_section)
    out = dict(
        model_type="ernie4_5_moe_vl",
        architectures=["Ernie4_5_VLMoeForConditionalGeneration"],
        **_write_base(config),
        **_write_experts(config),
        num_experts_per_tok=config.experts_per_token,  # the name that vLLM looks for when it reports routed experts
        moe_intermediate_size=[config.text_expert_width, config.vision_expert_width],
        moe_gate_act="softmax",
        rope_theta=config.rope_theta,
        # Without it vLLM would silently give images one-dimensional positions.
        rope_scaling={"type": "default", "rope_type": "default", "mrope_section": section},
        freq_allocation=section[2],
        im_patch_id=config.image_token_id,
        **{name: getattr(config, name) for name in MEDIA_TOKEN_FIELDS if name != "image_token_id"},
        pixel_hidden_size=vision.hidden_size,
        spatial_conv_size=vision.spatial_merge_size,
        temporal_conv_size=vision.temporal_merge_size,
        use_temporal_conv=True,
        position_after_video=config.position_after_video.value,
        vision_config=dict(
            model_type="DFNRope_vision_transformer",
            depth=vision.depth,
            embed_dim=vision.hidden_size,
            hidden_size=vision.hidden_size,
            hidden_act="quick_gelu",
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            num_heads=vision.num_heads,
            in_channels=vision.in_channels,
            patch_size=vision.patch_size,
            spatial_merge_size=vision.spatial_merge_size,
            rms_norm_eps=vision.layer_norm_eps,
        ),
    )
    for key, value in _range_from_layers(config).items():
        out[key] = value if key == "moe_layer_interval" else [value, value]
    out["moe_num_experts"] = [config.num_experts] * 2
    return out
