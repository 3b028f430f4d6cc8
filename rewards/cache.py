"""What was scored before, by a hash of all that decides it: an SQLite file, which a kill at any moment leaves whole."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.types import Score

WAIT = 30.0  # seconds for another process that writes to it
AT_ONCE = 500  # keys of one query


def key_of(*parts: Any) -> str:
    """A key of everything that decides a score, as JSON has it: equal for equal parts in any process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Cache:
    """Scores by key. Whoever asks makes the keys (`key_of`), of everything that decides a score: what is not in the
    key must not matter. Failures are never kept. Several processes may use one file; an object is one thread's."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it. Raises ValueError for one that is something else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._file = path, sqlite3.connect(path, timeout=WAIT)
        try:
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score TEXT NOT NULL)")
                self._file.execute("CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, count INTEGER NOT NULL)")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise ValueError(
                f"{path}: no cache of scores ({error}); delete it, and they are asked for again"
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, Score]:
        """Those of the keys that are known."""
        wanted, found = list(dict.fromkeys(keys)), dict[str, Score]()
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            marks = ",".join("?" * len(some))
            rows = self._file.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", some)  # noqa: S608 - marks
            found |= {key: Score("scored", **json.loads(kept)) for key, kept in rows}
        return found

    def put(self, scores: Mapping[str, Score]) -> None:
        """Keep those that have a value, all of them or none if this process ends meanwhile."""
        kept = [
            (key, json.dumps({"value": score.value, "parts": dict(score.parts), "note": score.note}))
            for key, score in scores.items()
            if score.outcome == "scored"
        ]
        if kept:
            with self._file:
                self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", kept)

    def calls(self, key: str) -> int:
        """So many calls were counted under this key."""
        found = self._file.execute("SELECT count FROM calls WHERE key = ?", [key]).fetchone()
        return 0 if found is None else int(found[0])

    def count(self, key: str) -> None:
        """Count one call more under this key, before it is made: a budget must hold over any kill."""
        with self._file:
            self._file.execute(
                "INSERT INTO calls VALUES (?, 1) ON CONFLICT (key) DO UPDATE SET count = count + 1", [key]
            )

    def close(self) -> None:
        self._file.close()
