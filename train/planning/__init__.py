"""What a layout of ranks takes: bytes that travel, seconds, and the search for layouts that fit."""
