"""Rows from parquet, JSONL and dataset folders, and the stream over them."""

import base64
import collections
import io
import json

import datasets
import pytest
from PIL import Image

from rlhf.data import sources as data_sources
from rlhf.data.rows import DataError, Rows, read, write
from rlhf.data.sources import open_source, open_sources
from rlhf.data.stream import Stream
from rlhf.recipe import Source
from rlhf.types import Media

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def text_rows(folder, name: str, count: int) -> Rows:
    write([{"messages": [{"role": "user", "content": f"{name}{i}"}]} for i in range(count)], folder / f"{name}.parquet")
    return read(folder / f"{name}.parquet")


def test_every_format_and_image_notation_reads_alike(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(png(1))
    encoded = base64.b64encode(png(1)).decode()
    notations = ["img/a.png", {"path": "img/a.png"}, {"bytes": encoded}, f"data:image/png;base64,{encoded}", encoded]
    lines = [json.dumps({"messages": ASK, "images": [image], "answer": "7"}) for image in notations]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    jsonl = read(tmp_path / "rows.jsonl")
    write(jsonl, tmp_path / "rows.parquet")
    parquet = read(tmp_path / "rows.parquet")
    raw = [{"messages": ASK, "images": [{"bytes": png(1), "path": None}], "answer": "7"}] * 5
    datasets.Dataset.from_list(raw).save_to_disk(str(tmp_path / "folder"))
    folder = read(tmp_path / "folder")
    for rows in (jsonl, parquet, folder):
        assert len(rows) == 5
        for row in rows:
            assert row == {"messages": ASK, "images": [Media(png(1), (6, 4))], "answer": "7"}
    assert jsonl.digest == parquet.digest == folder.digest


def test_digest_sees_text_pixels_and_order(tmp_path):
    def digest(*rows):
        write(rows, tmp_path / "d.parquet")
        return read(tmp_path / "d.parquet").digest

    one = {"messages": ASK, "images": [Media(png(1), (6, 4))]}
    two = {"messages": ASK, "images": [Media(png(2), (6, 4))]}
    three = {"messages": [{"role": "user", "content": [{"type": "text", "text": "who?"}]}], "images": []}
    assert len({digest(one), digest(two), digest(three), digest(one, two), digest(two, one)}) == 5


def test_images_may_be_pil_and_rows_may_have_none(tmp_path):
    rows = [{"messages": ASK, "images": [Image.new("L", (3, 2))]}, {"messages": [{"role": "user", "content": "hi"}]}]
    write(rows, tmp_path / "r.parquet")
    read_back = read(tmp_path / "r.parquet")
    assert read_back[0]["images"][0].size == (3, 2)
    assert read_back[1]["images"] == []
    assert read_back[-1]["messages"][0]["content"] == [{"type": "text", "text": "hi"}]
    with pytest.raises(IndexError):
        read_back[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ASK, "images": ["gone.png"]}, r"rows.jsonl, row 1: image .*gone.png cannot be read"),
        ({"messages": ASK, "images": ["cut.png"]}, r"row 1: an image of \d+ bytes cannot be decoded"),
        ({"messages": ASK, "images": [{}]}, r"row 1: an image has neither bytes nor a path"),
        ({"messages": ASK, "images": [{"bytes": "?"}]}, r"row 1: image bytes are text but not base64"),
        ({"text": "x"}, r"row 1: no `messages`"),
        ({"messages": []}, r"row 1: no `messages`"),
        (
            {"messages": [{"role": "human", "content": "hi"}]},
            r"row 1: unknown role 'human'; the roles are system",
        ),
        ({"messages": ASK, "images": "cut.png"}, r"row 1: `images` is a str and must be a list"),
        ({"messages": ASK, "image": "a.png", "images": ["b.png"]}, r"row 1: both `image` and `images`"),
        ({"messages": ASK, "images": ["http://a/b.png"]}, r"row 1: image http://a/b.png is an address"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, r"row 1: a content part is"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    (tmp_path / "cut.png").write_bytes(png(1, (64, 64))[:90])
    good = {"messages": [{"role": "user", "content": "fine"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    rows = read(tmp_path / "rows.jsonl")
    assert rows[0]["images"] == []
    with pytest.raises(DataError, match=message):
        rows[1]


def test_one_picture_may_stand_in_a_column_of_its_own(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    line = {"messages": ASK, "image": "a.png"}
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "list.jsonl").write_text(json.dumps({"messages": ASK, "images": ["a.png"]}) + "\n")
    (tmp_path / "both.jsonl").write_text(json.dumps(line | {"images": []}) + "\n")
    one, many = read(tmp_path / "one.jsonl"), read(tmp_path / "list.jsonl")
    assert read(tmp_path / "both.jsonl")[0] == one[0]
    assert one[0] == many[0] == {"messages": ASK, "images": [Media(png(1), (6, 4))]}
    assert one.digest == many.digest


def test_bad_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": []}\n"caf\xe9"\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not UTF-8"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n{oops\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not JSON"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"a.parquet: not a readable parquet"):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="column 'answer' mixes types"):
        write([{"messages": ASK, "answer": "7"}, {"messages": ASK, "answer": 7}], tmp_path / "mixed.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


def test_stream_keeps_proportions_and_walks_each_source_in_full(tmp_path):
    sources = {"a": text_rows(tmp_path, "a", 5), "b": text_rows(tmp_path, "b", 3)}
    drawn = Stream(sources, {"a": 3.0, "b": 1.0}, seed=1).take(80)
    for count in range(1, 81):
        a = sum(name == "a" for name, _, _ in drawn[:count])
        assert abs(a - 0.75 * count) <= 1
    order = [index for name, index, _ in drawn if name == "a"]
    epochs = [order[i : i + 5] for i in range(0, 60, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    for name, index, row in drawn:
        assert row["messages"][0]["content"] == f"{name}{index}"


@pytest.mark.parametrize("cut", [0, 1, 7, 23])
def test_stream_resumes_exactly(tmp_path, cut):
    sources = {"a": text_rows(tmp_path, "a", 5), "b": text_rows(tmp_path, "b", 3)}
    weights = {"a": 0.3, "b": 1.0}
    whole = Stream(sources, weights, seed=4).take(50)
    first = Stream(sources, weights, seed=4)
    head = first.take(cut)
    second = Stream(sources, weights, seed=4)
    second.restore(json.loads(json.dumps(first.state())))
    assert head + second.take(50 - cut) == whole
    assert Stream(sources, weights, seed=5).take(50) != whole


def test_stream_refuses_what_cannot_be_drawn(tmp_path):
    sources = {"a": text_rows(tmp_path, "a", 2), "empty": text_rows(tmp_path, "empty", 0)}
    with pytest.raises(DataError, match=r"source 'empty' .* has no rows"):
        Stream(sources, {"a": 1, "empty": 1}, 0)
    with pytest.raises(DataError, match="no source named 'b'"):
        Stream(sources, {"b": 1}, 0)
    with pytest.raises(DataError, match="weight 0"):
        Stream(sources, {"a": 0}, 0)
    with pytest.raises(DataError, match="seed changed from 1 to 2"):
        Stream(sources, {"a": 1}, 2).restore(Stream(sources, {"a": 1}, 1).state())


BUILT: collections.Counter = collections.Counter()


def build(table, rows, split, seed, options):
    BUILT["calls"] += 1
    return [{"messages": [{"role": "user", "content": f"{table} {split} {seed} {options} {i}"}]} for i in range(rows)]


def test_a_builder_runs_once_until_its_source_changes(tmp_path):
    BUILT.clear()
    source = Source(builder=f"{__name__}:build", table="t", rows=3)
    first = open_source("x", source, 0, tmp_path)
    again = open_source("x", source, 0, tmp_path)
    assert (len(first), first.digest, BUILT["calls"]) == (3, again.digest, 1)
    assert len(open_source("x", source.model_copy(update={"rows": 4}), 0, tmp_path)) == 4
    assert open_source("y", source, 0, tmp_path).digest != first.digest
    assert open_source("x", source, 1, tmp_path).digest != first.digest
    assert BUILT["calls"] == 4
    path = Source(path=str(tmp_path / "x.parquet"))
    assert open_source("z", path, 0, tmp_path).origin == str(tmp_path / "x.parquet")
    for builder, message in [
        ("digit", "known builders are digits"),
        ("no.such:f", "No module"),
        ("json:f", "no function"),
    ]:
        with pytest.raises(DataError, match=message):
            open_source("x", Source(builder=builder, table="t"), 0, tmp_path)
    assert open_source("z", source.model_copy(update={"like": "x"}), 0, tmp_path).digest == first.digest


def test_two_processes_build_what_one_would(tmp_path, monkeypatch):
    tables = {"text": "text", "facts": "facts", "single": "single", "bad": "nothing"}
    sources = {name: Source(builder="digits", table=table, rows=8) for name, table in tables.items()}
    monkeypatch.setattr(data_sources, "WORTH_A_PROCESS", 0)
    with pytest.raises(DataError, match="no table 'nothing'"):
        open_sources(sources, 0, tmp_path / "failed")
    del sources["bad"]
    found = open_sources(sources, 0, tmp_path / "two")
    assert list(found) == list(sources)
    for name, source in sources.items():
        assert found[name].digest == open_source(name, source, 0, tmp_path / "one").digest
