"""How full rows are and how evenly ranks are loaded, on a mixture of digits, photographs and real conversations.

python -m tests.bench.balance FOLDER      FOLDER holds LLaMA-Factory's demo sets

Ranks are compared by the operations of the released 28B model's architecture.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from data.dataset import SetSpec
from data.encoder import Encoder
from data.fit import Rules
from data.loader import PackedStream
from data.mixture import Share, open_mixture
from data.pack import deal
from data.quarantine import Quarantine
from ernie_model.processor import Processor
from tests.test_configs import load
from train.build import build_processor, read_architecture
from train.sources import patch_cost

TEXT = ("v1_sft_demo.jsonl", "alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl")
MODELS = ("tiny_vl", "ernie_4_5_vl_28b_a3b")
PHOTOS = "v1_multimodal_demo.jsonl"


def stream_of(folder: Path, media_root: Path, max_tokens: int, processor: Processor) -> PackedStream:
    shares = {name: Share(spec=SetSpec(path=str(folder / name))) for name in TEXT}
    shares["digits"] = Share(spec=SetSpec(task="digits"), weight=4.0)
    shares["photos"] = Share(spec=SetSpec(path=str(folder / PHOTOS), media_root=str(media_root)))
    quarantine = Quarantine(max_bad=0.05, num_records=3000)
    encoder = Encoder(open_mixture(shares).train, processor, Rules(max_tokens=max_tokens), quarantine=quarantine)
    return PackedStream(encoder, seed=0)


def report(folder: Path, media_root: Path, processor: Processor, max_tokens: int, patch: float) -> None:
    stream = stream_of(folder, media_root, max_tokens, processor)
    rows = [stream._packer.next_row() for _ in range(192)]
    fill = sum(sized.tokens for row in rows for sized in row) / (len(rows) * max_tokens)
    costs = [sum(sized.tokens + patch * sized.patches for sized in row) for row in rows]
    print(f"{max_tokens} tokens per row: {fill:.1%} filled, {len(stream.encoder.quarantine)} records refused")
    for ranks in (2, 4, 8):
        for accumulation in (1, 4):
            size = ranks * accumulation
            steps = [costs[at : at + size] for at in range(0, len(costs), size)]
            in_turn = sum(max(sum(step[rank::ranks]) for rank in range(ranks)) for step in steps)
            dealt = sum(max(sum(step[row] for row in share) for share in deal(step, ranks)) for step in steps)
            mean = sum(costs) / ranks
            print(f"  {ranks} ranks x {accumulation} rows: {in_turn / mean:.3f} in turn, {dealt / mean:.3f} dealt")
    stream.close()


def main(folder: Path) -> None:
    architectures = {name: read_architecture(load(f"model={name}").model, None) for name in MODELS}
    costs = {name: patch_cost(config) for name, config in architectures.items()}
    for model, cost in costs.items():
        print(f"a patch of {model} costs as much as {cost:.2f} text tokens")
    settings = load("model=tiny_vl").model
    processor = build_processor(settings, architectures["tiny_vl"])
    with tempfile.TemporaryDirectory() as media_root:  # its paths begin with data/, the folder they come from
        shutil.copytree(folder / "mllm_demo_data", Path(media_root) / "data" / "mllm_demo_data")
        shutil.copytree(folder / "mllm_demo_data", Path(media_root) / "mllm_demo_data")
        for max_tokens in (4096, 8192):
            report(folder, Path(media_root), processor, max_tokens, costs["ernie_4_5_vl_28b_a3b"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
