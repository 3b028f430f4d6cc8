"""Advantages, objectives, corrections and divergences: pure functions in tables, each checked against a slow oracle.

`table` names the algorithms and, with `advantages` and `shaping`, imports no torch: a plan reads it.
"""
