"""How long `ernie doctor` takes for 10,000 records with an image each: `python -m tests.bench.doctor`.

The pictures are 640 x 480 JPEGs of about 70 kB with the detail of photographs, all different, and every one is decoded
in full. Prints seconds and records per second. `--records 500` for a quick look.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image


def make(folder: Path, count: int) -> Path:
    """A JSONL file of `count` conversations about a picture each."""
    generator = np.random.default_rng(0)
    lines = []
    for number in range(count):
        rough = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        picture = rough.resize((640, 480), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=92)
        (folder / f"{number:05d}.jpg").write_bytes(file.getvalue())
        question = [
            {"type": "image", "image": f"{number:05d}.jpg"},
            {"type": "text", "text": "What is in the picture?"},
        ]
        answer = "Colours that run into each other. " * (1 + number % 7)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"{number:05d}", "messages": messages}))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    count = parser.parse_args().records
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = make(folder, count)
        size = sum(file.stat().st_size for file in folder.glob("*.jpg"))
        print(f"{count} pictures, {size / count / 1000:.0f} kB each", flush=True)
        command = [sys.executable, "-m", "train.doctor", "data=files", f"data.path={path}", f"run.folder={folder}/run"]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "tracker=none", "optim=adamw", "optim.lr=1e-3"], capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        found = json.loads((folder / "run" / "doctor.json").read_text())["numbers"]
        assert found["records"] == count, found
        print(f"ernie doctor: {seconds:.1f} s in all, {count / found['seconds']:.0f} records per second")


if __name__ == "__main__":
    main()
