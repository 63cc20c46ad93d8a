"""The command line: `glm-rlhf <command> [config.yaml] [section.key=value …]`.

Exit codes: 0 done, 1 a failed check or a bug (with its traceback), 2 an error that the user has to fix
(reported in one sentence), 130 interrupted. Nothing heavy is imported before a command runs.
"""

import contextlib
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from glm_rlhf.engine.config.bench import BenchConfig
from glm_rlhf.engine.config.evaluate import EvaluateConfig
from glm_rlhf.engine.config.keys import help_text, keys_of
from glm_rlhf.engine.config.load import ConfigError, dump_config, is_override, load_config, save_config
from glm_rlhf.engine.config.plan import PlanConfig
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.sections import GenerateConfig, ScoreConfig
from glm_rlhf.engine.config.tools import ConvertConfig, DemoConfig, DoctorConfig
from glm_rlhf.engine.config.training import DPOConfig, LabelConfig, RewardConfig, SFTConfig
from glm_rlhf.engine.config.yaml_source import read_file
from glm_rlhf.parallel.runtime.log import ROOT, log

PROGRAM = "glm-rlhf"
TRACEBACK_VARIABLE = "GLM_RLHF_TRACEBACK"
_HELP = ("-h", "--help")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of the program."""

    name: str
    """Its name on the command line."""
    summary: str
    """One line of help."""
    config: type
    """Root of its config, in `glm_rlhf.engine.config`."""
    function: str
    """`module:function` that takes the config and returns an exit code or None; imported when it runs."""

    def load(self) -> Callable[[object], int | None]:
        """Import the module and return the function."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS = (
    Command(
        name="demo",
        summary="SFT, reward model and PPO on a tiny ChatGLM3 created on this machine; minutes on a CPU",
        config=DemoConfig,
        function="glm_rlhf.engine.commands.demo.run:run",
    ),
    Command(
        name="sft",
        summary="train a policy on demonstrations (supervised fine-tuning)",
        config=SFTConfig,
        function="glm_rlhf.engine.commands.sft:run",
    ),
    Command(
        name="reward",
        summary="train a reward model on preference pairs",
        config=RewardConfig,
        function="glm_rlhf.engine.commands.reward:run",
    ),
    Command(
        name="ppo",
        summary="train a policy with PPO, generating and training on the same ranks and weights",
        config=PPOConfig,
        function="glm_rlhf.engine.commands.ppo:run",
    ),
    Command(
        name="dpo",
        summary="train a policy on preference pairs with direct preference optimisation",
        config=DPOConfig,
        function="glm_rlhf.engine.commands.dpo:run",
    ),
    Command(
        name="label",
        summary="make preference pairs: K answers per prompt, best and worst by a reward model",
        config=LabelConfig,
        function="glm_rlhf.engine.commands.label:run",
    ),
    Command(
        name="generate",
        summary="answer the prompts of a file; writes JSON lines",
        config=GenerateConfig,
        function="glm_rlhf.engine.commands.generate:run",
    ),
    Command(
        name="score",
        summary="per-token logprobs of a policy or scores of a reward model; writes JSON lines",
        config=ScoreConfig,
        function="glm_rlhf.engine.commands.score:run",
    ),
    Command(
        name="evaluate",
        summary="win rate, reward, pass@k and length on the prompts of a file, with confidence intervals",
        config=EvaluateConfig,
        function="glm_rlhf.engine.commands.evaluate:run",
    ),
    Command(
        name="convert",
        summary="convert a Hugging Face folder to another family's format, dtype or file size",
        config=ConvertConfig,
        function="glm_rlhf.engine.commands.convert:run",
    ),
    Command(
        name="plan",
        summary="estimate memory and time of ppo on a cluster; writes config and launch scripts",
        config=PlanConfig,
        function="glm_rlhf.engine.plan.command:run",
    ),
    Command(
        name="doctor",
        summary="report versions, active fast paths and whether ranks reach each other",
        config=DoctorConfig,
        function="glm_rlhf.engine.health.doctor:run",
    ),
    Command(
        name="bench",
        summary="time kernels, passes, PPO, checkpoints and scaling against peers; measure rates for plan",
        config=BenchConfig,
        function="glm_rlhf.engine.bench.command:run",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of one command line.

    A user's error ends with one sentence on stderr; under torchrun every rank returns the code. An error in
    arguments or config, the same on all ranks of a host, is reported by the first of them; one that a
    command raises later is reported by each rank that raises it, with its number. `GLM_RLHF_TRACEBACK=1`
    also prints the traceback.

    Args:
        argv: arguments after the program's name; None: those of the process.

    Raises:
        Exception: a bug, unchanged.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in _HELP or arguments[0] == "--version":
        return _about_program(arguments)
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        return _report_error(PROGRAM, _unknown_command(arguments[0]), is_shared=True)
    title = f"{PROGRAM} {command.name}"
    if any(argument in _HELP for argument in arguments[1:]):
        return _print(_command_help(command))
    try:
        path, overrides = _config_arguments(arguments[1:])
        if path is not None:
            _raise_if_config_of_another_command(path, command)
        config: object = load_config(command.config, path, overrides)
    except ConfigError as error:
        return _report_error(title, str(error), is_shared=True)
    try:
        _save_resolved_config(config)
        with _warnings_from_first_local_rank():
            return command.load()(config) or 0
    except KeyboardInterrupt:
        _report_error(title, "interrupted", is_shared=True)
        return 130
    except (ValueError, FloatingPointError) as error:  # the second: NaN or Inf in a model, named by `error`
        _record_for_torchrun(error)
        return _report_error(title, str(error))
    except OSError as error:
        _record_for_torchrun(error)
        if error.filename is None and error.errno not in _DISK_ERRORS:  # not a file of the user: a bug
            _report_error(title, _phase_and_kind(error), is_bug=True)
            raise
        file = error.filename or "a file or stream"
        return _report_error(title, f"{file}: {error.strerror}")
    except Exception as error:
        _record_for_torchrun(error)
        _report_error(title, _phase_and_kind(error), is_bug=True)
        raise
    finally:
        if "glm_rlhf.parallel.runtime.preemption" in sys.modules:  # a command ran that handles signals
            sys.modules["glm_rlhf.parallel.runtime.preemption"].restore_handlers()


def _phase_and_kind(error: Exception) -> str:
    from glm_rlhf.parallel.runtime.spans import phase_of  # torch is loaded: a command ran

    phase = phase_of(error)
    return f"failed{f' in phase {phase}' if phase else ''}: {type(error).__name__}: {error}"


def _record_for_torchrun(error: Exception) -> None:
    """Write the traceback to the file that torchrun names in its summary; does nothing without torchrun."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _config_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the path of the config file, if there is one, and the overrides."""
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
    paths = [entry.path for entry in read_file(path)]
    unknown = [key for key in paths if key not in keys_of(command.config)]
    owners = [other.name for other in COMMANDS if keys_of(other.config).keys() >= set(paths)]
    if unknown and owners:
        others = f" and {len(unknown) - 1} others of its keys" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{path} is a config of {' or '.join(owners)}: {command.name} does not know {unknown[0]}{others}"
        )


def _save_resolved_config(config: object) -> None:
    """Print the resolved config and write it to the run folder, on rank 0, if the command has a run folder.

    Raises:
        ValueError: the folder cannot be written.
    """
    if _rank("RANK") == 0 and hasattr(config, "run"):
        try:
            path = save_config(config, config.run.output)
        except OSError as error:
            raise ValueError(
                f"run.output is {config.run.output}, which cannot be written: {error.strerror}"
            ) from error
        log(f"{dump_config(config)}# written to {path}")


@contextlib.contextmanager
def _warnings_from_first_local_rank() -> Iterator[None]:
    """Hide logged warnings on all ranks of a host but the first: all read the same files."""
    logger = logging.getLogger(ROOT)
    level = logger.level
    if _rank("LOCAL_RANK") > 0:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _about_program(arguments: list[str]) -> int:
    if not arguments:
        names = ", ".join(command.name for command in COMMANDS)
        return _report_error(PROGRAM, f"no command given, there are: {names} (see --help)", is_shared=True)
    if arguments[0] == "--version":
        from glm_rlhf.engine import __version__  # read from the package's metadata when asked for

        return _print(f"{PROGRAM} {__version__}")
    return _print(_program_help())


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


def _print(text: str) -> int:
    """Write text to stdout on rank 0; return exit code 0."""
    if _rank("RANK") == 0:
        sys.stdout.write(text + "\n")
    return 0


def _report_error(title: str, message: str, *, is_shared: bool = False, is_bug: bool = False) -> int:
    """Write one line to stderr and return exit code 2.

    Args:
        title: program and command, at the start of the line.
        message: the error; line breaks become spaces.
        is_shared: whether all ranks of this host have the same error, so that only the first one reports it.
        is_bug: whether the traceback is printed anyway.
    """
    if not is_bug and os.environ.get(TRACEBACK_VARIABLE) == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if not is_shared or _rank("LOCAL_RANK") == 0:
        has_others = int(os.environ.get("WORLD_SIZE") or 1) > 1 and not is_shared
        rank = f"[rank {_rank('RANK')}] " if has_others else ""
        log(f"{rank}{title}: {' '.join(message.split())}")
    return 2


def _rank(variable: str) -> int:
    return int(os.environ.get(variable) or 0)
