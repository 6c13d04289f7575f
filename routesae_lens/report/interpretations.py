"""What a judge said of the features of one SAE: the result, its mean score, and the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routesae_lens.report.answers import write_whole
from routesae_lens.report.prompt import CATEGORIES, Interpretation, one_line

FORMAT = "routesae_lens.interpretations/1"


@dataclass(frozen=True)
class Usage:
    """Tokens, as the judge counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    answers: int = 0
    answers_without_usage: int = 0
    """Answers for which the judge gave no count: their tokens are in none of the sums."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def cost(self, input_price: int | float, output_price: int | float) -> float:
        """In the unit of the prices, which are per million tokens."""
        return (self.prompt_tokens * input_price + self.completion_tokens * output_price) / 1e6


@dataclass(frozen=True)
class MeanScore:
    """Mean of the scores with the confidence interval of Student's t.

    It covers the drawing of features, not what the judge would say if asked again, and speaks only of features
    whose answer could be read.
    """

    mean: float | None
    """None without scores."""
    low: float | None
    """Within 1 to 5; None with fewer than two scores."""
    high: float | None
    n: int
    confidence: float


@dataclass
class Interpretations:
    """Categories, scores and explanations of features of one SAE by one judge.

    Raises:
        ValueError: a latent in two of the groups, or one that is no latent.
    """

    sae: str
    judge: dict[str, Any]
    """kind ("endpoint", "local" or "people"), model, base_url, temperature, parameters."""
    prompt_sha256: str
    """Of the prompt's wording."""
    seed: int
    """Of the drawing."""
    max_contexts: int | None
    """Contexts shown of each feature at most; None for all kept ones."""
    available: int
    """Interpretable features that the sample was drawn from."""
    features: dict[int, Interpretation]
    unparsed: dict[int, str] = field(default_factory=dict)
    """Answers that are not in the format asked for, raw. Untrusted text."""
    failed: dict[int, str] = field(default_factory=dict)
    """Why there is no answer; the next run asks again."""
    usage: Usage = field(default_factory=Usage)
    """Of all answers, those of earlier runs too."""
    paid: Usage = field(default_factory=Usage, compare=False)
    """Of the answers that this run asked for; not saved."""

    def __post_init__(self) -> None:
        latents = [*self.features, *self.unparsed, *self.failed]
        for latent in latents:
            if type(latent) is not int or latent < 0:
                raise ValueError(f"latent must be a whole number of 0 or more, got {latent!r}")
        twice = [latent for latent, count in Counter(latents).items() if count > 1]
        if twice:
            raise ValueError(f"latents {twice} are in more than one of features, unparsed and failed")

    @property
    def asked(self) -> int:
        """Features asked about, whatever came of it."""
        return len(self.features) + len(self.unparsed) + len(self.failed)

    @property
    def category_counts(self) -> dict[str, int]:
        """Number of features in each category."""
        counts = Counter(one.category for one in self.features.values())
        return {category: counts[category] for category in CATEGORIES}

    def mean_score(self, confidence: float = 0.95) -> MeanScore:
        """Mean score with confidence interval.

        Raises:
            ValueError: confidence not between 0 and 1.
        """
        from scipy import stats

        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
        scores = [one.score for one in self.features.values()]
        if not scores:
            return MeanScore(None, None, None, 0, confidence)
        mean = sum(scores) / len(scores)
        if len(scores) == 1:
            return MeanScore(mean, None, None, 1, confidence)
        error = float(stats.sem(scores))
        half = float(stats.t.ppf((1 + confidence) / 2, len(scores) - 1)) * error
        return MeanScore(mean, max(mean - half, 1.0), min(mean + half, 5.0), len(scores), confidence)

    def summary(self) -> str:
        """One line for people."""
        score = self.mean_score()
        shown = "no score" if score.mean is None else f"mean score {score.mean:.2f}"
        if score.low is not None:
            shown += f" ({score.confidence:.0%} CI {score.low:.2f} to {score.high:.2f})"
        counts = ", ".join(f"{count} {category}" for category, count in self.category_counts.items())
        return (
            f"{self.sae}: {shown}, n = {score.n} of {self.asked} asked ({counts}); "
            f"{len(self.unparsed)} unparsed, {len(self.failed)} failed"
        )

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/<sae>.json``, whole or not at all, and return its path."""
        path = result_path(folder, self.sae)
        data = {"format": FORMAT, **asdict(self), "mean_score": asdict(self.mean_score())}
        del data["paid"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # ASCII alone, as for features: explanations are text of a stranger.
        write_whole(path, json.dumps(data, indent=1, allow_nan=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Interpretations:
        """Read what :meth:`save` wrote. Explanations remain what a model wrote: escape them where shown.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, one of another format, or a damaged one.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no interpretations: {type(error).__name__}: {error}") from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path} holds no interpretations: expected format {FORMAT!r}, got {found!r}")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is a damaged file of interpretations: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> Interpretations:
        kinds: dict[str, type | tuple[type, ...]] = {
            "sae": str,
            "judge": dict,
            "prompt_sha256": str,
            "seed": int,
            "max_contexts": (int, type(None)),
            "available": int,
        }
        for name, kind in kinds.items():
            if not isinstance(data[name], kind) or isinstance(data[name], bool):
                raise ValueError(f"{name} is {data[name]!r}")
        if data["judge"].get("kind") not in ("endpoint", "local", "people"):
            raise ValueError(f"judge is {data['judge']!r}")
        if not isinstance(data["judge"].get("model"), str):
            raise ValueError(f"the judge's model is {data['judge'].get('model')!r}")
        usage = Usage(**data["usage"])
        if any(type(count) is not int or count < 0 for count in asdict(usage).values()):
            raise ValueError(f"usage is {data['usage']!r}")
        return cls(
            **{name: data[name] for name in kinds},
            features={_latent(one): Interpretation(**said) for one, said in data["features"].items()},
            unparsed=_texts(data["unparsed"]),
            failed=_texts(data["failed"]),
            usage=usage,
        )


def result_path(folder: str | Path, sae: str) -> Path:
    """Where the interpretations of an SAE are.

    Raises:
        ValueError: a name that cannot be a file's.
    """
    unfit = sae != one_line(sae) or sae.startswith(".") or any(char in sae for char in '/\\:<>"|?*')
    if not sae or unfit or len(sae) > 200:
        raise ValueError(f"the SAE's name cannot be the name of a file: {sae!r}; rename the feature set")
    return Path(folder) / f"{sae}.json"


def _latent(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or str(int(text)) != text:
        raise ValueError(f"latent must be a whole number of 0 or more, got {text!r}")
    return int(text)


def _texts(data: Mapping[str, Any]) -> dict[int, str]:
    if not all(isinstance(text, str) for text in data.values()):
        raise ValueError("unparsed and failed must hold text")
    return {_latent(latent): text for latent, text in data.items()}
