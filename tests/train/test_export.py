"""`ernie export`: the files that the run itself writes at its end, from its last checkpoint; and what is added."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_model.atomic import atomic_folder
from ernie_model.checkpoint import CheckpointError, load_model, write_model
from ernie_model.config import ErnieConfig
from ernie_model.model import ErnieModel
from ernie_model.processor import Processor
from tests.tiny import SPARSE, tiny_processor
from train import certificate, export, sft
from train.certificate import CertificateError
from train.config import Precision, UserError
from train.export import export_checkpoint
from train.inference_config import Bits, Certify, ExportConfig, Layout, QuantizeConfig, Weights
from train.served import open_model

SETTINGS = [
    "experiment=digits",
    "tracker=none",
    "run.steps=2",
    "run.save_every=1",
    "optim.warmup_steps=1",
    "data.max_tokens=128",
    "evaluate.every=0",
    "evaluate.max_examples=2",
    "evaluate.sheet=0",
    "parallel.cpu=true",
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("settings", "names"),
    [(["optim.freeze=[vision]"], ["export"]), (["peft=lora", "peft.merge=true"], ["adapter", "export"])],
    ids=["all weights", "adapters"],
)
def test_the_newest_checkpoint_gives_what_the_run_gave(tmp_path, monkeypatch, settings, names):
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["ernie sft", *SETTINGS, *settings, f"run.folder={run}"])
    sft.main()
    written = export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "out"), certify=Certify.ours))
    assert sorted(folder.name for folder in written) == names
    for name in names:
        ours = files(tmp_path / "out" / name)
        assert {file: ours[file] for file in files(run / name)} == files(run / name)
        assert ours.keys() - files(run / name).keys() <= {"README.md", "certificate.json"}
    card = (tmp_path / "out" / "export" / "README.md").read_text()
    assert "| data | digits |" in card and "| updates | 2 |" in card and "| correct |" in card
    assert ("LoRA (rank 16" in card) == (len(names) == 2) and ("all weights but vision" in card) == (len(names) == 1)
    said = json.loads((tmp_path / "out" / "export" / "certificate.json").read_text())
    assert said["holds"] and [one["program"].split()[0] for one in said["programs"]] == ["ernie-train"]
    # and a named one, of an earlier step
    first = run / "checkpoints" / "step-000001"
    unasked = dict(certify=Certify.none)
    export_checkpoint(ExportConfig(checkpoint=str(first), output=str(tmp_path / "first"), **unasked))
    assert files(tmp_path / "first" / names[0]) != files(run / names[0])
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "out")))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file"):
        export_checkpoint(ExportConfig(checkpoint=str(run), output=str(tmp_path / "file")))
    (shard,) = first.glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="step-000001 is damaged .*shard-00000.safetensors does not have the checksum"):
        export_checkpoint(ExportConfig(checkpoint=str(first), output=str(tmp_path / "third")))


def test_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no whole checkpoint. Name a run folder"):
        export_checkpoint(ExportConfig(checkpoint=str(tmp_path), output=str(tmp_path / "out")))


# --------------------------------------------------------------------------------------- weights, and what they compute

CONFIG = SPARSE.replace(
    num_hidden_layers=3, sparse_layers=(1, 2), intermediate_size=96, num_shared_experts=1, initializer_range=0.1
)


def random_model() -> ErnieModel:
    torch.manual_seed(0)
    model = ErnieModel(CONFIG).requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor) * 0.1)
        elif ".router." in name:
            tensor.copy_(torch.randn_like(tensor) * 0.5)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    with atomic_folder(folder) as temporary:
        write_model(random_model(), temporary)
        tiny_processor(CONFIG).save(temporary)
    return folder


def test_weights_in_another_precision_and_in_several_files(base, tmp_path):
    config = ExportConfig(
        checkpoint=str(base),
        output=str(tmp_path / "out"),
        precision=Precision.bf16,
        max_shard_gb=2e-4,
        certify=Certify.ours,
    )
    (folder,) = export_checkpoint(config)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    read, plain = load_model(folder), load_model(base, dtype=torch.bfloat16)
    for (name, ours), theirs in zip(read.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and (ours.dtype == torch.float32) == (".router." in name)
    card = (folder / "README.md").read_text()
    assert "| weights | bfloat16; routers float32 |" in card and "# license: say under which" in card
    assert f"| base | {base} |" in card and 'AutoModelForImageTextToText.from_pretrained("out/export")' in card


def test_transformers_computes_the_same(base, tmp_path):
    (folder,) = export_checkpoint(
        ExportConfig(checkpoint=str(base), output=str(tmp_path / "out"), precision=Precision.bf16)
    )
    said = json.loads((folder / "certificate.json").read_text())
    ours, theirs = said["programs"]
    assert said["holds"] and said["stored"] == "bfloat16" and said["computed_in"] == "float32"
    assert theirs["program"].startswith("transformers 5")
    names = ["text", "conversation", "image", "two images", "video"]
    assert [case["case"] for case in theirs["cases"]] == names == list(said["ours"])
    for mine, case in zip(ours["cases"], theirs["cases"], strict=True):
        assert mine["max_difference"] == 0 and mine["routing_agreement"] == 1
        assert case["max_difference"] < case["bound"] < 1e-3
        assert case["greedy_agreement"] == case["routing_agreement"] == 1


def corrupt(name: str, change):
    """`write_tensors`, and then one stored tensor is another."""
    real = export.write_tensors

    def write(config, ours, folder, **options):
        real(config, ours, folder, **options)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name].clone())
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return write


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.experts.6.down_proj.weight", "vision_model.blocks.0.attn.proj.bias"]
)
def test_a_corrupted_weight_is_refused(base, tmp_path, monkeypatch, name):
    def one_value(tensor):
        tensor.flatten()[3] += 0.5
        return tensor

    monkeypatch.setattr(export, "write_tensors", corrupt(name, one_value))
    config = ExportConfig(checkpoint=str(base), output=str(tmp_path / "out"), certify=Certify.ours)
    with pytest.raises(CertificateError, match="(?s)does not compute what was exported, in case .*out.refused"):
        export_checkpoint(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.refused"]
    said = json.loads((tmp_path / "out.refused" / "export" / "certificate.json").read_text())
    assert not said["holds"] and not any(
        case["holds"] for case in said["programs"][0]["cases"] if case["case"] == "image"
    )


def test_a_wrong_map_of_expert_pools_is_refused(base, tmp_path, monkeypatch):
    """Start and end tokens of images to the text experts: our own files agree with us, transformers does not."""
    monkeypatch.setattr(ErnieConfig, "vision_pool_token_ids", ErnieConfig.placeholder_token_ids)
    with pytest.raises(CertificateError, match="transformers 5.* does not compute what was exported, in case 'image'"):
        export_checkpoint(ExportConfig(checkpoint=str(base), output=str(tmp_path / "out")))
    said = json.loads((tmp_path / "out.refused" / "export" / "certificate.json").read_text())
    ours, theirs = said["programs"]
    assert ours["holds"] and [case["holds"] for case in theirs["cases"]] == [True, True, False, False, False]
    assert theirs["cases"][2]["routing_agreement"] < 1


def test_a_program_that_cannot_be_run(base, tmp_path):
    config = ExportConfig(
        checkpoint=str(base),
        output=str(tmp_path / "out"),
        layout=Layout.vllm,
        certify=Certify.none,
        vllm_python="/no/python",
    )
    with pytest.raises(CertificateError, match="ask_vllm could not be run by /no/python"):
        export_checkpoint(config)
    config.vllm_python = sys.executable  # it has no vLLM
    with pytest.raises(CertificateError, match="(?s)ask_vllm failed under .*No module named 'vllm'"):
        export_checkpoint(config)
    config.layout = Layout.hub
    with pytest.raises(UserError, match="with layout=vllm. Set both"):
        export_checkpoint(config)


def test_the_bound_is_that_of_rounding_and_an_epsilon_more_is_seen():
    """Twice the model's own rounding stays inside; a change of the weights by a thousandth of their size does not."""
    model = random_model().eval()
    certifier = certificate.Certifier(model, tiny_processor(CONFIG))
    wide = certificate.model_of(CONFIG, lambda name, index: model.state_dict()[name], torch.float64)
    exact = certifier.read_back("float64", wide)
    assert exact.comparisons[0].max_difference > 0
    for one in exact.comparisons:
        bound = certifier.bounds[one.case]
        assert one.max_difference < bound.largest / 4 and one.mean_difference < bound.mean / 2
    model.layers[1].self_attn.o_proj.weight.mul_(1.001)
    changed = certifier.read_back("changed", model)
    assert all(one.max_difference > certifier.bounds[one.case].largest for one in changed.comparisons)


def test_an_adapter_is_merged_into_a_folder(base, tmp_path):
    from train.config import PeftConfig, PeftKind
    from train.lora.adapt import adapt

    trained = open_model(Weights(checkpoint=str(base), precision=Precision.fp32, cpu=True))
    adapters = adapt(trained.model, PeftConfig(kind=PeftKind.lora, rank=2), seed=0, base=str(base))
    for name, parameter in trained.model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1)
    adapters.publish(tmp_path / "run", "export", trained.processor)
    adapter = str(tmp_path / "run" / "adapter")
    (folder,) = export_checkpoint(
        ExportConfig(checkpoint=str(base), adapter=adapter, output=str(tmp_path / "out"), certify=Certify.ours)
    )
    opened = open_model(Weights(checkpoint=str(base), adapter=adapter, precision=Precision.fp32, cpu=True)).model
    for ours, theirs in zip(load_model(folder).state_dict().values(), opened.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert "adapter adapter merged into the base" in (folder / "README.md").read_text()


def test_fewer_bits(base, tmp_path):
    settings = QuantizeConfig(text_experts=Bits.int4, vision_experts=Bits.int4, attention=Bits.int8, group=32)
    config = ExportConfig(
        checkpoint=str(base), output=str(tmp_path / "out"), precision=Precision.bf16, quantize=settings
    )
    (folder,) = export_checkpoint(config)
    assert folder.name == "quantized"
    said = json.loads((folder / "certificate.json").read_text())
    assert said["holds"] and all(case["max_difference"] == 0 for case in said["programs"][0]["cases"])
    assert 0 < said["against_unquantised"]["image"]["mean_difference"] < 1
    assert (
        "| weights | text_experts int4, vision_experts int4, attention int8; the rest bfloat16"
        in (folder / "README.md").read_text()
    )
    served = open_model(Weights(checkpoint=str(folder), cpu=True))
    case = certificate.cases(served.processor)[2]
    logits = certificate.compute(served.model, case).logit_TV[-1].topk(5)
    last = said["ours"]["image"]["last_logits"]
    assert [str(i) for i in logits.indices.tolist()] == list(last)
    assert torch.tensor(list(last.values())).allclose(logits.values, atol=1e-5)
    with pytest.raises(UserError, match="is quantised, and what it was made of cannot be had back"):
        export_checkpoint(ExportConfig(checkpoint=str(folder), output=str(tmp_path / "again")))
    others = {"layout=vllm": dict(layout=Layout.vllm), "vllm_python": dict(vllm_python="python")}
    others["certify=transformers"] = dict(certify=Certify.transformers)
    for name, other in others.items():
        with pytest.raises(UserError, match=f"{name} and quantize exclude each other"):
            ExportConfig(checkpoint="a", output="b", quantize=settings, **other)


def test_the_layout_of_vllm(base, tmp_path):
    (folder,) = export_checkpoint(
        ExportConfig(checkpoint=str(base), output=str(tmp_path / "out"), layout=Layout.vllm, certify=Certify.none)
    )
    raw = json.loads((folder / "config.json").read_text())
    assert raw["model_type"] == "ernie4_5_moe_vl" and raw["auto_map"]["AutoConfig"].startswith(
        "configuration_ernie4_5_vl."
    )
    assert raw["moe_num_experts"] == [4, 4] and raw["rope_scaling"]["mrope_section"] == [3, 3, 2]
    assert ErnieConfig.from_json(raw) == CONFIG
    for module in {value.partition(".")[0] for value in raw["auto_map"].values()}:
        compile((folder / f"{module}.py").read_text(), module, "exec")
    template = (folder / "chat_template.jinja").read_text()
    assert "<|image@placeholder|>" in template and "IMAGE_PLACEHOLDER" not in template
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert ids["<|image@placeholder|>"] == CONFIG.vocab_size and len(set(ids.values())) == len(added)
    assert load_model(folder).config == CONFIG  # the weights are as they were
    # Whether or not the tokenizer knew the place tokens before, as that of a released checkpoint does.
    for vocab_size in (CONFIG.vocab_size, CONFIG.vocab_size + 2):
        (folder / "config.json").write_text(json.dumps(raw | {"vocab_size": vocab_size}))
        with pytest.raises(CheckpointError, match="an export with layout=vllm.* name one with layout=hub"):
            Processor.from_pretrained(folder)
    assert not (folder / "certificate.json").exists()
    assert "vllm serve out/export --trust-remote-code" in (folder / "README.md").read_text()
