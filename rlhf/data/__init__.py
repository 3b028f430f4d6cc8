"""Rows of data and how they become prompts and samples."""
