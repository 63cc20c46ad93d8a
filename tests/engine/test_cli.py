"""The command line: quick help, one sentence for a user's error, exit codes, ranks."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_rlhf.engine import cli
from glm_rlhf.engine.cli import COMMANDS, Command, main
from glm_rlhf.engine.config.keys import keys_of
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.sections import ScoreConfig
from glm_rlhf.engine.data.records.schema import read_demonstrations

SCORE = ["score", "model.path=m", "data.path=d"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """One process, a folder of its own."""
    variables = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for variable in (*variables, "TORCHELASTIC_ERROR_FILE", cli.TRACEBACK_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Make `score` a command that runs the given function."""

    def register(function: Callable) -> None:
        monkeypatch.setitem(sys.modules, "fake_scoring", types.SimpleNamespace(run=function))
        command = Command(
            name="score", summary="scores", root="config.sections:ScoreConfig", function="fake_scoring:run"
        )
        monkeypatch.setattr(cli, "COMMANDS", (command,))

    return register


def _become_rank(monkeypatch: pytest.MonkeyPatch, rank: int, *, local_rank: int | None = None) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank if local_rank is None else local_rank))
    monkeypatch.setenv("WORLD_SIZE", "4")


def _raise(error: BaseException) -> Callable:
    def run(config: object) -> None:
        raise error

    return run


def test_every_command_has_help_and_a_function_that_takes_its_config(capsys: pytest.CaptureFixture):
    for command in COMMANDS:
        assert callable(command.load())
        assert main([command.name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"glm-rlhf {command.name}: {command.summary}")
        for key in keys_of(command.config):
            assert key in printed


def test_help_lists_every_command(capsys: pytest.CaptureFixture):
    for flag in ("--help", "-h"):
        assert main([flag]) == 0
        printed = capsys.readouterr().out
        for command in COMMANDS:
            assert f"  {command.name}" in printed
            assert command.summary in printed


def test_help_is_quick_and_imports_nothing_heavy():
    program = (
        "import sys, time\n"
        "from glm_rlhf.engine.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'megatron', 'triton', 'numpy', 'transformers', 'tqdm'} & set(sys.modules)\n"
        "heavy |= {'pydantic', 'yaml'} & set(sys.modules) if sys.argv[1] == '--help' else set()\n"
        "print(code, 'heavy:', sorted(heavy), 'cpu_s:', time.process_time(), file=sys.stderr)\n"
    )
    # Seconds of processor time, Python's own start included.
    for limit_s, expected, *arguments in (
        (0.5, 0, "--help"),
        (1.0, 0, "doctor", "--help"),
        (1.0, 0, "ppo", "--help"),
        (1.0, 2, "ppo", "model.path=m", "data.path=d", "train.steps=1", "train.stps=3"),
        (1.0, 2, "sft", "model.path=m", "data.path=d", "train.steps=0"),
    ):
        command = [sys.executable, "-c", program, *arguments]
        for _ in range(3):  # the best of three, for other programs share the machine
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            code, _, heavy, _, cpu_s = answer.stderr.splitlines()[-1].split()
            assert (int(code), heavy) == (expected, "[]")
            if float(cpu_s) < limit_s:
                break
        assert float(cpu_s) < limit_s


ASCII_HELP = """
from glm_rlhf.engine import cli
cli.main(["--help"])
for command in cli.COMMANDS:
    cli.main([command.name, "--help"])
cli.log("2 " + chr(0xd7) + " 2")
cli._print(chr(0x4f60) + chr(0xdcff), cli.Launch())
"""


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_unicode_gets_escapes(settings: dict[str, str]):
    environment = {**os.environ, "PYTHONCOERCECLOCALE": "0", **settings}
    done = subprocess.run(
        [sys.executable, "-c", ASCII_HELP], capture_output=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert rb"usage: glm-rlhf <command> [config.yaml] [section.key=value \u2026]" in done.stdout
    assert done.stdout.endswith(b"\\u4f60\\udcff\n")
    assert rb"2 \xd7 2" in done.stderr
    assert (done.stdout + done.stderr).isascii()


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "glm_rlhf.engine", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0
    assert answer.stdout.startswith("glm-rlhf 0.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "glm-rlhf: no command given, there are:"),
        (["doctr"], "glm-rlhf: unknown command 'doctr', the nearest is doctor"),
        (["xyz"], "glm-rlhf: unknown command 'xyz', there are:"),
        (["doctor", "doctor.jsn=true"], "unknown key doctor.jsn, the nearest valid key is doctor.json"),
        (["doctor", "nothing.yaml"], "glm-rlhf doctor: there is no config file nothing.yaml"),
        (["doctor", "a.yaml", "b.yaml"], "a.yaml and b.yaml are given: one config file"),
        (["doctor", "--json"], "there is no option --json: settings are written section.key=value"),
        (["doctor", "--doctor.json=true"], "has dashes: write doctor.json=true"),
        (
            ["doctor", "doctor.timeout_s=0"],
            "doctor.timeout_s is 0 (a whole number), it must be a number, above 0",
        ),
    ],
)
def test_an_error_in_the_arguments_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture
):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


def test_a_config_of_another_command_is_named(capsys: pytest.CaptureFixture):
    ppo = Path(__file__).parents[2] / "examples" / "glm4_9b" / "ppo_8gpu.yaml"
    assert main(["plan", str(ppo)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"glm-rlhf plan: {ppo} is a config of ppo: plan does not know critic.lr and 1")
    Path("slip.yaml").write_text("critic: {lr: 1.0e-6}\nmodle: {path: m}\n")
    assert main(["plan", "slip.yaml"]) == 2
    assert "line 2: unknown key modle.path, the nearest" in capsys.readouterr().err


def test_the_command_gets_the_config_and_its_exit_code_is_returned(score: Callable):
    seen = []
    score(lambda config: seen.append(config) or 3)
    Path("c.yaml").write_text("model: {path: m}\ndata: {path: d}\nrun: {seed: 5}\n")
    assert main(["score", "c.yaml", "run.seed=6"]) == 3
    assert seen == [load_config(ScoreConfig, "c.yaml", ["run.seed=6"])]
    score(lambda config: None)
    assert main(SCORE) == 0


def test_the_resolved_config_is_shown_and_written(score: Callable, capsys: pytest.CaptureFixture):
    score(lambda config: None)
    assert main([*SCORE, "run.name=mine", "parallel.tp=2"]) == 0
    written = Path("outputs/mine/config.yaml")
    assert load_config(ScoreConfig, written) == load_config(ScoreConfig, written, ["parallel.tp=2"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert written.read_text() in captured.err


def test_only_the_first_rank_writes_the_config(score: Callable, monkeypatch: pytest.MonkeyPatch):
    score(lambda config: None)
    _become_rank(monkeypatch, 1)
    assert main(SCORE) == 0
    assert not Path("outputs").exists()


def test_a_command_without_a_run_folder_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fake_doctor", types.SimpleNamespace(run=lambda config: 0))
    command = Command(
        name="doctor", summary="s", root="config.tools:DoctorConfig", function="fake_doctor:run"
    )
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    assert main(["doctor"]) == 0
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("heads 3 are not\n  a multiple of tp 2"), "heads 3 are not a multiple of tp 2"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
        (FileNotFoundError(2, "No such file or directory", "d.jsonl"), "d.jsonl: No such file or directory"),
        (PermissionError(13, "Permission denied", "/d"), "/d: Permission denied"),
        (OSError(28, "No space left on device", "out"), "out: No space left on device"),
        (OSError(28, "No space left on device"), "a file or stream: No space left on device"),
        (FloatingPointError("not finite: on rank 0 the policy's logits"), "the policy's logits"),
    ],
)
def test_a_users_error_ends_in_one_sentence(
    score: Callable, capsys: pytest.CaptureFixture, error: Exception, sentence: str
):
    score(_raise(error))
    assert main(SCORE) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("glm-rlhf score: ")
    assert last.endswith(sentence)


def test_an_unwritable_run_folder_ends_in_one_sentence(score: Callable, capsys: pytest.CaptureFixture):
    score(lambda config: pytest.fail("the command must not start"))
    Path("file").write_text("")
    assert main([*SCORE, "run.output=file/run"]) == 2
    assert capsys.readouterr().err == (
        "glm-rlhf score: run.output is file/run, which cannot be written: Not a directory\n"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("bug"), KeyError("bug"), OSError("bug"), AssertionError("bug")]
)
def test_a_bug_keeps_its_traceback(score: Callable, error: Exception):
    score(_raise(error))
    with pytest.raises(type(error), match="bug"):
        main(SCORE)


def test_a_bug_ends_the_process_with_1():
    program = (
        "import sys, types; from glm_rlhf.engine import cli\n"
        "sys.modules['fake'] = types.SimpleNamespace(run=lambda config: {}['bug'])\n"
        "options = dict(name='x', summary='', root='config.tools:DoctorConfig', function='fake:run')\n"
        "cli.COMMANDS = (cli.Command(**options),)\n"
        "sys.exit(cli.main(['x']))\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr
    assert "KeyError: 'bug'" in answer.stderr


def test_the_traceback_of_a_users_error_is_shown_on_request(
    score: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    score(_raise(ValueError("wrong")))
    assert main(SCORE) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("GLM_RLHF_TRACEBACK", "1")
    assert main(SCORE) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_returns_130(score: Callable, capsys: pytest.CaptureFixture):
    score(_raise(KeyboardInterrupt()))
    assert main(SCORE) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "glm-rlhf score: interrupted"


def test_an_error_of_one_rank_names_the_rank(
    score: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    score(_raise(ValueError("shard 3 is missing")))
    _become_rank(monkeypatch, 3)
    assert main(SCORE) == 2
    assert capsys.readouterr().err == "[rank 3] glm-rlhf score: shard 3 is missing\n"


def test_an_error_in_the_arguments_is_reported_once_per_host(
    score: Callable, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    score(lambda config: pytest.fail("the command must not start"))
    counts = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        _become_rank(monkeypatch, rank, local_rank=local_rank)
        assert main([*SCORE, "run.seed=x"]) == 2
        counts.append(capsys.readouterr().err.count("run.seed is 'x'"))
    assert counts == [1, 0, 1, 0]


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORLD_SIZE", "abc"), ("WORLD_SIZE", ""), ("RANK", "4"), ("LOCAL_RANK", "x"), ("MASTER_PORT", "abc")],
)
def test_a_wrong_launch_variable_is_named_by_every_command(
    command: str, variable: str, value: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    _become_rank(monkeypatch, 0)
    monkeypatch.setenv(variable, value)
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"glm-rlhf {command}: {variable} is ")
    assert captured.err.count("\n") == 1
    assert main([command, "--help"]) == 0


def test_help_is_printed_by_the_first_rank_only(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    _become_rank(monkeypatch, 2)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == ""


def test_warnings_are_shown_by_the_first_rank_of_a_host(
    score: Callable, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    data = tmp_path / "demonstrations.jsonl"
    data.write_text('{}\n{"prompt_tokens": [1], "response_tokens": [2]}\n')
    score(lambda config: list(read_demonstrations(data, vocab_size=8, on_error="skip")) and None)
    counts = []
    for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1)):
        _become_rank(monkeypatch, rank, local_rank=local_rank)
        caplog.clear()
        assert main(SCORE) == 0
        counts.append(caplog.text.count("skipped 1 of 2 records"))
    assert counts == [1, 0, 1, 0]
    list(read_demonstrations(data, vocab_size=8, on_error="skip"))
    assert "skipped 1 of 2 records" in caplog.text, "outside of a command nothing is silenced"
