"""Bad input through the front door: one line, exit code 2, nothing half-written."""

import errno
import json
from pathlib import Path

import pytest

import tracestill
from configs.load import RECIPES


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # noqa: ANN201
    """Calls the command line in this process: (exit code, the error line)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["tracestill", *words])
        try:
            tracestill.main()
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
        return int(str(code)), capsys.readouterr().err.strip()

    return call


def recipe(folder: Path, *lines: object, extra: str = "") -> str:
    (folder / "p.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    path = folder / "recipe.yaml"
    path.write_text(f"name: mine\ngenerate: {{prompts: [{{type: jsonl, path: p.jsonl}}]}}\n{extra}")
    return str(path)


FINE = {"question": "What?", "split": "train"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "embeded"], "did you mean embedded?"),
        (["run", "missing.yaml"], "recipe missing.yaml: no such file"),
        (["run", "embedded", "-s", "train.leraning_rate=1"], "train.leraning_rate: unknown key; "),
        (["run", "embedded", "-s", "train.lr=0"], "train.lr: input should be greater than 0"),
        (["run", "embedded", "-s", "train.lr"], "expected key=value"),
        (["run", "embedded", "--nonsense"], "No such option: --nonsense"),
        (["run", "embedded", "-s", "teacher.model=weights/none"], "teacher.model weights/none: no such folder"),
        (["run", "embedded", "-s", "student.model=weights/none"], "student.model weights/none: no such folder"),
        (["report", "nowhere"], "nowhere: not a run folder"),
        (["data", "stats", "nowhere"], "nowhere: not a run folder"),
        (["submit", "embedded", "--only", "trian"], "--only trian: no stage of this recipe; expected one of prompts, headroom,"),
        (["submit", "embedded", "--from", "train", "--only", "train"], "--from and --only: expected one of them"),
        (["submit", "embedded", "-s", "slurm.site=none.yaml"], "slurm.site none.yaml: no such file"),
        (["submit", "embedded", "-s", "slurm.time_limit=00:05:00"], "leaves no time to work"),
        (["status", "nowhere"], "nowhere: not a run folder"),
        (["cancel", "nowhere"], "nowhere: not a run folder"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(run, tmp_path: Path, words: list[str], message: str) -> None:  # noqa: ANN001
    code, line = run(*words)
    assert code == 2 and message in line and "\n" not in line and line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_jsonl_line_is_named(run, tmp_path: Path) -> None:  # noqa: ANN001
    code, line = run("prompts", recipe(tmp_path, FINE, '{"question": '))
    assert code == 2 and "p.jsonl line 2: not valid JSON" in line
    assert not (tmp_path / "runs" / "mine" / "prompts" / "prompts.arrow").exists()


def test_an_empty_prompt_set_is_refused(run, tmp_path: Path) -> None:  # noqa: ANN001
    code, line = run("prompts", recipe(tmp_path))
    assert code == 2 and "prompt set is empty" in line


@pytest.mark.parametrize("command", ["prompts", "generate", "train"])
def test_a_missing_model_folder_is_named(run, tmp_path: Path, command: str) -> None:  # noqa: ANN001
    path = recipe(tmp_path, FINE, extra="teacher: {model: weights/none}\nstudent: {model: weights/none}")
    code, line = run(command, path)
    assert code == 2 and "\n" not in line and ("weights/none" in line or "run the stage that makes" in line)


def test_an_unwritable_run_directory_is_refused(run, tmp_path: Path) -> None:  # noqa: ANN001
    (tmp_path / "file").write_text("not a folder")
    code, line = run("prompts", "embedded", "--run-dir", "file/run")  # root writes everywhere, but not below a file
    assert code == 2 and "cannot be written" in line and "--run-dir" in line


def test_a_run_directory_of_another_configuration_is_refused_by_name(run, tmp_path: Path) -> None:  # noqa: ANN001
    path = recipe(tmp_path, FINE)
    assert run("prompts", path)[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()}
    code, line = run("prompts", path, "-s", "generate.sampling.temperature=0.5")
    assert code == 2 and "generate.sampling.temperature = 1.0, this recipe says 0.5" in line
    assert {file: file.read_bytes() for file in (tmp_path / "runs").rglob("*") if file.is_file()} == before
    assert run("prompts", path, "-s", "slurm.partition=elsewhere")[0] == 0  # where it runs is not what it is
    assert run("prompts", path, "-s", "train.lr=0.5")[0] == 0  # nothing has been trained


def test_a_stage_without_its_input_says_which_stage_makes_it(run, tmp_path: Path) -> None:  # noqa: ANN001
    code, line = run("data", "build", recipe(tmp_path, FINE))
    assert code == 2 and "run the stage that makes prompts/" in line


def test_dry_run_touches_nothing(run, tmp_path: Path) -> None:  # noqa: ANN001
    assert run("run", "embedded", "--dry-run")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_found_where_they_ship() -> None:
    assert (RECIPES / "embedded.yaml").is_file()


def test_a_shared_disk_that_is_away_for_a_moment_is_no_bad_input(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    """Another attempt, perhaps on another node, goes on: 75, which a job answers by going back into the queue."""

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", "prompts.arrow")

    path = recipe(tmp_path, FINE)
    monkeypatch.setattr("generate.stages.write_prompts", stale)
    code, line = run("prompts", path)
    assert code == 75 and "Stale file handle" in line and "the same command continues" in line and "\n" not in line


def test_a_full_disk_is_one_line_and_nothing_is_half_written(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "prompts.arrow")

    path = recipe(tmp_path, FINE)
    monkeypatch.setattr("generate.stages.write_prompts", full)
    code, line = run("prompts", path)
    assert code == 2 and "No space left on device" in line and "\n" not in line
    monkeypatch.undo()
