"""Cache of results by a digest of their inputs, one JSON line each, so that a rerun computes only missing ones.

Every line is synced to disk before the next result is computed, so a crash loses nothing; a torn last line is dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsp_jax.core.errors import InputError
from lsp_jax.core.files import check_writable, read_jsonl, user_path


def digest(*parts: Any) -> str:
    """Returns the SHA-256 of JSON values, equal for equal content on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class Store:
    """A file of cached results, locked by one process at a time."""

    def __init__(self, path: str | Path):
        """Reads the file. Raises InputError if it is not such a cache, or another process is writing it."""
        self.path: Path = user_path("output_dir", path)
        check_writable("output_dir", self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                "output_dir", str(self.path), "another evaluation is writing to it; wait, or give another directory"
            ) from None
        try:
            self._values = self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> dict[str, Any]:
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)  # drops a torn last line, or the next would join it
        values: dict[str, Any] = {}
        for number, record in enumerate(read_jsonl(self.path, "output_dir"), 1):
            if record.keys() != {"key", "value"} or not isinstance(record["key"], str):
                remedy = "is not a cached result; remove the file, or give another output_dir"
                raise InputError("output_dir", f"{self.path}:{number}", remedy)
            values[record["key"]] = record["value"]
        return values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds results and syncs them to disk."""
        lines = [json.dumps({"key": key, "value": value}) + "\n" for key, value in values.items()]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._values.update(values)

    def close(self) -> None:
        """Closes and unlocks the file."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
