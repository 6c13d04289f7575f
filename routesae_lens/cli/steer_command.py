"""``routesae-lens steer``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routesae_lens.cli.shared import MODEL, RUN, SAE, one_line_errors
from routesae_lens.cli.steer_output import WRITTEN, contexts, dose_table, printable, side_by_side, write

if TYPE_CHECKING:
    from routesae_lens.analysis.feature_set import FeatureSet
    from routesae_lens.analysis.prompts import Prompt
    from routesae_lens.analysis.steering import DoseResponse, SteeredPair

EDITS, TEXT = "The edits", "The text"


def steer(
    sae: Annotated[
        Path,
        typer.Option(help="Folder of a trained RouteSAE, Crosscoder or ordinary SAE.", rich_help_panel=SAE),
    ],
    features: Annotated[
        Path | None,
        typer.Option(
            help="Its features, as FeatureSet.save wrote them: for --relative, and to show their contexts.",
            rich_help_panel=SAE,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="LATENT=VALUE", help="Clamp a latent. Repeatable.", rich_help_panel=EDITS
        ),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="LATENT=VALUE", help="Add to a latent. Repeatable.", rich_help_panel=EDITS),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(metavar="LATENT=FACTOR", help="Multiply a latent. Repeatable.", rich_help_panel=EDITS),
    ] = None,
    ablate: Annotated[
        list[int] | None,
        typer.Option(metavar="LATENT", help="Set a latent to zero. Repeatable.", rich_help_panel=EDITS),
    ] = None,
    dose: Annotated[
        str | None,
        typer.Option(
            metavar="LATENT=V1,V2,...",
            help="Clamp this latent to each value in turn and print the dose-response.",
            rich_help_panel=EDITS,
        ),
    ] = None,
    relative: Annotated[
        bool,
        typer.Option(
            help="--set, --add and --dose are in units of the feature's maximum (needs --features).",
            rich_help_panel=EDITS,
        ),
    ] = False,
    positions: Annotated[
        str,
        typer.Option(
            help="Tokens to steer: all, prompt, generated, or START:STOP (-2: counts back from the prompt's end).",
            rich_help_panel=EDITS,
        ),
    ] = "all",
    layers: Annotated[
        str | None,
        typer.Option(
            help="routed (each token at its routed layer; RouteSAEs), all, or blocks such as 6,7 or 6:9.",
            rich_help_panel=EDITS,
        ),
    ] = None,
    error_term: Annotated[
        bool,
        typer.Option(
            help="Add the edit's effect to the stream, or replace the stream by the edited reconstruction.",
            rich_help_panel=EDITS,
        ),
    ] = True,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to complete. Repeatable.", rich_help_panel=TEXT)
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(
            help='A JSON file with the turns of a chat ([{"role": ..., "content": ...}]), or a list of chats.',
            rich_help_panel=TEXT,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of a completion.", rich_help_panel=TEXT)] = 40,
    sample: Annotated[
        bool,
        typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest.", rich_help_panel=TEXT),
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of the sampling.", rich_help_panel=TEXT)] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many tokens only.", rich_help_panel=TEXT)
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Sampled completions of each prompt.", rich_help_panel=TEXT)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the sampling.", rich_help_panel=TEXT)] = 0,
    model: Annotated[
        str,
        typer.Option(
            help='Hugging Face name, local folder, TransformerLens name (backend hooked), or "demo".',
            rich_help_panel=MODEL,
        ),
    ] = "demo",
    backend: Annotated[str, typer.Option(help="hooked or bridge.", rich_help_panel=MODEL)] = "hooked",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.", rich_help_panel=MODEL)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the model's weights.", rich_help_panel=MODEL)] = "float32",
    output: Annotated[
        Path | None,
        typer.Option(help=f"Folder for {', '.join(WRITTEN)}.", rich_help_panel=RUN),
    ] = None,
    verbose: Annotated[
        bool, typer.Option(help="Print KL and routed block of every token.", rich_help_panel=RUN)
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of errors.", rich_help_panel=RUN)] = False,
) -> None:
    """Complete prompts with features of an SAE edited, beside the model's own completions."""
    from routesae_lens.analysis.completions import GenerationOptions
    from routesae_lens.analysis.steering import dose_response, steer_completions
    from routesae_lens.models import load_model
    from routesae_lens.splice.edits import Ablate, Add, Scale, Set, check_edits, check_positions
    from routesae_lens.splice.hooked import HookedRouteSAETransformer, RouteSAETransformerBridge

    classes = {"hooked": HookedRouteSAETransformer, "bridge": RouteSAETransformerBridge}
    with one_line_errors(debug):
        mistakes = _Mistakes()
        if backend not in classes:
            mistakes.add(f"--backend {backend!r}: expected hooked or bridge")
        edits: dict[int, Any] = {}
        for name, given, make in (
            ("set", set_, lambda value: Set(value, relative)),
            ("add", add, lambda value: Add(value, relative)),
            ("scale", scale, Scale),
        ):
            for pair in given or ():
                with mistakes:
                    _put(edits, name, *_latent_value(name, pair, make))
        for latent in ablate or ():
            with mistakes:
                _put(edits, "ablate", latent, Ablate())
        dose_latent: int | None = None
        values: list[float] = []
        if dose is not None:
            with mistakes:
                dose_latent, values = _latent_value("dose", dose, list, several=True)
        if not edits and dose is None:
            if not any((set_, add, scale, ablate)):
                mistakes.add("nothing to do: give --set, --add, --scale, --ablate or --dose")
        elif relative and not (set_ or add or dose):
            mistakes.add("--relative is for --set, --add and --dose")
        if relative and features is None:
            mistakes.add("--relative needs --features, which knows each feature's maximum")
        prompts: list[Prompt] = list(prompt or ())
        if chat is not None:
            with mistakes:
                prompts += _chats(chat)
        if chat is None and not prompts:
            mistakes.add("nothing to complete: give --prompt or --chat")
        if any(not text for text in prompt or ()):
            mistakes.add("--prompt: a text is empty")
        where: Any = positions
        with mistakes:
            where = _positions(positions)
            check_positions(where)
        options = None
        with mistakes:
            options = GenerationOptions(max_new_tokens, sample, temperature, top_k, seed, samples)
        chosen_layers: Any = None
        with mistakes:
            chosen_layers = _layers(layers)
        if output is not None:
            with mistakes:
                _check_output(output)
        dictionary, found = None, None
        with mistakes:
            dictionary = _load_sae(sae)
        if features is not None:
            with mistakes:
                found = _load_features(features, dictionary)
        if dictionary is not None:
            # (where the file of the maxima is missing, which has been said, the latents still count)
            maxima: Any = {latent: 1.0 for latent in edits} | {dose_latent: 1.0}
            maxima = maxima if found is None else found.max_activation
            for latent, edit in edits.items():
                with mistakes:
                    check_edits({latent: edit}, dictionary.cfg.d_sae, maxima)
            if dose_latent is not None:
                with mistakes:
                    check_edits({dose_latent: Set(1.0, relative)}, dictionary.cfg.d_sae, maxima)
        mistakes.raise_all()
        assert options is not None and dictionary is not None

        loaded: Any = load_model(model, backend, device, dtype, model_class=classes[backend])
        dictionary.to(next(loaded.parameters()).device)
        steering: dict[str, Any] = {"positions": where, "use_error_term": error_term}
        steering["maxima"] = None if found is None else found.max_activation
        if chosen_layers is not None:
            steering["layers"] = chosen_layers
        shown: list[str] = []
        wanted = [*edits, *([] if dose_latent is None or dose_latent in edits else [dose_latent])]
        if found is not None:
            shown += [contexts(found, latent) for latent in wanted]
        pairs: list[SteeredPair] = []
        if edits:
            pairs = steer_completions(loaded, dictionary, edits, prompts, options=options, **steering)
            shown += [side_by_side(pair, verbose) for pair in pairs]
        response: DoseResponse | None = None
        if dose_latent is not None:
            response = dose_response(
                loaded,
                dictionary,
                dose_latent,
                values,
                prompts,
                relative=relative,
                options=options,
                **steering,
            )
            shown.append(dose_table(response))
        text = "\n\n".join(shown)
        typer.echo(printable(text))
        if output is not None:
            settings = {
                "sae": str(sae),
                "model": model,
                "backend": backend,
                "edits": {latent: f"{edit}" for latent, edit in edits.items()},
                "positions": positions,
                "layers": layers,
                "error_term": error_term,
                "generation": asdict(options),
            }
            write(output, settings, pairs, response, text)
            typer.echo(f"Written to {output}/")


class _Mistakes:
    """Collects what is wrong, to say it all at once. As a context it takes the mistake of its block."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, mistake: str) -> None:
        self.found.append(mistake)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, ValueError | TypeError | OSError):
            return False
        self.add(str(error))
        return True

    def raise_all(self) -> None:
        if len(self.found) == 1:
            raise ValueError(self.found[0])
        if self.found:
            raise ValueError(f"{len(self.found)} mistakes:\n" + "\n".join(f"  - {one}" for one in self.found))


def _latent_value(
    option: str, pair: str, make: Callable[[Any], Any], several: bool = False
) -> tuple[int, Any]:
    latent, equals, value = pair.partition("=")
    try:
        if not equals:
            raise ValueError("no =")
        numbers = [float(one) for one in value.split(",")] if several else float(value)
        index = int(latent)
    except ValueError:
        expected = "LATENT=V1,V2,..." if several else "LATENT=VALUE"
        raise ValueError(f"--{option} {pair!r}: expected {expected}, for example 12=20") from None
    if not all(map(math.isfinite, numbers if isinstance(numbers, list) else [numbers])):
        raise ValueError(f"--{option} {pair!r}: expected finite numbers")
    return index, make(numbers)


def _put(edits: dict[int, Any], option: str, latent: int, edit: Any) -> None:
    if latent in edits:
        raise ValueError(f"--{option}: latent {latent} is edited twice")
    edits[latent] = edit


def _positions(positions: str) -> str | slice:
    if ":" not in positions:
        return positions
    try:
        bounds = [int(bound) if bound else None for bound in positions.split(":")]
    except ValueError:
        bounds = []
    if len(bounds) != 2:
        raise ValueError(f"--positions {positions!r}: expected all, prompt, generated or START:STOP")
    return slice(*bounds)


def _layers(layers: str | None) -> Any:
    from routesae_lens.hook_points import parse_layers

    return layers if layers in (None, "routed", "all") else parse_layers(str(layers))


def _chats(path: Path) -> list[Prompt]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--chat {path} is no JSON: {error}") from error
    chats = [content] if isinstance(content, list) and content and isinstance(content[0], dict) else content
    if not isinstance(chats, list) or not chats or not all(isinstance(one, list) and one for one in chats):
        raise ValueError(f"--chat {path}: expected a list of turns, or a list of such lists")
    for turn in (turn for one in chats for turn in one):
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(k), str) for k in ("role", "content")
        ):
            raise ValueError(f'--chat {path}: expected turns {{"role": ..., "content": ...}}, got {turn!r}')
    return chats


def _load_sae(folder: Path) -> Any:
    """From JSON and safetensors; nothing in the folder is executed."""
    from sae_lens import SAE

    if not (folder / "cfg.json").is_file():
        raise ValueError(f"--sae {folder}: no such SAE (expected a folder with cfg.json)")
    try:
        sae = SAE.load_from_disk(folder, device="cpu")
    except Exception as error:  # damaged files fail in many ways
        raise ValueError(
            f"--sae {folder} holds no SAE in inference form ({type(error).__name__}: {error}). Of a training SAE "
            "save the inference form: sae.save_inference_model(folder)"
        ) from error
    sae.requires_grad_(False)
    return sae


def _load_features(path: Path, sae: Any) -> FeatureSet:
    from routesae_lens.analysis.feature_set import FeatureSet

    if not path.is_file():
        raise ValueError(f"--features {path}: no such file")
    found = FeatureSet.load(path)
    if sae is not None and len(found.max_activation) != sae.cfg.d_sae:
        raise ValueError(
            f"--features {path} is about {len(found.max_activation)} latents, and the SAE has {sae.cfg.d_sae}"
        )
    return found


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; expected a folder")
    if output.exists() and (others := sorted({one.name for one in output.iterdir()} - {*WRITTEN})):
        raise ValueError(f"--output {output} holds something else ({', '.join(others[:3])}); choose another")
