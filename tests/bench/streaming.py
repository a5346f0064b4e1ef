"""Memory of reading a million records:  python -m tests.bench.streaming

Records of about 300 bytes in a file of every kind; each kind is opened, read at random places and streamed from end to
end, in a process of its own. Printed are seconds, and how far the process's peak rose over what it held before opening
(its own memory, `RssAnon`: pages of a mapped file belong to the system and are given back).
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.records import open_records, open_stream
from tests.bench.memory import status_mib

KINDS = ("jsonl", "json", "parquet", "tar")


def value(number: int, words: int) -> dict:
    question = {"role": "user", "content": f"{number} " + "w" * words}
    return {"id": str(number), "messages": [question, {"role": "assistant", "content": "yes"}]}


def write(kind: str, path: Path, count: int, words: int = 200) -> None:
    if kind == "parquet":
        table = pa.Table.from_pylist([value(number, words) for number in range(1000)])
        with pq.ParquetWriter(path, table.schema, compression="none") as file:
            for _ in range(0, count, 100_000):  # groups of 100,000 rows
                file.write_table(pa.concat_tables([table] * min(100, count // 1000)))
        return
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for number in range(count):
                content = json.dumps(value(number, words)).encode()
                info = tarfile.TarInfo(f"{number:07d}.json")
                info.size = len(content)
                archive.addfile(info, BytesIO(content))
                archive.members.clear()
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n" * (kind == "json"))
        for number in range(count):
            file.write("," * (kind == "json" and number > 0) + json.dumps(value(number, words)) + "\n")
        file.write("]\n" * (kind == "json"))


class Peak:
    """The largest `RssAnon` since it began, over that at its beginning, sampled every 5 ms."""

    def __enter__(self):
        self.start = self.largest = status_mib("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.largest = max(self.largest, status_mib("RssAnon"))

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.largest = max(self.largest, status_mib("RssAnon"))

    @property
    def mib(self) -> float:
        return self.largest - self.start


def measure(path: Path, reads: int) -> dict[str, float]:
    found = {}
    with Peak() as peak:
        start = time.perf_counter()
        records = open_records(path)
        found["open_s"] = time.perf_counter() - start
        choose = random.Random(0).randrange
        start = time.perf_counter()
        for _ in range(reads):
            _ = records[choose(len(records))]
        found["random_us"] = (time.perf_counter() - start) / reads * 1e6
    found["random_mib"], count = peak.mib, len(records)
    del records
    with Peak() as peak:
        start = time.perf_counter()
        streamed = sum(1 for _ in open_stream(path).read_from())
        found["stream_us"] = (time.perf_counter() - start) / streamed * 1e6
    found["stream_mib"] = peak.mib
    assert streamed == count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=None, help="random reads; default all, and 2,000 of parquet")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.reads)))
        return
    heads = ("file MiB", "open s", "random us", "peak MiB", "stream us", "peak MiB")
    print(f"{'':8s}" + "".join(f"{head:>11s}" for head in heads))
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"records.{kind}"
            write(kind, path, args.records)
            reads = args.reads or (2000 if kind == "parquet" else args.records)
            command = [sys.executable, "-m", "tests.bench.streaming", "--measure", str(path), "--reads", str(reads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found, size = json.loads(done.stdout.splitlines()[-1]), path.stat().st_size / 2**20
        numbers = (size, *(found[key] for key in ("open_s", "random_us", "random_mib", "stream_us", "stream_mib")))
        print(f"{kind:8s}" + "".join(f"{number:11,.1f}" for number in numbers))


if __name__ == "__main__":
    main()
