"""Rows on disk: parquet, JSONL or a Hugging Face dataset folder, in the conversational format.

A row is a dict of `messages` ([{role, content}], content a string or [{type: "image"} | {type: "text", text}]),
`images` (or `image`, one) and any further columns (answer, category, …). Once read, `images` is always a list of Media,
and a row of preferences ({prompt, chosen, rejected}, lists of messages) has the first two joined as `messages`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from rlhf.types import Media

Row = dict[str, Any]
FORMLESS = (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError)  # of what a column may hold
Form = Callable[[Row, Callable[[str], Row]], Row]
ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """Data that cannot be used; the message names file and row and says what to do."""


class _Store(Protocol):
    """Raw rows, images not yet loaded."""

    def __len__(self) -> int: ...
    def get(self, index: int) -> Row: ...


class Rows:
    """Random access to the rows of one origin. `rows[i]` is a fresh dict whose `images` are Media.

    origin  the file or folder, for messages
    digest  sha256 over the content of every row, images included; the same for the same rows in any file format

    `rows[i]` raises DataError for an image that is missing or unreadable, IndexError past the end.
    """

    def __init__(
        self,
        store: _Store,
        origin: str,
        folder: Path,
        chosen: Sequence[int] | None = None,
        form: Form | None = None,
    ) -> None:
        self._store = store
        self._folder = folder
        self._chosen = chosen
        self._form = form
        self.origin = origin

    def __len__(self) -> int:
        return len(self._store) if self._chosen is None else len(self._chosen)

    def select(self, indexes: Sequence[int]) -> Rows:
        """These of the rows, in this order, each as often as it is named."""
        chosen = [index if self._chosen is None else self._chosen[index] for index in indexes]
        return Rows(self._store, self.origin, self._folder, chosen, self._form)

    def formed(self, form: Form) -> Rows:
        """The rows as `form` makes them of what is written: it is given a row, and what finds another by its `id`."""
        return Rows(self._store, self.origin, self._folder, self._chosen, form)

    def _find(self, key: str) -> Row:
        if key not in self._by_id:
            raise DataError(f"no row has the id {key!r} that it names; add that row, or take the name out")
        return self._store.get(self._by_id[key])

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {str(self._store.get(index).get("id")): index for index in range(len(self._store))}

    def bare(self, index: int) -> Row:
        """The row with its pictures as they are written, whatever that is: for who reads words and columns only."""
        return self._raw(index)[0]

    def __getitem__(self, index: int) -> Row:
        row, where = self._raw(index)
        row["images"] = [media_of(_bytes(image, self._folder, where), where) for image in row["images"]]
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256()
        for index in range(len(self)):
            row, where = self._raw(index)
            images = [_bytes(image, self._folder, where) for image in row.pop("images")]
            plain = {key: value for key, value in row.items() if value is not None}
            total.update(json.dumps(plain, sort_keys=True, default=str).encode())
            for data in images:
                total.update(hashlib.sha256(data).digest())
            total.update(b"\n")
        return total.hexdigest()

    def _raw(self, index: int) -> tuple[Row, str]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.origin}: row {index} of {len(self)}")
        if self._chosen is not None:
            index = self._chosen[index]
        row = self._store.get(index)
        where = f"{self.origin}, row {index}"
        if self._form is not None:
            try:
                row = self._form(row, self._find)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            except FORMLESS as error:
                raise DataError(
                    f"{where}: cannot be brought into the form that `format` names ({type(error).__name__}: {error}); "
                    "correct the row's columns or leave it out"
                ) from error
        if row.get("messages") is None and isinstance(row.get("chosen"), list):
            if not isinstance(row.get("prompt"), list | None):
                raise DataError(f"{where}: `chosen` is a list of messages, so `prompt` must be one too")
            row["messages"] = [*(row.pop("prompt", None) or []), *row.pop("chosen")]
        if not isinstance(row.get("messages"), list) or not row["messages"]:
            raise DataError(
                f"{where}: no `messages`; a row needs messages = [{{role, content}}, …] in conversational format"
            )
        row["messages"] = [_message(message, where) for message in row["messages"]]
        row["images"] = _images(row, where)
        return row, where


def read(path: str | Path) -> Rows:
    """Open rows: `*.parquet`, `*.jsonl` / `*.json` (one object a line; images as paths relative to the file, or
    base64), or a folder made by `datasets.Dataset.save_to_disk`. Raises DataError."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check `path` of the source")
    if path.is_dir():
        return Rows(_Folder(path), str(path), path)
    if path.suffix == ".parquet":
        return Rows(_Parquet(path), str(path), path.parent)
    if path.suffix in {".jsonl", ".json"}:
        return Rows(_Lines(path), str(path), path.parent)
    raise DataError(f"{path}: unknown kind of file; rows are .parquet, .jsonl or a Hugging Face dataset folder")


def write(rows: Iterable[Mapping[str, Any]], path: str | Path, note: str = "") -> None:
    """Write rows as parquet; the file appears complete or not at all. Images may be Media, PIL images or
    {bytes, path}. `note` is kept in the file (see `note_of`). Raises DataError naming a column of mixed types."""
    path = Path(path)
    table = _table([dict(row) for row in rows], str(path)).replace_schema_metadata({"thinkfusion.note": note})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        pq.write_table(table, temporary, row_group_size=1024)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def note_of(path: str | Path) -> str:
    """The note `write` left in a parquet file; empty where there is none."""
    metadata = pq.read_schema(path).metadata or {}
    return bytes(metadata.get(b"thinkfusion.note", b"")).decode()


class _Parquet:
    def __init__(self, path: Path) -> None:
        try:
            self._table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a readable parquet file ({error}); write it again") from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def get(self, index: int) -> Row:
        return dict(self._table.slice(index, 1).to_pylist()[0])


class _Lines:
    def __init__(self, path: Path) -> None:
        self._rows: list[bytes] = []
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from error
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error.msg}); one object a line") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: a {type(row).__name__}, but a row is an object {{…}}")
                self._rows.append(line)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Row:
        # parsed anew, so that no caller can change a row for the next one
        return dict(json.loads(self._rows[index]))


class _Folder:
    def __init__(self, path: Path) -> None:
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{path}: not a folder made by Dataset.save_to_disk ({error})") from error
        if isinstance(loaded, datasets.DatasetDict):
            raise DataError(f"{path}: holds the splits {', '.join(loaded)}; name one of these folders as `path`")
        # arrow rows keep images as encoded bytes, undecoded
        self._rows = loaded.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int) -> Row:
        return dict(self._rows[index : index + 1].to_pylist()[0])


def _images(row: Row, where: str) -> list[Any]:
    """The row's pictures, from `images` or from `image`, in whatever notation."""
    single, images = row.pop("image", None), row.get("images")
    if single is not None and images:
        raise DataError(f"{where}: both `image` and `images`; give one of the two")
    if not isinstance(images, list | None):
        raise DataError(
            f"{where}: `images` is a {type(images).__name__} and must be a list; one picture goes to `image`"
        )
    return images or ([] if single is None else [single])


def _message(message: Any, where: str) -> Row:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: a message is {{role, content}}, this one is {message!r}")
    if message["role"] not in ROLES:
        raise DataError(f"{where}: unknown role {message['role']!r}; the roles are {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": content}
    if not isinstance(content, list):
        raise DataError(f"{where}: content of a {message['role']} message must be text or a list of parts")
    return {"role": message["role"], "content": [_part(part, where) for part in content]}


def _part(part: Any, where: str) -> Row:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise DataError(f'{where}: a content part is {{type: "image"}} or {{type: "text", text}}, this one is {part!r}')


def _bytes(image: Any, folder: Path, where: str) -> bytes:
    """Encoded bytes of any image notation."""
    if isinstance(image, Media):
        return image.data
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(image, dict):
        data = image.get("bytes")
        if isinstance(data, bytes) and data:
            return data
        if isinstance(data, str):
            return _decoded(data, where)
        image = image.get("path")
    if not isinstance(image, str):
        raise DataError(f"{where}: an image has neither bytes nor a path; give one of the two")
    if image.startswith("data:"):
        return _decoded(image.partition(",")[2], where)
    if _looks_encoded(image):
        return _decoded(image, where)
    if "://" in image:
        raise DataError(
            f"{where}: image {image} is an address, and nothing is fetched here; download it, give its path"
        )
    path = folder / image
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{where}: image {path} cannot be read ({error.strerror}); restore the file or remove the row"
        ) from error


def _looks_encoded(text: str) -> bool:
    # PNG, JPEG, GIF, WebP: a path has no reason to begin like the base64 of these signatures and be this long
    return len(text) > 60 and text.startswith(("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR"))


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise DataError(f"{where}: image bytes are text but not base64 ({error}); encode them again") from error


def media_of(data: bytes, where: str) -> Media:
    """An encoded picture. Raises DataError, which says `where` it is, for one that cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            # a header can be fine while the pixels are cut off; finding out here names the row
            image.load()
            return Media(data=data, size=image.size)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{where}: an image of {len(data)} bytes cannot be decoded ({error}); replace the image or remove the row"
        ) from error


def _table(rows: Sequence[Row], origin: str) -> pa.Table:
    for row in rows:
        if row.get("images"):
            images = [_bytes(image, Path(origin).parent, origin) for image in row["images"]]
            row["images"] = [{"bytes": data, "path": None} for data in images]
    contents = [message["content"] for row in rows for message in row["messages"]]
    if not all(isinstance(content, str) for content in contents):
        # one column has one type: text becomes a list of one part
        for row in rows:
            row["messages"] = [{"role": m["role"], "content": _parts(m["content"])} for m in row["messages"]]
    columns = dict.fromkeys(key for row in rows for key in row)
    arrays = {}
    for name in columns:
        try:
            arrays[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{origin}: column {name!r} mixes types ({error}); make every row's value alike") from error
    return pa.table(arrays)


def _parts(content: Any) -> list[Row]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"type": part["type"], "text": part.get("text")} for part in parts]
