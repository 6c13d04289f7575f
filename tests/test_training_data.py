"""Where text comes from, and what is said about bad sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from routesae_lens.training.data import load_text


def test_data_comes_from_files_folders_and_datasets(tmp_path: Path):
    rows = Dataset.from_dict({"text": ["one", "two"]})
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "b.parquet")
    for name in ("a.parquet", "a.jsonl", "saved", "folder"):
        for streaming in (False, True):
            assert [row["text"] for row in load_text(tmp_path / name, streaming=streaming)] == ["one", "two"]
    assert [row["text"].strip() for row in load_text(tmp_path / "a.txt")] == ["one\nline", "two"]
    assert len(load_text(str(tmp_path / "dict"), split="test")) == 2
    assert next(iter(load_text(rows.rename_column("text", "body"), text_column="body"))) == {"text": "one"}


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.parquet", FileNotFoundError, "no such file or folder: /.*missing.parquet"),
        ("empty.txt", ValueError, "empty"),
        ("broken.parquet", ValueError, "cannot read .*broken.parquet as parquet"),
        ("a.csv", ValueError, "unknown kind of file; expected one of .parquet"),
        ("nothing", ValueError, "neither a dataset saved with save_to_disk nor a folder"),
        ("dict", ValueError, "has no split 'train'; its splits: test"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, error: type[Exception], message: str):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "nothing").mkdir()
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "dict")
    with pytest.raises(error, match=message):
        load_text(tmp_path / name)


def test_an_unknown_hub_name_says_that_it_is_no_file_either():
    with pytest.raises(ValueError, match="'no-such/data' is neither a file or folder here nor a dataset"):
        load_text("no-such/data")
