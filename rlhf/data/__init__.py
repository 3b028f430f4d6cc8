"""Rows of data and how they become prompts and samples."""

from rlhf.data.formatting import as_prompt, as_sample
from rlhf.data.rows import DataError, Rows, read, write
from rlhf.data.sources import open_source
from rlhf.data.stream import Stream
from rlhf.data.tokenizer import train_tokenizer

__all__ = ["DataError", "Rows", "Stream", "as_prompt", "as_sample", "open_source", "read", "train_tokenizer", "write"]
