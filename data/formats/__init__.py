"""One file per format of record: `read(record) -> Conversation`, and `write` back."""
