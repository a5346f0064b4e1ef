"""Records: the raw rows of a dataset, each with the file and line it came from.

conversations.jsonl                       open_records("conversations.jsonl")
  {"id": "a", "messages": [...]}            [0] -> Record({"id": "a", ...}, line 1)
                                                   (blank lines are no records)
  {"id": "b", "messages": [...]}            [1] -> Record({"id": "b", ...}, line 3)

base.py          what a reader gives          json_files.py    lines, or one array
    open.py          from `data.path` to a reader tar_files.py     WebDataset shards
    files.py         files of byte spans          tables.py        parquet, Hugging Face datasets
                                                  many.py          folders and patterns as one

A reader is flat in memory, whatever the size of the records. See tests/bench/streaming.py.
"""

from data.records.base import Broken, Record, Records, RecordStream, Rows
from data.records.json_files import write_jsonl
from data.records.open import KINDS, open_records, open_stream

__all__ = ["KINDS", "Broken", "Record", "RecordStream", "Records", "Rows", "open_records", "open_stream", "write_jsonl"]
