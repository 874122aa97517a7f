"""Checkpoints by name: from a hub on this machine, out of the cache, and what is said when neither has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints import make_llama_checkpoint
from tests.fake_hub import FakeHub, fake_hub
from tritonmind.errors import CheckpointError
from tritonmind.hub import local_model
from tritonmind.model_source import open_model
from tritonmind.workspace import Workspace
from tritonmind_tools.cli import main

NAME = "tiny-org/tiny-chat"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    make_llama_checkpoint(folder, num_layers=1)
    extras = ("pytorch_model.bin", "modeling_tiny.py", "README.md", "onnx/model.safetensors", "onnx/tokenizer.json")
    for extra in (*extras, "consolidated.safetensors"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not to be downloaded")
    return folder


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes huggingface_hub use this address and an empty cache, as the environment does when it is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_mine")

    def settle(url: str, *, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return settle


def refused(name: str) -> str:
    with pytest.raises(CheckpointError) as error:
        local_model(name)
    return str(error.value)


def downloaded(hub: FakeHub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}


def test_a_name_is_downloaded_once_and_then_read_without_the_network(
    repository: Path, use: Callable[..., None], tmp_path: Path
) -> None:
    with fake_hub({NAME: repository}) as hub:
        use(hub.url)
        workspace = tmp_path / "workspace"
        assert main(["convert", "tiny", NAME, "--dst-path", str(workspace)]) == 0
        assert Workspace.open(workspace).model.num_layers == 1
        assert {token for method, _, token in hub.requests if method == "HEAD"} == {"hf_mine"}
        wanted = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
        assert wanted | {"tokenizer_config.json", "chat_template.jinja"} == downloaded(hub)
        hub.requests.clear()
        found = local_model(NAME, allow_pickle=True)
        assert found.name == "tiny-chat" and not downloaded(hub)
        assert open_model(found.path).model.model_name == "tiny-chat", "its folder has the revision's name"
    use(hub.url, offline=True)
    source = open_model(NAME)
    assert source.model.model_name == "tiny-chat" and (source.tokenizer_dir / "tokenizer.json").is_file()
    assert f"{NAME}-2 is not in the cache, and HF_HUB_OFFLINE" in refused(f"{NAME}-2")


def test_what_the_hub_refuses(repository: Path, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = repository / "only_pickle"
    weights.mkdir(exist_ok=True)
    (weights / "pytorch_model.bin").write_bytes(b"x")
    (weights / "config.json").write_text("{}")
    with fake_hub({NAME: repository, "org/gated": repository, "org/pickle": weights}, gated={"org/gated"}) as hub:
        use(hub.url)
        assert "the hub has no such repository" in (message := refused("org/nothing"))
        assert "org/nothing does not exist here" in message
        assert f"{NAME}@v9: the repository {NAME} has no revision v9" in refused(f"{NAME}@v9")
        assert "org/pickle: that repository has no safetensors" in (message := refused("org/pickle"))
        assert "--allow-pickle" in message and "pytorch_model.bin" not in downloaded(hub)
        folder, name = local_model("org/pickle", allow_pickle=True)
        assert (folder / "pytorch_model.bin").read_bytes() == b"x" and name == "pickle"
        monkeypatch.delenv("HF_TOKEN")
        assert "org/gated: access to that repository must be granted" in refused("org/gated")
    use("http://127.0.0.1:9")
    assert "org/other is not in the cache, and the hub cannot be reached" in refused("org/other")


def test_paths_are_never_asked_for(use: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub({}) as hub:
        use(hub.url)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "org" / "model").mkdir(parents=True)
        for path in ("org/model", "./org/other", "/org/other", "../org/other", "model", "a/b/c", "random:llama2-7b"):
            assert local_model(path) == local_model(Path(path)) == (Path(path), None)
        assert not hub.requests
