"""`memfactory push --upload` sends the folder to a Hub with the user's token, and says what a refused token needs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfactory.cli.push import push
from memfactory.errors import EngineError
from tests.push.hub import READER, TOKEN, Hub
from tests.push.test_push import make_run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def test_an_upload_makes_the_repository_and_sends_every_file_with_the_token(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    # LFS as it stands in its specification; Xet's chunks would need a second server
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    start = "from memfactory.cli.main import main; main()"
    command = [sys.executable, "-c", start, "push", str(run.path), "--repo", "ann/boats", "--private"]
    for number in (1, 2):
        output = tmp_path / f"hub{number}"
        done = subprocess.run(
            [*command, "--upload", "--output", str(output)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/ann/boats")
    ((name, asked),) = hub.repos.items()
    assert (name, asked["visibility"]) == ("ann/boats", "private")
    written = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "recipe.yaml"} < set(written)
    assert hub.files["ann/boats"] == written
    assert [len(content) for content in hub.stored.values()] == [len(written["model.safetensors"])]
    assert hub.commits == ["Upload with memfactory push"] * 2
    assert hub.tokens == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(("token", "why"), [("hf_wrong", "401"), (READER, "403")])
def test_a_refused_token_is_told_as_such_and_the_folder_stays(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str, why: str
) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(EngineError) as found:
        push(run.path, output=tmp_path / "hub", repo="ann/boats", upload=True)
    assert found.value.what == "ann/boats could not be uploaded: the Hub refused the token"
    assert why in found.value.why
    assert token not in str(found.value)
    assert "write access to ann" in found.value.fix
    assert f"hf upload ann/boats {tmp_path / 'hub'}" in found.value.fix
    assert (tmp_path / "hub" / "model.safetensors").is_file()
    assert hub.tokens == {f"Bearer {token}"}
    assert not hub.repos


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(EngineError, match="could not be uploaded") as found:
        push(run.path, output=tmp_path / "hub", repo="ann/boats", upload=True)
    assert "is whole: try again" in found.value.fix
    assert "token" not in found.value.what
