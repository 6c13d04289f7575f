"""Text for training: where it comes from, and whether it is enough."""

from __future__ import annotations

import warnings
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from routesae_lens.demo import DEMO_MODEL, demo_text_path

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
"""File endings and the names of their readers in ``datasets``."""

PEEK_TOKENS = 2**20
"""How far the data is read ahead to learn its size; what was read is used, not read again."""


def load_text(
    source: str | Path | Dataset | IterableDataset,
    *,
    split: str = "train",
    streaming: bool | None = None,
    text_column: str | None = None,
) -> Dataset | IterableDataset:
    """Text or token ids from a file, a folder or the hub.

    Args:
        source: a .parquet, .jsonl, .json or .txt file (paragraphs of a .txt, separated by empty lines, are
            documents); a folder of such files, or one written by ``save_to_disk``; a hub name; "demo" for
            the text that ships with this package; or a dataset, which is only checked.
        split: split of a hub dataset or of a saved DatasetDict.
        streaming: read lazily; by default for the hub only.
        text_column: the column that holds the text, where it is called neither "text" nor "problem".

    Returns:
        A dataset with a column "text" or "problem" (text), or "tokens" or "input_ids" (token ids).

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an empty file, an unknown kind of file, no such split, no such hub dataset, no row, or no
            column of text or tokens.
    """
    if isinstance(source, (Dataset, IterableDataset)):
        dataset, where = source, "the dataset"
    elif isinstance(source, (str, Path)):
        path = demo_text_path() if source == DEMO_MODEL else source
        dataset, where = _read(path, split, streaming), str(path)
    else:
        raise TypeError(
            f"expected a datasets.Dataset or IterableDataset, a path or a hub name, got {type(source).__name__}"
        )
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{where} holds no rows")
    if text_column is not None and text_column != "text":
        if text_column not in row:
            raise ValueError(f"{where} has no column {text_column!r}; its columns: {', '.join(row)}")
        dataset = dataset.select_columns([text_column]).rename_column(text_column, "text")
    elif not set(row) & {*TOKEN_COLUMNS, *TEXT_COLUMNS}:
        raise ValueError(
            f"{where} has the columns {', '.join(row)}; expected one of "
            f"{', '.join((*TEXT_COLUMNS, *TOKEN_COLUMNS))} (or name yours as text_column)"
        )
    return dataset


def is_tokenized(dataset: Dataset | IterableDataset) -> bool:
    """Whether rows hold token ids rather than text (as SAELens decides it)."""
    return bool(set(next(iter(dataset))) & set(TOKEN_COLUMNS))


def _read(source: str | Path, split: str, streaming: bool | None) -> Dataset | IterableDataset:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, split, bool(streaming))
    if path.is_file():
        return _read_files([path], bool(streaming))
    if path.suffix in FORMATS or isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file or folder: {path.absolute()}")
    try:
        return load_dataset(str(source), split=split, streaming=True if streaming is None else streaming)
    except Exception as error:
        raise ValueError(
            f"{source!r} is neither a file or folder here nor a dataset the hub gave us "
            f"(split {split!r}): {type(error).__name__}: {error}"
        ) from error


def _read_folder(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{path} has no split {split!r}; its splits: {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved
    for suffix in FORMATS:
        if files := sorted(path.glob(f"*{suffix}")):
            return _read_files(files, streaming)
    raise ValueError(
        f"{path} is neither a dataset saved with save_to_disk nor a folder of {', '.join(FORMATS)}"
    )


def _read_files(files: list[Path], streaming: bool) -> Dataset | IterableDataset:
    reader = FORMATS.get(files[0].suffix)
    if reader is None:
        raise ValueError(f"{files[0]}: unknown kind of file; expected one of {', '.join(FORMATS)}")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{', '.join(map(str, files))}: empty")
    options: dict[str, Any] = {"sample_by": "paragraph"} if reader == "text" else {}
    try:
        return load_dataset(
            reader, data_files=[str(file) for file in files], split="train", streaming=streaming, **options
        )
    except Exception as error:
        raise ValueError(f"cannot read {files[0]} as {reader}: {type(error).__name__}: {error}") from error


def measure(store: ActivationsStore, training_tokens: int) -> int | None:
    """Read ahead in ``store`` (nothing is lost) and refuse data that cannot fill one training batch.

    Fewer sequences than one forward of the language model makes that forward smaller. Data that
    ``training_tokens`` goes through more than once gets a warning that says how often.

    Returns:
        Tokens of one epoch that training sees; None where the data goes on and its length is unknown.

    Raises:
        ValueError: no full context, a pretokenised row of another length, or less than one training batch.
    """
    excluded = store.exclude_special_tokens
    taken: list[Tensor] = []
    usable, batch = 0, store.train_batch_size_tokens
    exhausted = True
    for sequence in store.iterable_sequences:
        if len(sequence) != store.context_size:
            raise ValueError(
                f"row {len(taken)} of the tokenised data has {len(sequence)} tokens; every row must have "
                f"the context size, {store.context_size}, or more"
            )
        taken.append(sequence)
        kept = sequence[slice(*store.seqpos_slice)]
        usable += len(kept) if excluded is None else int((~torch.isin(kept, excluded)).sum())
        if usable >= min(training_tokens, PEEK_TOKENS) and len(taken) >= store.store_batch_size_prompts:
            exhausted = False
            break
    documents = store.n_dataset_processed + (not exhausted)
    # (put back even at the end of the data: SAELens starts the next epoch when this runs out)
    store.iterable_sequences = chain(taken, store.iterable_sequences)
    if not taken:
        raise ValueError(
            f"the data ({documents} rows) does not fill one context of {store.context_size} tokens"
        )
    if usable < batch:
        raise ValueError(
            f"the data holds {usable} tokens to train on ({len(taken)} full contexts of {store.context_size} "
            f"without excluded tokens); one training batch needs {batch}"
        )
    prompts = store.store_batch_size_prompts
    if exhausted:
        store.store_batch_size_prompts = prompts = min(prompts, len(taken))
        # SAELens drops what does not fill a last forward.
        tokens: int | None = usable * (len(taken) // prompts * prompts) // len(taken)
        about = ""
    elif isinstance(store.dataset, Dataset):
        tokens, about = ceil(usable * len(store.dataset) / documents), "about "
    else:
        tokens, about = None, ""
    if tokens is not None and tokens < training_tokens:
        warnings.warn(
            f"the data holds {about}{tokens:,} tokens to train on, fewer than training_tokens = "
            f"{training_tokens:,}: training goes through it {about}{training_tokens / tokens:.1f} times",
            stacklevel=2,
        )
    return tokens
