"""Checkpoints on disk: exact both ways with transformers, small in memory, and clear about what is wrong."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_model import checkpoint
from ernie_model.atomic import FolderExistsError, atomic_folder
from ernie_model.checkpoint import CheckpointError, load_config, load_model, save_model, write_model, write_tensors
from ernie_model.config import ConfigError, PositionAfterVideo
from ernie_model.expert_parallel import Shard, shard_of
from ernie_model.model import ErnieModel
from tests.parity.reference import (
    MODELS,
    MOE_SHAPE,
    SHAPES,
    VL_SHAPE,
    Shape,
    make_conversations,
    make_reference,
    run_reference,
)

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
DENSE_SHAPE = SHAPES[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What transformers writes for a shape, in its hub layout or that of its modules; do not write into it."""
    made: dict[tuple[str, bool], Path] = {}

    def save(shape: Shape, *, hub: bool = True) -> Path:
        if (shape.name, hub) not in made:
            made[shape.name, hub] = tmp_path_factory.mktemp("saved")
            make_reference(shape).save_pretrained(made[shape.name, hub], save_original_format=hub)
        return made[shape.name, hub]

    return save


def edit(source: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy of a single-file checkpoint with tensors replaced, added, or (None) removed."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def same(a: ErnieModel, b: ErnieModel) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(one[n].dtype == two[n].dtype and torch.equal(one[n], two[n]) for n in one)


# ------------------------------------------------------------------------------------------------ with transformers


@each_shape
def test_both_layouts_of_transformers_load_the_same(shape: Shape, saved):
    hub, modules = load_model(saved(shape)), load_model(saved(shape, hub=False))
    assert same(hub, modules)
    assert not any(tensor.is_meta for tensor in hub.state_dict().values())
    assert all(parameter.requires_grad for parameter in hub.parameters())


@each_shape
def test_transformers_loads_what_we_write(shape: Shape, saved, tmp_path: Path):
    save_model(load_model(saved(shape)), tmp_path / "ours", max_shard_bytes=100_000)
    _, model_class, _ = MODELS[shape.model_type]
    again, info = model_class.from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    if shape.model_type != "ernie4_5":
        again.set_experts_implementation("eager")
    conversations = make_conversations(shape.rows, seed=4)
    before = run_reference(make_reference(shape), conversations, grads=False).logits
    assert torch.equal(before, run_reference(again.eval(), conversations, grads=False).logits)


@each_shape
def test_our_file_holds_what_theirs_holds(shape: Shape, saved, tmp_path: Path):
    save_model(load_model(saved(shape)), tmp_path / "ours")
    theirs = load_file(saved(shape) / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    # the spelling of the public repositories, which vLLM needs (trap 7.7)
    theirs = {name.replace("model.vision_model.", "vision_model."): tensor for name, tensor in theirs.items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------------------------------- round trips


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_bit_identical(shape: Shape, dtype: torch.dtype, saved, tmp_path: Path):
    model = load_model(saved(shape), dtype=dtype)
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=50_000)
    assert same(model, load_model(tmp_path / "one"))
    assert same(model, load_model(tmp_path / "many"))
    assert load_config(tmp_path / "many") == model.config


# ----------------------------------------------------------------------------------------------- what one rank holds


@pytest.mark.parametrize("hub", [True, False], ids=["hub layout", "modules' layout"])
@pytest.mark.parametrize("shape", [MOE_SHAPE, VL_SHAPE], ids=lambda shape: shape.name)
def test_a_rank_reads_its_own_experts_only(shape: Shape, hub: bool, saved, monkeypatch):
    whole = load_model(saved(shape, hub=hub))
    experts = whole.config.num_experts
    read: list[tuple[str, slice]] = []

    class Spy:
        def __init__(self, reader):
            self.reader = reader

        def get_slice(self, name):
            self.name = name
            return self

        def __getitem__(self, rows):
            read.append((self.name, rows))
            return self.reader.get_slice(self.name)[rows]

    shards = []
    opened = checkpoint._Files.__getitem__
    monkeypatch.setattr(checkpoint._Files, "__getitem__", lambda self, file: Spy(opened(self, file)))
    for index in (0, 1):
        read.clear()
        shards.append(load_model(saved(shape, hub=hub), experts=Shard(index, 2)))
        mine = Shard(index, 2).part_of(experts)
        for name, rows in read:
            if match := re.search(r"\.experts\.(\d+)\.", name):
                assert mine.start <= int(match[1]) % experts < mine.stop, name
            elif re.search(r"\.experts\.(gate_up|down)_proj", name):
                assert rows == mine, name
    parts = [model.state_dict() for model in shards]
    for name, value in whole.state_dict().items():
        if ".experts." in name:
            assert torch.equal(torch.cat([part[name] for part in parts]), value), name
            assert [shard_of(model.get_parameter(name)) for model in shards] == [Shard(0, 2), Shard(1, 2)]
        else:
            assert all(torch.equal(part[name], value) for part in parts), name
    with pytest.raises(ValueError, match=f"{experts} experts cannot be shared out evenly among {experts + 1} ranks"):
        load_model(saved(shape, hub=hub), experts=Shard(0, experts + 1))


@each_shape
def test_a_module_can_be_taken_away_as_soon_as_it_is_read(shape: Shape, saved):
    """As ZeRO-3 does, which keeps a part of every weight."""
    whole = load_model(saved(shape)).state_dict()
    taken: dict[str, Tensor] = {}

    def take(module: torch.nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            assert not parameter.is_meta
            taken[f"{len(taken)} {name}"] = parameter.detach().clone()
            parameter.data = torch.empty(0)

    model = load_model(saved(shape), ready=take)
    names = [name for name, _ in model.named_parameters()]
    for name, (key, value) in zip(names, taken.items(), strict=True):
        assert name.endswith(key.partition(" ")[2]) and torch.equal(value, whole[name]), name


@pytest.mark.parametrize("limit", [100_000, 10**9], ids=["many shards", "one"])
def test_several_writers_write_what_one_writes(saved, tmp_path: Path, limit: int):
    model = load_model(saved(VL_SHAPE))
    save_model(model, tmp_path / "one", max_shard_bytes=limit)
    (tmp_path / "three").mkdir()
    for index in range(3):
        before = set((tmp_path / "three").iterdir())
        write_tensors(
            model.config, model.state_dict(), tmp_path / "three", max_shard_bytes=limit, writer=Shard(index, 3)
        )
        wrote = {path.name for path in set((tmp_path / "three").iterdir()) - before}
        assert ("config.json" in wrote) == (index == 0)
        assert any(name.endswith(".safetensors") for name in wrote) == (index == 0 or limit == 100_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "three").iterdir()
    }


def test_shards_and_index(saved, tmp_path: Path):
    limit = 100_000
    model = load_model(saved(VL_SHAPE))
    save_model(model, tmp_path / "many", max_shard_bytes=limit)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    n = len(shards)
    assert n > 10
    assert shards == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    held: dict[str, str] = {}
    size = 0
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        bytes_here = sum(t.nbytes for t in tensors.values())
        assert bytes_here <= limit or len(tensors) == 1
        size += bytes_here
        held |= dict.fromkeys(tensors, shard)
        with safe_open(tmp_path / "many" / shard, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
    assert index["weight_map"] == held
    reference = make_reference(VL_SHAPE)
    assert index["metadata"] == {"total_parameters": sum(p.numel() for p in reference.parameters()), "total_size": size}


def test_routers_stay_float32(saved, tmp_path: Path):
    """In memory, in what we write, and when the file holds them as bfloat16 (reference 2.11)."""
    model = load_model(saved(VL_SHAPE), dtype=torch.bfloat16)
    full = load_model(saved(VL_SHAPE)).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
        if ".router." in name:
            assert torch.equal(tensor, full[name])
    for dtype in (None, torch.bfloat16):
        save_model(model, tmp_path / "half", dtype=dtype, overwrite=True)
        for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
            is_router = ".gate." in name or "moe_statics" in name
            assert tensor.dtype == (torch.float32 if is_router else torch.bfloat16), name
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"

    halved = {n: t.bfloat16() for n, t in load_file(saved(VL_SHAPE) / "model.safetensors").items()}
    routers = load_model(edit(saved(VL_SHAPE), tmp_path / "all_half", **halved)).state_dict()
    name = "layers.1.mlp.vision.router.weight_ED"
    assert routers[name].dtype == torch.float32 and torch.equal(routers[name], full[name].bfloat16().float())
    assert routers["norm.weight"].dtype == torch.bfloat16


def test_set_dtype_does_not_round_the_routers(saved):
    full = load_model(saved(VL_SHAPE)).state_dict()
    name = "layers.1.mlp.text.router.weight_ED"
    assert torch.equal(load_model(saved(VL_SHAPE)).set_dtype(torch.bfloat16).state_dict()[name], full[name])


def test_dtype_changes_on_the_way(saved, tmp_path: Path):
    exact = load_model(saved(MOE_SHAPE)).state_dict()
    half = load_model(saved(MOE_SHAPE), dtype=torch.bfloat16).state_dict()
    double = load_model(saved(MOE_SHAPE), dtype=torch.float64).state_dict()
    for name in exact:
        expected = exact[name] if ".router." in name else exact[name].bfloat16()
        assert torch.equal(half[name], expected)
        assert double[name].dtype == torch.float64 and torch.equal(double[name], exact[name].double())
    save_model(load_model(saved(MOE_SHAPE)), tmp_path / "half", dtype=torch.bfloat16)
    assert same(load_model(tmp_path / "half"), load_model(saved(MOE_SHAPE), dtype=torch.bfloat16))


def test_an_embedding_narrower_than_the_rest_is_noticed(saved, tmp_path: Path, caplog):
    name = "model.embed_tokens.weight"
    embedding = load_file(saved(DENSE_SHAPE) / "model.safetensors")[name].bfloat16()
    folder = edit(saved(DENSE_SHAPE), tmp_path / "mixed", **{name: embedding})
    with caplog.at_level(logging.WARNING):
        assert load_model(folder).norm.weight.dtype == torch.bfloat16
    assert "stored wider than they are loaded" in caplog.text and "model.norm.weight" in caplog.text
    caplog.clear()
    assert load_model(folder, dtype=torch.float32).norm.weight.dtype == torch.float32
    assert not caplog.text


def test_position_rule_can_be_overridden(saved):
    model = load_model(saved(VL_SHAPE), position_after_video=PositionAfterVideo.LAST)
    assert model.config.position_after_video is PositionAfterVideo.LAST
    assert load_model(saved(VL_SHAPE)).config.position_after_video is PositionAfterVideo.SPATIAL


def test_flat_config_and_public_names(saved, tmp_path: Path):
    """A public vision-language repository: Baidu's flat config.json, `vision_model.*` at the top."""
    plain = load_model(saved(VL_SHAPE))
    save_model(plain, tmp_path / "flat")
    raw = json.loads((tmp_path / "flat" / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept += ("intermediate_size", "rms_norm_eps", "tie_word_embeddings", "moe_k", "moe_num_shared_experts")
    flat = {key: text[key] for key in (*kept, "moe_intermediate_size")}
    flat |= dict(
        model_type="ernie4_5_moe_vl",
        rope_theta=500000,
        rope_scaling={"type": "ernie_3d", "mrope_section": [3, 3, 2]},
        moe_num_experts=[8, 8],
        moe_layer_start_index=[1, 1],
        moe_layer_end_index=[29, 28],
        im_patch_id=raw["image_token_id"],
        vision_config={k: vision[k] for k in ("depth", "hidden_size", "num_heads")} | {"mlp_ratio": 3},
        **{key: value for key, value in raw.items() if key.endswith("_token_id") and key != "image_token_id"},
    )
    (tmp_path / "flat" / "config.json").write_text(json.dumps(flat))
    assert same(load_model(tmp_path / "flat"), plain)


# -------------------------------------------------------------------------------------------------------------- head


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(saved, tmp_path: Path):
    embedding = load_file(saved(MOE_SHAPE) / "model.safetensors")["model.embed_tokens.weight"]
    folder = edit(saved(MOE_SHAPE), tmp_path / "same", **{"lm_head.weight": embedding.clone()})
    assert same(load_model(folder), load_model(saved(MOE_SHAPE)))
    assert load_model(folder, dtype=torch.bfloat16).lm_head is None  # rounded alike, still equal

    other = embedding.clone()
    other[150, 3] += 0.5
    folder = edit(saved(MOE_SHAPE), tmp_path / "other", **{"lm_head.weight": other})
    with pytest.raises(
        CheckpointError, match="tie_word_embeddings = true.*lm_head.weight and model.embed_tokens.weight"
    ):
        load_model(folder)
    edit_config(folder, tie_word_embeddings=False)  # the way out that the message names
    assert torch.equal(load_model(folder).head_VD, other)


def test_a_tied_head_of_another_shape_is_refused(saved, tmp_path: Path):
    folder = edit(saved(MOE_SHAPE), tmp_path / "head", **{"lm_head.weight": torch.zeros(159, 64)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \(159, 64\).*\(160, 64\)"):
        load_model(folder)


def test_an_untied_model_needs_its_head(saved, tmp_path: Path):
    folder = edit(saved(MOE_SHAPE), tmp_path / "untied")
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"missing \(1\): lm_head.weight"):
        load_model(folder)


def test_multi_token_prediction_is_ignored_and_said_so(saved, tmp_path: Path, caplog):
    extra = {"model.mtp_block.0.mlp.up_proj.weight": torch.ones(2), "model.mtp_emb_norm.0.weight": torch.ones(2)}
    with caplog.at_level(logging.WARNING):
        assert same(load_model(edit(saved(MOE_SHAPE), tmp_path / "mtp", **extra)), load_model(saved(MOE_SHAPE)))
    assert "ignored 2 multi-token-prediction tensors" in caplog.text and "model.mtp_emb_norm.0.weight" in caplog.text
    # vision-language repositories have none: there it is a mistake
    with pytest.raises(CheckpointError, match="unexpected"):
        load_model(edit(saved(VL_SHAPE), tmp_path / "vl", **extra))


# ------------------------------------------------------------------------------------------------------------ errors


def test_missing_and_unexpected_tensors_are_all_named_in_one_error(saved, tmp_path: Path):
    removed = {f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": None for i in (1, 2) for e in range(16)}
    folder = edit(
        saved(VL_SHAPE),
        tmp_path / "holes",
        **removed,
        **{"model.layers.2.mlp.gate.weight_1": None, "model.layers.3.extra": torch.ones(1)},
        **{"model.norm.weight": torch.ones(63)},
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "missing (33): model.layers.{1..2}.mlp.experts.{0..15}.up_proj.weight (32)" in message
    assert "model.layers.2.mlp.gate.weight_1" in message
    assert "unexpected (1): model.layers.3.extra" in message
    assert "model.norm.weight is (63,), the configuration asks for (64,)" in message


def test_half_of_a_merged_tensor_missing_from_a_stack_is_noticed(saved, tmp_path: Path):
    """One expert of one matrix: the stacked parameter exists, a slice of it would stay uninitialised."""
    folder = edit(saved(VL_SHAPE), tmp_path / "hole", **{"model.layers.1.mlp.experts.9.gate_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"missing \(1\): model.layers.1.mlp.experts.9.gate_proj.weight$"):
        load_model(folder)


def test_a_gate_the_wrong_way_round_is_noticed(saved, tmp_path: Path):
    """Trap 7.6: text repositories store (E, D), vision-language ones (D, E)."""
    name = "model.layers.1.mlp.gate.weight"
    turned = load_file(saved(VL_SHAPE) / "model.safetensors")[name].T.contiguous()
    with pytest.raises(CheckpointError, match=r"gate.weight is \(8, 64\), the configuration asks for \(64, 8\)"):
        load_model(edit(saved(VL_SHAPE), tmp_path / "turned", **{name: turned}))


def test_the_same_weights_in_two_layouts_are_refused(saved, tmp_path: Path):
    extra = {"model.language_model.norm.weight": torch.ones(64)}
    with pytest.raises(CheckpointError, match=r"stored twice, in two layouts \(1\): norm.weight"):
        load_model(edit(saved(VL_SHAPE), tmp_path / "twice", **extra))


def test_paddle_names_get_a_hint(saved, tmp_path: Path):
    tensors = load_file(saved(MOE_SHAPE) / "model.safetensors")
    renamed = {f"ernie.{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()}
    folder = edit(saved(MOE_SHAPE), tmp_path / "paddle", **renamed, **dict.fromkeys(tensors))
    with pytest.raises(CheckpointError, match="PaddlePaddle names; use the repository whose name ends in -PT"):
        load_model(folder)


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "text"])
def test_damaged_files_are_named(damage: str, saved, tmp_path: Path):
    save_model(load_model(saved(MOE_SHAPE)), tmp_path / "many", max_shard_bytes=50_000)
    victim = sorted((tmp_path / "many").glob("*.safetensors"))[2]
    data = victim.read_bytes()
    damaged = {
        "truncated": data[:-1],
        "empty": b"",
        "header": data[:20] + b"\xff\xff" + data[22:],
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }
    victim.write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=f"{victim.name} is damaged or incomplete"):
        load_model(tmp_path / "many")


def test_absent_shards_are_named(saved, tmp_path: Path):
    save_model(load_model(saved(MOE_SHAPE)), tmp_path / "many", max_shard_bytes=50_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    shards[1].unlink()
    shards[3].unlink()
    with pytest.raises(CheckpointError, match=f"2 are not there: {shards[1].name}, {shards[3].name}"):
        load_model(tmp_path / "many")


def test_an_index_that_does_not_match_is_refused(saved, tmp_path: Path):
    save_model(load_model(saved(MOE_SHAPE)), tmp_path / "many", max_shard_bytes=50_000)
    file = tmp_path / "many" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name, shard = next(iter(index["weight_map"].items()))

    def write(weight_map: dict[str, str]) -> None:
        file.write_text(json.dumps(index | {"weight_map": weight_map}))

    write({n: s for n, s in index["weight_map"].items() if n != name})
    with pytest.raises(CheckpointError, match=f"1 tensors; for example {name}: the index says nowhere.* {shard}"):
        load_model(tmp_path / "many")
    write(index["weight_map"] | {"model.ghost.weight": shard})
    with pytest.raises(CheckpointError, match=f"model.ghost.weight: the index says {shard}, it is in none of them"):
        load_model(tmp_path / "many")
    write(index["weight_map"] | {name: "../model.safetensors"})
    with pytest.raises(CheckpointError, match="a shard is a .safetensors file in the same folder"):
        load_model(tmp_path / "many")
    file.write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable index.*weight_map"):
        load_model(tmp_path / "many")
    shutil.copy(saved(MOE_SHAPE) / "model.safetensors", tmp_path / "many")
    with pytest.raises(CheckpointError, match="holds both"):
        load_model(tmp_path / "many")


def test_pickles_are_refused(saved, tmp_path: Path):
    shutil.copy(saved(MOE_SHAPE) / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="neither model.safetensors nor model.safetensors.index.json"):
        load_model(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights .pytorch_model.bin.*convert them to safetensors"):
        load_model(tmp_path)


def test_quantised_tensors_are_refused(saved, tmp_path: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    eight = load_file(saved(MOE_SHAPE) / "model.safetensors")[name].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=f"{name} is stored as F8_E4M3; quantised"):
        load_model(edit(saved(MOE_SHAPE), tmp_path / "eight", **{name: eight}))


def test_unknown_model_type(saved, tmp_path: Path):
    folder = edit(saved(MOE_SHAPE), tmp_path / "other")
    edit_config(folder, model_type="qwen3_moe")
    with pytest.raises(ConfigError, match="config.json: model_type is 'qwen3_moe'; this suite knows ernie4_5, "):
        load_model(folder)


# --------------------------------------------------------------------------------------------------------------- hub


def test_a_hub_id_downloads_safetensors_and_json_only(saved, monkeypatch):
    asked = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(saved(DENSE_SHAPE))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert same(load_model("baidu/ERNIE-4.5-0.3B-PT", revision="v1"), load_model(saved(DENSE_SHAPE)))
    load_config("baidu/ERNIE-4.5-0.3B-PT")
    assert asked == [
        ("baidu/ERNIE-4.5-0.3B-PT", {"revision": "v1", "allow_patterns": ["*.safetensors", "*.json"]}),
        ("baidu/ERNIE-4.5-0.3B-PT", {"revision": None, "allow_patterns": ["config.json"]}),
    ]


def test_sources_that_are_nothing(saved, monkeypatch, tmp_path: Path):
    def unreachable(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is not a folder here.*no network.*pass a local folder"):
        load_model("nobody/nothing")
    for source in ("runs/7/step-100", tmp_path / "nothing", "nothing"):
        with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
            load_model(source)
    with pytest.raises(CheckpointError, match="revision='v1' was given, but .* is a folder"):
        load_model(saved(DENSE_SHAPE), revision="v1")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------------------ saving


def test_saving_never_mixes_with_an_existing_folder(saved, tmp_path: Path):
    model = load_model(saved(DENSE_SHAPE))
    save_model(model, tmp_path / "made", max_shard_bytes=50_000)
    with pytest.raises(FolderExistsError, match="not empty"):
        save_model(model, tmp_path / "made")
    save_model(model, tmp_path / "made", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_model(model, tmp_path / "other", max_shard_bytes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]


def test_weights_and_other_files_appear_together(saved, tmp_path: Path):
    with atomic_folder(tmp_path / "export") as folder:
        (folder / "tokenizer.json").write_text("{}")
        write_model(load_model(saved(DENSE_SHAPE)), folder)
        assert not (tmp_path / "export").exists()
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_models_that_cannot_be_written_exactly(saved, tmp_path: Path):
    model = load_model(saved(DENSE_SHAPE))
    query = model.get_submodule("layers.0.self_attn.q_proj")
    query.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError, match="no place for: layers.0.self_attn.q_proj.lora_A. Merge adapters first"):
        save_model(model, tmp_path / "a")
    with torch.device("meta"):
        empty = ErnieModel(load_config(saved(DENSE_SHAPE)))
    with pytest.raises(CheckpointError, match=r"no values \(meta device\)"):
        save_model(empty, tmp_path / "b")
    biased = ErnieModel(load_config(saved(MOE_SHAPE)).replace(use_bias=True))
    with pytest.raises(CheckpointError, match="use_bias is true in a text mixture of experts"):
        save_model(biased, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
