"""The command line: `glm-rlhf <command> [config.yaml] [section.key=value …]`.

Exit codes: 0 done, 1 a failed check or a bug (with its traceback), 2 an error that the user has to fix
(reported in one sentence), 130 interrupted. Nothing heavy is imported before a command runs, and its
configuration not before it is needed.
"""

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from glm_rlhf.engine.exit_report import TRACEBACK_VARIABLE, USER_ERROR, report_bug, report_user_error
from glm_rlhf.engine.process import ignore_repeated_interrupts, write_any_character
from glm_rlhf.parallel.runtime.launch import Launch, read_launch
from glm_rlhf.parallel.runtime.log import ROOT, log
from glm_rlhf.parallel.runtime.orphans import watch_launcher

PROGRAM = "glm-rlhf"
_HELP = ("-h", "--help")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of the program."""

    name: str
    """Its name on the command line."""
    summary: str
    """One line of help."""
    root: str
    """`module:class` of its config, in `glm_rlhf.engine`; imported when it is asked for."""
    function: str
    """`module:function` that takes the config and returns an exit code or None; imported when it runs."""

    @property
    def config(self) -> type:
        """Root of its config."""
        return _imported(f"glm_rlhf.engine.{self.root}")

    def load(self) -> Callable[[object], int | None]:
        """Import the module and return the function."""
        return _imported(self.function)


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


COMMANDS = (
    Command(
        name="demo",
        summary="SFT, reward model and PPO on a tiny ChatGLM3 created on this machine; minutes on a CPU",
        root="config.tools:DemoConfig",
        function="glm_rlhf.engine.commands.demo.run:run",
    ),
    Command(
        name="sft",
        summary="train a policy on demonstrations (supervised fine-tuning)",
        root="config.training:SFTConfig",
        function="glm_rlhf.engine.commands.sft:run",
    ),
    Command(
        name="reward",
        summary="train a reward model on preference pairs",
        root="config.training:RewardConfig",
        function="glm_rlhf.engine.commands.reward:run",
    ),
    Command(
        name="ppo",
        summary="train a policy with PPO, generating and training on the same ranks and weights",
        root="config.rl:PPOConfig",
        function="glm_rlhf.engine.commands.ppo:run",
    ),
    Command(
        name="dpo",
        summary="train a policy on preference pairs with direct preference optimisation",
        root="config.training:DPOConfig",
        function="glm_rlhf.engine.commands.dpo:run",
    ),
    Command(
        name="label",
        summary="make preference pairs: K answers per prompt, best and worst by a reward model",
        root="config.training:LabelConfig",
        function="glm_rlhf.engine.commands.label:run",
    ),
    Command(
        name="generate",
        summary="answer the prompts of a file; writes JSON lines",
        root="config.sections:GenerateConfig",
        function="glm_rlhf.engine.commands.generate:run",
    ),
    Command(
        name="score",
        summary="per-token logprobs of a policy or scores of a reward model; writes JSON lines",
        root="config.sections:ScoreConfig",
        function="glm_rlhf.engine.commands.score:run",
    ),
    Command(
        name="evaluate",
        summary="win rate, reward, pass@k and length on the prompts of a file, with confidence intervals",
        root="config.evaluate:EvaluateConfig",
        function="glm_rlhf.engine.commands.evaluate:run",
    ),
    Command(
        name="convert",
        summary="convert a Hugging Face folder to another family's format, dtype or file size",
        root="config.tools:ConvertConfig",
        function="glm_rlhf.engine.commands.convert:run",
    ),
    Command(
        name="plan",
        summary="estimate memory and time of ppo on a cluster; writes config and launch scripts",
        root="config.plan:PlanConfig",
        function="glm_rlhf.engine.plan.command:run",
    ),
    Command(
        name="doctor",
        summary="report versions, active fast paths and whether ranks reach each other",
        root="config.tools:DoctorConfig",
        function="glm_rlhf.engine.health.doctor:run",
    ),
    Command(
        name="bench",
        summary="time kernels, passes, PPO, checkpoints and scaling against peers; measure rates for plan",
        root="config.bench:BenchConfig",
        function="glm_rlhf.engine.bench.command:run",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of one command line.

    A user's error ends with one sentence on stderr, from one rank; under torchrun every rank returns the
    code, and torchrun's summary shows the sentence. `GLM_RLHF_TRACEBACK=1` also prints the traceback.

    Args:
        argv: arguments after the program's name; None: those of the process, which ends after the command.

    Raises:
        Exception: a bug, unchanged.
    """
    arguments = sys.argv[1:] if argv is None else argv
    write_any_character()
    if argv is None:
        ignore_repeated_interrupts()
    wrong_launch = None
    try:
        launch = read_launch()
    except ValueError as error:
        launch, wrong_launch = Launch(), str(error)
    if not arguments or arguments[0] in _HELP or arguments[0] == "--version":
        return _about_program(arguments, launch)
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        return report_user_error(PROGRAM, _unknown_command(arguments[0]), launch)
    title = f"{PROGRAM} {command.name}"
    if any(argument in _HELP for argument in arguments[1:]):
        return _print(_command_help(command), launch)
    if wrong_launch is not None:
        return report_user_error(title, wrong_launch, launch)
    watch_launcher()
    from glm_rlhf.engine.config.load import ConfigError, load_config

    try:
        path, overrides = _config_arguments(arguments[1:])
        if path is not None:
            _raise_if_config_of_another_command(path, command)
        config: object = load_config(command.config, path, overrides)
    except ConfigError as error:
        return report_user_error(title, str(error), launch)
    code = _run(command, title, config, launch, ends_process=argv is None)
    if argv is None and code == USER_ERROR:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, while this process ends with its own code
    return code


def _run(command: Command, title: str, config: object, launch: Launch, *, ends_process: bool) -> int:
    """Return the exit code of a command; a bug is reported and raised."""
    try:
        _save_resolved_config(config, launch)
        with _warnings_from_first_local_rank(launch):
            return command.load()(config) or 0
    except KeyboardInterrupt:
        report_user_error(title, "interrupted", launch)
        return 130
    except (ValueError, FloatingPointError) as error:  # the second: NaN or Inf in a model, named by `error`
        return report_user_error(title, str(error), launch, error)
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:  # not a file of the user: a bug
            report_bug(title, error, launch)
            raise
        file = error.filename or "a file or stream"
        return report_user_error(title, f"{file}: {error.strerror}", launch, error)
    except Exception as error:
        report_bug(title, error, launch)
        raise
    finally:
        if "glm_rlhf.parallel.runtime.preemption" in sys.modules:  # a command ran that handles signals
            preemption = sys.modules["glm_rlhf.parallel.runtime.preemption"]
            (preemption.ignore_repeats if ends_process else preemption.restore_handlers)()


def _config_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the path of the config file, if there is one, and the overrides."""
    from glm_rlhf.engine.config.load import ConfigError, is_override

    overrides = [argument for argument in arguments if is_override(argument)]
    files = [argument for argument in arguments if not is_override(argument)]
    for option in files:
        if option.startswith("-"):
            raise ConfigError(f"there is no option {option}: settings are written section.key=value")
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)} are given: one config file at most, then section.key=value")
    return (files[0] if files else None), overrides


def _raise_if_config_of_another_command(path: str, command: Command) -> None:
    """Raise ConfigError where the command lacks a key of the file, but another command has all of them."""
    from glm_rlhf.engine.config.keys import keys_of
    from glm_rlhf.engine.config.yaml_source import ConfigError, read_file

    paths = [entry.path for entry in read_file(path)]
    unknown = [key for key in paths if key not in keys_of(command.config)]
    if not unknown:
        return
    owners = [other.name for other in COMMANDS if keys_of(other.config).keys() >= set(paths)]
    if owners:
        others = f" and {len(unknown) - 1} others of its keys" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{path} is a config of {' or '.join(owners)}: {command.name} does not know {unknown[0]}{others}"
        )


def _save_resolved_config(config: object, launch: Launch) -> None:
    """Print the resolved config and write it to a new run folder, on rank 0, if the command has a run folder.

    A folder that has a config keeps it until the command is accepted and writes its own.

    Raises:
        ValueError: the folder cannot be written.
    """
    if launch.rank == 0 and hasattr(config, "run"):
        from glm_rlhf.engine.config.load import FILE_NAME, dump_config, save_config

        path = Path(config.run.output) / FILE_NAME
        if os.path.lexists(path):
            log(f"{dump_config(config)}# for {path}")
            return
        try:
            save_config(config, config.run.output)
        except OSError as error:
            raise ValueError(
                f"run.output is {config.run.output}, which cannot be written: {error.strerror}"
            ) from error
        log(f"{dump_config(config)}# written to {path}")


@contextlib.contextmanager
def _warnings_from_first_local_rank(launch: Launch) -> Iterator[None]:
    """Hide logged warnings on all ranks of a host but the first: all read the same files."""
    logger = logging.getLogger(ROOT)
    level = logger.level
    if launch.local_rank > 0:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _about_program(arguments: list[str], launch: Launch) -> int:
    if not arguments:
        names = ", ".join(command.name for command in COMMANDS)
        return report_user_error(PROGRAM, f"no command given, there are: {names} (see --help)", launch)
    if arguments[0] == "--version":
        from glm_rlhf.engine import __version__  # read from the package's metadata when asked for

        return _print(f"{PROGRAM} {__version__}", launch)
    return _print(_program_help(), launch)


def _program_help() -> str:
    width = max(len(command.name) for command in COMMANDS)
    commands = "\n".join(f"  {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    return (
        f"{PROGRAM}: align ChatGLM / GLM models with human feedback\n\n"
        f"usage: {PROGRAM} <command> [config.yaml] [section.key=value …]\n"
        f"       torchrun --nproc-per-node=N -m glm_rlhf.engine <command> [config.yaml] …\n\n"
        f"commands:\n{commands}\n\n"
        f"`{PROGRAM} <command> --help` lists the command's settings with defaults and units.\n"
        f"{TRACEBACK_VARIABLE}=1 shows the traceback of every error."
    )


def _command_help(command: Command) -> str:
    from glm_rlhf.engine.config.keys import help_text

    return (
        f"{PROGRAM} {command.name}: {command.summary}\n\n"
        f"usage: {PROGRAM} {command.name} [config.yaml] [section.key=value …]\n\n"
        f"The file holds sections of keys. Overrides take precedence over the file, which takes\n"
        f"precedence over the defaults.\n\n"
        f"{help_text(command.config)}"
    )


def _unknown_command(name: str) -> str:
    names = [command.name for command in COMMANDS]
    near = get_close_matches(name, names, n=1)
    return f"unknown command {name!r}, " + (
        f"the nearest is {near[0]}" if near else f"there are: {', '.join(names)}"
    )


def _print(text: str, launch: Launch) -> int:
    """Write text to stdout on rank 0; return exit code 0."""
    if launch.rank == 0:
        sys.stdout.write(text + "\n")
    return 0
