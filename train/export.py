"""`ernie export`: a checkpoint of a run, on whatever layout it was written, as the folders that others load.

ernie export checkpoint=runs/signs output=signs                                  the newest checkpoint of a run
ernie export checkpoint=runs/signs/checkpoints/step-000400 output=signs

    OUTPUT/export     all weights, with peft=none; read range by range, so no more than one of its files is in memory
    OUTPUT/adapter    with peft=lora: the adapter, and with peft.merge the merged weights as OUTPUT/export; the model
                      under it is loaded, since the gate compares what was written with it

One process, on the CPU. The same files as the run writes at its end.
"""

from pathlib import Path

from omegaconf import DictConfig

from train import checkpoint
from train.build import build_model, build_processor, read_config
from train.compose import from_plain, register, to_typed
from train.config import ExportConfig, ModelConfig, OptimConfig, PeftConfig, PeftKind, UserError
from train.optim import build_optimizer
from train.run import export, program
from train.values import in_pieces
from train.weights import trained_weights

register()


@program("export")
def main(cfg: DictConfig) -> None:
    for folder in export_checkpoint(to_typed(cfg, ExportConfig)):
        print(f"written   {folder}")


def export_checkpoint(config: ExportConfig) -> list[Path]:
    """The folders that were written.

    Raises:
        UserError: there is no whole checkpoint; the output exists; what an adapter rests on is not what it was.
    """
    path, output = _chosen(Path(config.checkpoint)), Path(config.output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output={output} is not empty, and nothing is overwritten. Choose another folder.")
    saved = checkpoint.read_state(path)
    model = from_plain(saved["settings"]["model"], ModelConfig)
    peft = from_plain(saved["settings"]["peft"], PeftConfig)
    if peft.kind is PeftKind.none:
        architecture = read_config(model)
        values = in_pieces(saved["shapes"], checkpoint.pieces_of(path))
        export(output / "export", architecture, values, build_processor(model, architecture))
        return [output / "export"]
    seed = saved["settings"]["run"]["seed"]
    built = build_model(model, seed=seed, frozen=True)
    weights = trained_weights(built.model, peft, seed=seed, base=model.checkpoint)
    optimizer = build_optimizer(built.model, from_plain(saved["settings"]["optim"], OptimConfig))
    checkpoint.load(path, weights=weights, optimizer=optimizer)
    return weights.publish(output, "export", built.processor)


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


if __name__ == "__main__":
    main()
