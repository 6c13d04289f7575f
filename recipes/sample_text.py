"""Sample the text that ships with the project from the demo model itself.

    python recipes/sample_text.py            # about 45 minutes on two CPU cores

One document for every (genre, topic) pair of the lists below, sampled from SmolLM2-135M-Instruct
through its chat template at temperature 0.9 and top-k 100, deduplicated by exact lines and by
shared 8-word shingles. It is model text: right for trying the package without any download,
wrong for claims about natural language (see `--dataset` of the recipes for real text).
"""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from routesae_lens import demo_model_path, demo_text_path

GENRES = (
    "Write a news report about {}.",
    "Write a short story about {}.",
    "Explain {} to a curious child.",
    "Write an encyclopedia entry about {}.",
    "Write a dialogue between two friends who talk about {}.",
    "Write a personal letter that mentions {}.",
    "Give step-by-step instructions related to {}.",
    "Write a persuasive essay about {}.",
    "Write a review of a book about {}.",
    "Write a diary entry about {}.",
    "Write an interview with an expert on {}.",
    "List ten facts and numbers about {}, with one sentence each.",
    "Write a lecture for students about {}.",
    "Write a poem and then a comment on it, about {}.",
    "Write questions and answers about {}.",
    "Describe the history of {} with dates.",
    "Write an email to a colleague about {}.",
    "Write a scene from a play about {}.",
    "Write a blog post with a personal opinion on {}.",
    "Compare two common views on {}.",
    "Write a speech for a public event about {}.",
    "Write a Python program related to {} and explain it.",
    "Write a travel guide paragraph by paragraph, touching on {}.",
    "Describe a problem with {} and how it was solved.",
)
TOPICS = (
    "rivers and floods", "bread baking", "the moon", "railways", "football", "honey bees",
    "the stock market", "vaccines", "a city library", "volcanoes", "jazz music", "chess",
    "the Roman Empire", "electric cars", "mountain climbing", "whales", "school exams",
    "wine making", "earthquakes", "a murder trial", "climate change", "coffee", "robots",
    "the French Revolution", "gardening", "old bridges", "dreams", "the human heart", "pirates",
    "mathematics", "space telescopes", "marriage", "elections", "dinosaurs", "sleep", "gold",
    "the postal service", "snow", "photography", "a lost dog", "computer programming", "taxes",
    "tea", "the Olympic Games", "spiders", "glass", "refugees", "clocks and time", "potatoes",
    "opera", "antibiotics", "deserts", "bicycles", "ghosts", "trade unions", "airports",
    "the brain", "wool and weaving", "lighthouses", "fishing", "languages", "prisons", "rice",
    "friendship", "steel", "the Internet", "horses", "islands", "cheese", "architecture",
)  # fmt: skip
DEMO_TEXT = demo_text_path()
SHINGLE = 8
"""Words in a row; a document most of whose runs were seen before is a repetition."""


def documents(model, tokenizer, prompts: list[str], batch_size: int, max_new_tokens: int):
    """Yield (prompt, sampled text), in batches, with a progress bar."""
    for start in tqdm(range(0, len(prompts), batch_size), unit="batch"):
        batch = prompts[start : start + batch_size]
        chats = [[{"role": "user", "content": prompt}] for prompt in batch]
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        out = model.generate(
            **inputs.to(model.device),
            do_sample=True,
            temperature=0.9,
            top_k=100,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = out[:, inputs["input_ids"].shape[1] :]
        yield from zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)


def deduplicated(text: str, seen_lines: set[str], seen_shingles: set[int]) -> str | None:
    """``text`` without lines met before, or None where too little or mostly repetition is left."""
    lines = []
    for line in text.strip().splitlines():
        key = line.strip().lower()
        if len(key) > 40 and key in seen_lines:
            continue
        seen_lines.add(key)
        lines.append(line)
    kept = "\n".join(lines).strip()
    words = kept.lower().split()
    shingles = {hash(tuple(words[i : i + SHINGLE])) for i in range(len(words) - SHINGLE + 1)}
    repeated_inside = len(shingles) < 0.6 * max(1, len(words) - SHINGLE + 1)
    repeated_before = len(shingles & seen_shingles) > 0.3 * len(shingles)
    if len(words) < 60 or repeated_inside or repeated_before:
        return None
    seen_shingles |= shingles
    return kept


def main(
    out: Path = DEMO_TEXT,
    seed: int = 0,
    batch_size: int = 48,
    max_new_tokens: int = 400,
    tokens: int = typer.Option(560_000, help="Stop once this many tokens are kept."),
) -> None:
    """Sample, deduplicate, and write Parquet with columns `text`, `topic`, `prompt`."""
    torch.manual_seed(seed)
    prompts = [(genre.format(topic), topic) for genre, topic in product(GENRES, TOPICS)]
    random.Random(seed).shuffle(prompts)
    topic_of = dict(prompts)
    path = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model.to(device).eval()

    seen_lines: set[str] = set()
    seen_shingles: set[int] = set()
    rows, kept_tokens, sampled = [], 0, 0
    names = [prompt for prompt, _ in prompts]
    for prompt, text in documents(model, tokenizer, names, batch_size, max_new_tokens):
        sampled += 1
        if (kept := deduplicated(text, seen_lines, seen_shingles)) is None:
            continue
        rows.append({"text": kept, "topic": topic_of[prompt], "prompt": prompt})
        kept_tokens += len(tokenizer(kept, add_special_tokens=False)["input_ids"])
        if sampled % 480 == 0:
            print(f"{sampled} sampled, {len(rows)} kept, {kept_tokens} tokens", flush=True)
        if kept_tokens >= tokens:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(out, compression="zstd", index=False)
    print(f"{out}: {len(rows)} documents, {kept_tokens} tokens, {out.stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)
