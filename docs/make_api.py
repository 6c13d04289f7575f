"""Write docs/api.md: a line for every public name, its docstring's first, by theme.

    python docs/make_api.py

``make docs`` runs it and builds the full reference beside. Sources are parsed, not imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"

HEAD = """# API reference

Everything `import routesae_lens` gives, by theme. `make docs` builds the full reference, arguments, errors and fields
included, as `build/docs/routesae_lens.html`.

<!-- Written by `python docs/make_api.py` from the docstrings. Change those, not this page. -->
"""

# Where a module belongs: the first entry that it begins with.
THEMES = {
    "Models and hook points": ("demo", "models", "backends", "hook_points"),
    "RouteSAEs, Crosscoders, routers": (
        "saes.route_sae",
        "saes.forms",
        "saes.layers",
        "saes.router",
        "saes.architectures",
        "saes.crosscoder",
        "saes.authors",
    ),
    "[Experts](experts.md)": ("saes.expert",),
    "[Llama Scope](llama_scope.md)": (
        "saes.k_annealing",
        "saes.transcoder",
        "training.positions",
        "training.presets",
        "analysis.jumprelu",
        "analysis.firing",
        "analysis.generalisation",
        "analysis.model_comparison",
        "analysis.geometry",
        "analysis.match_distribution",
        "analysis.feature_map",
        "report.geometry",
    ),
    "[Train](train.md)": ("training.train", "training.data", "training.interruption"),
    "[Sweep](sweep.md)": ("training.sweep", "training.methods", "training.memory"),
    "[Evaluate](evaluate.md)": (
        "analysis.evaluate",
        "analysis.metrics",
        "analysis.next_tokens",
        "analysis.stream",
        "splice.late_logits",
        "splice.replace",
    ),
    "[Features and routes](interpret.md#features)": (
        "analysis.feature",
        "analysis.contexts",
        "analysis.layer_profiles",
        "analysis.routing",
        "analysis.token_classes",
    ),
    "[Stitch](stitching.md)": (
        "analysis.latent_split",
        "analysis.stitched_sae",
        "analysis.insertion",
        "analysis.stitching",
        "analysis.layer_coverage",
        "report.stitching_plots",
    ),
    "[Meta-SAEs](meta_saes.md)": ("training.meta_sae", "analysis.meta_latents", "report.meta_record"),
    "[Redundancy](redundancy.md)": (
        "analysis.redundancy",
        "analysis.activation_overlap",
        "analysis.expert_use",
        "analysis.token_sets",
    ),
    "[Interpret](interpret.md) and report": ("report",),
    "[Steer](steer.md)": ("splice", "analysis.steering", "analysis.completions", "analysis.prompts"),
    "[Export](export.md)": ("saes.layer_views", "saes.hub", "analysis.view_differences"),
}


def api_page() -> str:
    """The text of docs/api.md.

    Raises:
        ValueError: public names without a docstring, or in a module that no theme has.
    """
    lines: dict[str, list[str]] = {theme: [] for theme in THEMES}
    wrong = []
    for name, module in public_names().items():
        theme = next((theme for theme, starts in THEMES.items() if module.startswith(starts)), None)
        said = first_line(name, module)
        if theme is None:
            wrong.append(f"{name}: {module} is in no theme of docs/make_api.py")
        elif not said:
            wrong.append(f"{name}: no docstring in routesae_lens/{module.replace('.', '/')}.py")
        else:
            lines[theme].append(f"| `{name}` | {said} |")
    if wrong:
        raise ValueError("docs/api.md cannot be written:\n" + "\n".join(wrong))
    tables = [
        f"\n## {theme}\n\n| name | |\n| --- | --- |\n" + "\n".join(rows) + "\n"
        for theme, rows in lines.items()
        if rows
    ]
    return HEAD + "".join(tables)


def public_names() -> dict[str, str]:
    """Every name of ``routesae_lens.__all__`` with the module that it comes from, in the order of the imports."""
    tree = ast.parse((ROOT / "routesae_lens" / "__init__.py").read_text(encoding="utf-8"))
    exported: list[str] = []
    modules = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("routesae_lens."):
            modules |= {alias.name: node.module.removeprefix("routesae_lens.") for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
    if strangers := {*exported} - {*modules}:
        raise ValueError(f"in __all__, but imported from no module of the package: {sorted(strangers)}")
    return {name: module for name, module in modules.items() if name in exported}


def first_line(name: str, module: str) -> str:
    """The first paragraph of the docstring of ``name``, on one line, as Markdown; empty where there is none."""
    body = ast.parse((ROOT / "routesae_lens" / f"{module.replace('.', '/')}.py").read_text("utf-8")).body
    said: str | None = None
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            said = ast.get_docstring(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets) and isinstance(after, ast.Expr):
                said = str(ast.literal_eval(after.value))  # the string under a constant
    paragraph = " ".join((said or "").strip().split("\n\n")[0].split())
    paragraph = re.sub(r":\w+:`~?([\w.]+\.)?(\w+)`", r"`\2`", paragraph).replace("``", "`")
    return paragraph.replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
