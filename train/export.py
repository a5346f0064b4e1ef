"""`ernie export`: weights as the folders that others load, with a certificate of what they compute.

ernie export checkpoint=runs/signs output=signs                                  the newest checkpoint of a run
ernie export checkpoint=runs/signs/checkpoints/step-000400 output=signs
ernie export checkpoint=baidu/ERNIE-4.5-0.3B-PT adapter=runs/signs output=signs  an adapter merged into its base
ernie export checkpoint=signs/export output=small quantize.text_experts=int4     fewer bits (docs/export.md)
ernie export checkpoint=signs/export output=served layout=vllm vllm_python=/somewhere/bin/python

    OUTPUT/export      all weights, with peft=none; read range by range, so no more than one of its files is in memory
    OUTPUT/adapter     with peft=lora: the adapter, and with peft.merge the merged weights as OUTPUT/export; the model
                       under it is loaded, since the gate compares what was written with it
    OUTPUT/quantized   instead of OUTPUT/export, with quantize.*

    values ──► files ──► certificate (train/certificate.py) ──► OUTPUT appears
                             '── refused: the files are set aside as OUTPUT.refused, and OUTPUT does not appear

One process, on the CPU. Weights, configuration, tokenizer and processor are the files that the run writes at its end;
README.md and certificate.json are added.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from ernie_model.atomic import FolderExistsError, atomic_folder, atomic_write
from ernie_model.checkpoint import load_model, local_folder, write_tensors
from ernie_model.config import ErnieConfig
from ernie_model.counting import count_parameters
from ernie_model.inference.quantize import load_quantised, prepare, quantization_of, write_quantised
from ernie_model.processor import Processor
from train import checkpoint, model_card
from train.build import build_model, build_processor, read_config
from train.calibration import quantise
from train.certificate import (
    SAME,
    CertificateError,
    Certifier,
    Verdict,
    compare,
    compute,
    model_of,
    transformers_installed,
    written,
)
from train.compose import from_plain, to_typed
from train.config import ModelConfig, OptimConfig, PeftConfig, PeftKind, Precision, UserError
from train.inference_config import Certify, ExportConfig, Layout
from train.model_card import Card
from train.optim import build_optimizer
from train.run import program
from train.served import FILES, merge_adapter
from train.values import Values, in_memory, in_pieces
from train.vllm_layout import to_vllm_layout
from train.weights import trained_weights

CERTIFICATE, README = "certificate.json", "README.md"


@program("export")
def main(cfg: DictConfig) -> None:
    for folder in export_checkpoint(to_typed(cfg, ExportConfig)):
        print(f"written   {folder}{summary(folder)}")


def summary(folder: Path) -> str:
    if not (folder / CERTIFICATE).exists():
        return ""
    said = json.loads((folder / CERTIFICATE).read_text())
    programs = ", ".join(
        f"{one['program']} {max(_number(case) for case in one['cases']):.1e}" for one in said["programs"]
    )
    return f"   largest difference of a logit: {programs}"


def _number(case: dict[str, Any]) -> float:
    return float("inf") if case["max_difference"] == "infinite" else case["max_difference"]


class Source(NamedTuple):
    """What is exported."""

    architecture: ErnieConfig
    processor: Processor
    values: Values | None
    """Of the whole model, merged; None where an adapter alone is written."""
    card: Card
    adapters: Any = None
    """`train.lora.adapt.Adapters`, where a run trained some."""


def export_checkpoint(config: ExportConfig) -> list[Path]:
    """The folders that were written.

    Raises:
        UserError: there is no whole checkpoint; the output exists; what an adapter rests on is not what it was; the
            files do not compute what was exported (`CertificateError`).
    """
    output = Path(config.output)
    if output.is_file():
        raise UserError(f"output={output} is a file. Choose another name for the folder.")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty, and nothing is overwritten. Choose another folder.")
    source = _open(config)
    _refuse(source, config)
    aside = output.with_name(f"{output.name}.refused")
    try:
        with atomic_folder(output) as folder:
            try:
                names = _write(source, folder, config)
            except CertificateError as error:
                shutil.rmtree(aside, ignore_errors=True)
                shutil.copytree(folder, aside)
                raise CertificateError(f"{error}\nNothing was published; the files are in {aside}.") from error
    except FolderExistsError as error:
        raise UserError(f"output={output}: {error}") from error
    return [output / name for name in names]


# -------------------------------------------------------------------------------------------------------- what to write


def _open(config: ExportConfig) -> Source:
    path = Path(config.checkpoint)
    if (path / checkpoint.STATE).exists() or not _holds_weights(path):
        if config.adapter is not None:
            raise UserError(
                f"adapter={config.adapter} is merged into a folder of weights, and checkpoint={path} is training "
                "state, which holds its own. Leave adapter out, or name the weights."
            )
        return _of_run(path)
    return _of_weights(config)


def _holds_weights(path: Path) -> bool:
    """A folder of weights, or something that may be a hub id."""
    return (path / "config.json").exists() or (not path.exists() and len(path.parts) == 2)


def _of_weights(config: ExportConfig) -> Source:
    folder = local_folder(config.checkpoint, config.revision, FILES)
    if quantization_of(folder) is not None:
        raise UserError(
            f"checkpoint={config.checkpoint} is quantised, and what it was made of cannot be had back from it. Name "
            "the unquantised weights."
        )
    model = load_model(folder).requires_grad_(False)
    method = "the weights of the base, unchanged"
    if config.adapter is not None:
        merge_adapter(model, config.adapter)
        method = f"adapter {Path(config.adapter).name} merged into the base"
    card = Card(Path(config.output).name, config.checkpoint, method)
    processor = Processor.from_pretrained(folder)
    return Source(model.config, processor, in_memory(model.state_dict()), card)


def _of_run(named: Path) -> Source:
    path = _chosen(named)
    saved = checkpoint.read_state(path)
    settings = saved["settings"]
    model, peft = from_plain(settings["model"], ModelConfig), from_plain(settings["peft"], PeftConfig)
    run_folder = path.parents[1] if path.parent.name == "checkpoints" else path
    card = model_card.of_run(saved, run_folder)
    if peft.kind is PeftKind.none:
        architecture = read_config(model)
        values = in_pieces(saved["shapes"], checkpoint.pieces_of(path))
        return Source(architecture, build_processor(model, architecture), values, card)
    seed = settings["run"]["seed"]
    built = build_model(model, seed=seed, frozen=True)
    weights = trained_weights(built.model, peft, seed=seed, base=model.checkpoint)
    optimizer = build_optimizer(built.model, from_plain(settings["optim"], OptimConfig))
    checkpoint.load(path, weights=weights, optimizer=optimizer)
    merged = None
    if peft.merge:
        everything = dict(built.model.named_parameters()) | dict(built.model.named_buffers())
        merged = weights.merged(in_memory(everything))  # pyright: ignore[reportAttributeAccessIssue] it is Adapters
    return Source(built.model.config, built.processor, merged, card, weights)


def _chosen(path: Path) -> Path:
    """A checkpoint, or the newest one of a run."""
    if (path / checkpoint.STATE).exists():
        if problem := checkpoint.damage(path):
            raise UserError(f"checkpoint={path} is damaged ({problem}). Choose another step-... folder.")
        return path
    found, problems = checkpoint.newest_undamaged(path / "checkpoints")
    if found is None:
        why = f" ({next(iter(problems.values()))})" if problems else ""
        raise UserError(
            f"checkpoint={path}: there is no whole checkpoint{why}. Name a run folder, or one of its "
            "checkpoints/step-... folders."
        )
    return found


# --------------------------------------------------------------------------------------------------------------- write


def _refuse(source: Source, config: ExportConfig) -> None:
    """What cannot be done, before anything is computed.

    Raises:
        UserError: see the messages.
    """
    if config.quantize.parts() and source.values is None:
        raise UserError(
            "quantize needs whole weights, and this run writes an adapter alone. Merge it: `ernie export "
            f"checkpoint=BASE adapter={config.checkpoint} output=... quantize...`"
        )
    if config.vllm_python is not None and source.architecture.vision is not None and config.layout is not Layout.vllm:
        raise UserError("vllm_python asks vLLM, which reads vision-language models with layout=vllm. Set both.")
    if config.certify is Certify.transformers and not transformers_installed():
        raise UserError("certify=transformers needs transformers 5 or later: pip install 'transformers>=5'")


def _write(source: Source, output: Path, config: ExportConfig) -> list[str]:
    """All folders of an export, into an existing one; their names."""
    names = []
    if source.adapters is not None:
        alone = source.adapters.config
        source.adapters.config = dataclasses.replace(alone, merge=False)
        source.adapters.publish(output, "export", source.processor)
        source.adapters.config = alone
        names.append("adapter")
    if source.values is None:
        return names
    name = "quantized" if config.quantize.parts() else "export"
    (output / name).mkdir()
    (_write_quantised if config.quantize.parts() else _write_weights)(source, source.values, output / name, config)
    return [*names, name]


def _write_weights(source: Source, values: Values, folder: Path, config: ExportConfig) -> None:
    stored = _dtype(config, values)
    write_tensors(
        source.architecture,
        values.tensors,
        folder,
        read=values.read,
        dtype=None if config.precision is None else stored,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )
    source.processor.save(folder)
    if source.adapters is not None and config.precision is None:
        from train.adapter_gate import check_merged

        check_merged(folder, source.adapters)
    verdicts, certifier = _ask_before_layout(source, values, folder, config, stored)
    if config.layout is Layout.vllm:
        to_vllm_layout(folder, source.processor)
    if config.vllm_python is not None:
        assert certifier is not None  # _ask_before_layout
        verdicts.append(certifier.vllm(folder, config.vllm_python))
    _write_card(source, folder, config, stored, {})
    _certify(folder, verdicts, certifier, {"stored": _name(stored), "certify": config.certify.value})


def _ask_before_layout(
    source: Source, values: Values, folder: Path, config: ExportConfig, stored: torch.dtype
) -> tuple[list[Verdict], Certifier | None]:
    """What can be asked of the hub's layout."""
    if config.certify is Certify.none and config.vllm_python is None:
        return [], None
    total = count_parameters(source.architecture).total
    small = total <= config.certify_most
    ask = config.certify is Certify.transformers or (
        config.certify is Certify.auto and small and transformers_installed()
    )

    def rounded(name: str, index: tuple) -> Tensor:
        value = values.read(name, index)
        return value if ".router." in name else value.to(stored)

    model = model_of(source.architecture, rounded, torch.float32 if small else stored)
    certifier = Certifier(model, source.processor)
    if config.certify is Certify.none:
        return [], certifier
    verdicts = [certifier.files(folder)]
    if ask:
        verdicts.append(certifier.transformers(folder))
    return verdicts, certifier


def _write_quantised(source: Source, values: Values, folder: Path, config: ExportConfig) -> None:
    stored = _dtype(config, values)
    model = model_of(source.architecture, values.read, stored)
    plain = None if config.certify is Certify.none else Certifier(model, source.processor)
    settings = quantise(model, source.processor, config.quantize)
    assert settings is not None
    write_quantised(model, settings, folder, max_shard_bytes=int(config.max_shard_gb * 1e9))
    source.processor.save(folder)
    _write_card(source, folder, config, stored, config.quantize.parts())
    if plain is None:
        return
    prepare(model)
    certifier = Certifier(model, source.processor)
    read = load_quantised(folder, dtype=stored)
    moved = [compare(case.name, plain.ours[case.name], compute(model, case), SAME) for case in plain.cases]
    change = {
        one.case: {
            "mean_difference": one.mean_difference,
            "greedy_agreement": one.greedy_agreement,
            "routing_agreement": one.routing_agreement,
        }
        for one in moved
    }
    more = {"stored": _name(stored), "quantization": settings.to_json(), "against_unquantised": change}
    _certify(folder, [certifier.read_back("ernie-train", read)], certifier, more)


def _certify(folder: Path, verdicts: list[Verdict], certifier: Certifier | None, more: dict[str, Any]) -> None:
    """Write certificate.json.

    Raises:
        CertificateError: somebody disagrees; the certificate was written all the same.
    """
    if certifier is None or not verdicts:
        return
    atomic_write(folder / CERTIFICATE, json.dumps(written(verdicts, certifier, more), indent=1) + "\n")
    for verdict in verdicts:
        for one in verdict.comparisons:
            if not one.holds:
                why = one.problem or (
                    f"logits differ by {one.max_difference:.3g} (mean {one.mean_difference:.3g}); rounding explains "
                    f"{one.bound:.3g} (mean {one.mean_bound:.3g})"
                )
                raise CertificateError(
                    f"{verdict.program} does not compute what was exported, in case {one.case!r}: {why}."
                )


def _write_card(source: Source, folder: Path, config: ExportConfig, stored: torch.dtype, bits: dict[str, str]) -> None:
    text = model_card.card(
        source.card,
        source.architecture,
        folder=f"{Path(config.output).name}/{folder.name}",
        dtype=_name(stored),
        layout=config.layout.value,
        bits=bits,
    )
    atomic_write(folder / README, text)


def _dtype(config: ExportConfig, values: Values) -> torch.dtype:
    """What weights are stored in."""
    chosen = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}
    return values.tensors["embed_tokens.weight"].dtype if config.precision is None else chosen[config.precision]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
