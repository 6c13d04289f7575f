"""RouteSAEs on the Hugging Face hub: a local server stands for it, everything above HTTP is the real thing."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from crosscoders import make as make_crosscoder
from routed_saes import LAYERS, make, stacks
from sae_lens import SAE, TopKSAE

from routesae_lens.saes.forms import inference_form
from routesae_lens.saes.hub import load_from_hub, model_card, push_to_hub
from routesae_lens.saes.route_sae import RouteSAE

REPO = "somebody/tiny-route-saes"


class Hub:
    """Repositories in memory: name -> commits, each a whole tree of files."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.created: list[dict[str, Any]] = []

    @staticmethod
    def commit_id(number: int) -> str:
        return hashlib.sha1(str(number).encode()).hexdigest()

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo)
        if commits is None:
            return None
        for number, files in enumerate(commits):
            if revision == self.commit_id(number) or (revision == "main" and number == len(commits) - 1):
                return self.commit_id(number), files
        return None


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def url(self, path: str) -> str:
            return f"http://{self.headers['Host']}/{path}"

        def reply(self, status: int, content: bytes | Any = b"", **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, what: str) -> None:
            self.reply(404, {"error": what}, X_Error_Code=what, X_Error_Message=what)

        def do_GET(self) -> None:
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repo = "/".join(parts[2:4])
                found = hub.tree(repo, "main")
                return (
                    self.reply(200, {"id": repo, "sha": found[0]}) if found else self.missing("RepoNotFound")
                )
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            found = hub.tree(repo, revision)
            if found is None:
                return self.missing("RevisionNotFound" if repo in hub.repos else "RepoNotFound")
            commit, files = found
            if name not in files:
                return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.reply(200, files[name], ETag=etag, X_Repo_Commit=commit)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked.get('organization', 'somebody')}/{asked['name']}"
                if name in hub.repos:
                    return self.reply(409, {"error": "exists", "url": self.url(name)})
                hub.repos[name] = [{}]
                hub.created.append(asked)
                return self.reply(200, {"url": self.url(name)})
            if parts == ["api", "validate-yaml"]:
                return self.reply(200, {"errors": [], "warnings": []})
            repo = "/".join(parts[2:4])
            if repo not in hub.repos:
                return self.missing("RepoNotFound")
            if parts[4] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": files})
            assert parts[4] == "commit", self.path
            files = dict(hub.repos[repo][-1])
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            hub.repos[repo].append(files)
            oid = hub.commit_id(len(hub.repos[repo]) - 1)
            return self.reply(
                200, {"commitOid": oid, "commitUrl": self.url(f"{repo}/commit/{oid}"), "hookOutput": ""}
            )

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub talks to a server of this test, with a token and a cache of its own."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    cache = str(tmp_path / "cache")
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": cache,
    }.items():
        assert hasattr(constants, name), name
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    import huggingface_hub

    for module in (huggingface_hub.file_download, huggingface_hub.hf_api):
        for name in ("ENDPOINT", "HF_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(constants, name))
    huggingface_hub.hf_api.api.endpoint, before = endpoint, huggingface_hub.hf_api.api.endpoint
    yield hub
    huggingface_hub.hf_api.api.endpoint = before
    server.shutdown()
    server.server_close()


def route_sae(**kwargs: Any) -> Any:
    return make("topk", routing="distilled", aggregator="mean", **kwargs)


def same(one: SAE[Any], other: SAE[Any]) -> None:
    assert type(one) is type(other)
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, theirs.pop(name))
    assert not theirs


def test_pushed_and_loaded_through_sae_lens(hub: Hub):
    training = route_sae()
    training.cfg.metadata.model_name = "/home/me/models/SmolLM2"
    training.cfg.metadata.dataset_path = "HuggingFaceFW/fineweb"
    sae, crosscoder = inference_form(training), inference_form(make_crosscoder("topk"))
    card = push_to_hub({"k3": training, "others/cross": crosscoder}, REPO, private=True, license="mit")

    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    files = hub.repos[REPO][-1]
    assert sorted(files) == [
        "README.md",
        *(
            f"{folder}/{name}"
            for folder in ("k3", "others/cross")
            for name in ("cfg.json", "sae_weights.safetensors")
        ),
    ]
    assert files["README.md"].decode() == str(card)
    metadata = json.loads(files["k3/cfg.json"])["metadata"]
    assert (metadata["model_name"], metadata["dataset_path"]) == ("SmolLM2", "HuggingFaceFW/fineweb")
    assert training.cfg.metadata.model_name == "/home/me/models/SmolLM2"

    loaded = SAE.from_pretrained(REPO, "k3")  # SAELens' own
    assert isinstance(loaded, RouteSAE)
    same(loaded, sae)
    x = stacks(2, 5)
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded.route(x).layer, sae.route(x).layer)
    same(RouteSAE.from_pretrained(REPO, "k3"), sae)
    same(SAE.from_pretrained(REPO, "others/cross"), crosscoder)


def test_a_fixed_revision_and_its_dtype(hub: Hub):
    first, second = inference_form(route_sae(seed=1)), inference_form(route_sae(seed=2)).to(torch.bfloat16)
    push_to_hub({"k3": first}, REPO)
    old = hub.commit_id(len(hub.repos[REPO]) - 1)
    push_to_hub({"k3": second}, REPO)  # the repository and its card exist
    assert len(hub.created) == 1
    same(load_from_hub(REPO, "k3", revision=old), first)
    newest = load_from_hub(REPO, "k3")
    same(newest, second)
    assert newest.dtype == torch.bfloat16
    assert SAE.from_pretrained(REPO, "k3").dtype == torch.float32
    with pytest.raises(ValueError, match="holds no SAE 'k4'"):
        load_from_hub(REPO, "k4")
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with pytest.raises(RevisionNotFoundError):
        load_from_hub(REPO, "k3", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        load_from_hub("somebody/nothing", "k3")


def test_layer_views_go_to_the_hub_too(hub: Hub):
    view = inference_form(route_sae()).layer_view(3)  # type: ignore[attr-defined]
    push_to_hub({"block 3": view}, REPO)
    loaded = SAE.from_pretrained(REPO, "block 3")
    assert type(loaded) is TopKSAE
    assert loaded.cfg.normalize_activations == "layer_norm" and loaded.cfg.metadata.layer_view["layer"] == 3
    same(loaded, view)


def test_a_local_folder_is_a_repository(tmp_path: Path):
    sae = inference_form(route_sae())
    sae.save_model(tmp_path / "repo" / "k3")
    same(load_from_hub(str(tmp_path / "repo"), "k3"), sae)
    with pytest.raises(ValueError, match="has no revision 'main'"):
        load_from_hub(str(tmp_path / "repo"), "k3", revision="main")
    with pytest.raises(ValueError, match="holds no SAE"):
        load_from_hub(str(tmp_path / "repo"), "k4")


def test_a_downloaded_repository_loads_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    push_to_hub({"k3": route_sae()}, REPO)
    online = load_from_hub(REPO, "k3")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(load_from_hub(REPO, "k3"), online)


EVALUATION = {
    "tokens": 4096,
    "kl": 0.123456,
    "l0": 31.5,
    "kl_unscaled": None,
    "layer_share": {"1": 0.25, "3": 0.5, "4": 0.25},
    "splice": "a | b <script>",
}


def test_the_card_says_what_it_is(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    sae = route_sae()
    sae.cfg.metadata.model_name = "HuggingFaceTB/SmolLM2-135M"
    sae.cfg.metadata.context_size = 128
    card = model_card(
        {"k3": sae, "bare": make("jumprelu")},
        REPO,
        evaluations={"k3": tmp_path / "evaluation.json"},
        license="apache-2.0",
    )
    assert card.data.library_name == "saelens" and card.data.license == "apache-2.0"
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M"]
    text = card.text
    for row in (
        "| Architecture | `route_topk` |",
        "| Architecture | `route_jumprelu` |",
        f"| Blocks read | {', '.join(map(str, LAYERS))} |",
        "| Routing | distilled |",
        "| Router input: layers pooled by | mean |",
        "| k | 3 |",
        "| Each token's activations standardised | yes |",
        "| Context | 128 |",
        "| KL(original ‖ spliced), nats per token | 0.1235 |",
        "| 3 | 50.0% |",
        "| Splice | a \\| b &lt;script> |",
    ):
        assert text.count(f"\n{row}\n") >= 1, row
    assert text.count("No evaluation was given.") == 1
    assert "import routesae_lens" in text and f"SAE.from_pretrained('{REPO}', 'k3')" in text
    assert "`apache-2.0`" in text and "@misc{shi2025routesae" in text
    assert "stated none" in model_card({"k3": sae}, REPO).text


def test_wrong_input_is_named_before_anything_is_sent(hub: Hub, tmp_path: Path):
    sae = route_sae()
    (tmp_path / "list.json").write_text("[]")
    for saes, options, message in (
        ({}, {}, "no SAEs given"),
        ({"k3": "folder"}, {}, "expected an SAE under 'k3', got str"),
        ({"../k3": sae}, {}, "no folder inside a repository"),
        ({"/k3": sae}, {}, "no folder inside a repository"),
        ({"": sae}, {}, "no folder inside a repository"),
        ({"k3": sae}, {"evaluations": {"k4": {}}}, r"evaluations of \['k4'\]"),
        ({"k3": sae}, {"evaluations": {"k3": tmp_path / "none.json"}}, "not readable"),
        ({"k3": sae}, {"evaluations": {"k3": tmp_path / "list.json"}}, "expected a JSON object"),
    ):
        with pytest.raises(ValueError, match=message):
            push_to_hub(saes, REPO, **options)  # type: ignore[arg-type]
    assert hub.repos == {} and hub.created == []
    for sae_id in ("../k3", str(tmp_path / "k3"), ""):
        with pytest.raises(ValueError, match="no folder inside a repository"):
            load_from_hub(str(tmp_path), sae_id)
