"""The command line: `glm-rlhf <command> [config.yaml] [section.key=value …]`.

Exit codes: 0 done, 1 a check that failed or a bug (with its traceback), 2 something that a user has to mend
(told in one sentence), 130 interrupted. Nothing heavy is imported before a command runs.
"""

import contextlib
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
from glm_rlhf.engine.config.sections import (
    ConvertConfig,
    DemoConfig,
    DoctorConfig,
    GenerateConfig,
    ScoreConfig,
)
from glm_rlhf.engine.config.training import DPOConfig, LabelConfig, RewardConfig, SFTConfig
from glm_rlhf.engine.config.yaml_source import read_file
from glm_rlhf.parallel.runtime.log import ROOT, log

PROGRAM = "glm-rlhf"
TRACEBACK_VARIABLE = "GLM_RLHF_TRACEBACK"
_HELP = ("-h", "--help")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of the program."""

    name: str
    """What a user types."""
    summary: str
    """One line of help: what it does."""
    config: type
    """Root of its settings, in `glm_rlhf.engine.config.sections`."""
    function: str
    """`module:function` that takes the config and returns an exit code or None; imported when it runs."""

    def load(self) -> Callable[[object], int | None]:
        """Return the function, its module imported."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)


COMMANDS = (
    Command(
        name="demo",
        summary="SFT, reward model and PPO of a tiny ChatGLM3 made on this machine; minutes on a CPU",
        config=DemoConfig,
        function="glm_rlhf.engine.commands.demo.run:run",
    ),
    Command(
        name="sft",
        summary="a policy learns the answers of demonstrations",
        config=SFTConfig,
        function="glm_rlhf.engine.commands.sft:run",
    ),
    Command(
        name="reward",
        summary="a reward model learns to score the preferred answer of a pair above the other",
        config=RewardConfig,
        function="glm_rlhf.engine.commands.reward:run",
    ),
    Command(
        name="ppo",
        summary="a policy learns from rewards, generating and training on the same ranks and weights",
        config=PPOConfig,
        function="glm_rlhf.engine.commands.ppo:run",
    ),
    Command(
        name="dpo",
        summary="a policy learns to prefer the chosen answer of a pair, tied to a reference",
        config=DPOConfig,
        function="glm_rlhf.engine.commands.dpo:run",
    ),
    Command(
        name="label",
        summary="pairs from a policy's answers: K to each prompt, the best and the worst by a reward model",
        config=LabelConfig,
        function="glm_rlhf.engine.commands.label:run",
    ),
    Command(
        name="generate",
        summary="answers for a prompts file, JSON lines out",
        config=GenerateConfig,
        function="glm_rlhf.engine.commands.generate:run",
    ),
    Command(
        name="score",
        summary="per-token logprobs of a policy, or scores of a reward model, JSON lines out",
        config=ScoreConfig,
        function="glm_rlhf.engine.commands.score:run",
    ),
    Command(
        name="evaluate",
        summary="win rate, reward, pass@k and length on a prompts file, with confidence intervals",
        config=EvaluateConfig,
        function="glm_rlhf.engine.commands.evaluate:run",
    ),
    Command(
        name="convert",
        summary="a Hugging Face folder into another family's form, type or file size",
        config=ConvertConfig,
        function="glm_rlhf.engine.commands.convert:run",
    ),
    Command(
        name="plan",
        summary="memory and time of ppo on a cluster before anything is launched; writes config and scripts",
        config=PlanConfig,
        function="glm_rlhf.engine.plan.command:run",
    ),
    Command(
        name="doctor",
        summary="what is installed, which fast paths are active and why the others are not",
        config=DoctorConfig,
        function="glm_rlhf.engine.health.doctor:run",
    ),
    Command(
        name="bench",
        summary="times of kernels, passes, PPO, checkpoints and scaling, beside peers; rates for plan",
        config=BenchConfig,
        function="glm_rlhf.engine.bench.command:run",
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of one command line.

    A fault of the user's ends with one sentence on stderr; under torchrun every rank returns the code. A
    fault in arguments or config, the same on every rank of a host, is told by the first of them; one that
    a command meets later is told by each rank that meets it, with its number. `GLM_RLHF_TRACEBACK=1`
    shows the traceback too.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Raises:
        Exception: a bug, as it is.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in _HELP or arguments[0] == "--version":
        return _about_program(arguments)
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        return _tell(PROGRAM, _unknown_command(arguments[0]), is_shared=True)
    title = f"{PROGRAM} {command.name}"
    if any(argument in _HELP for argument in arguments[1:]):
        return _say(_command_help(command))
    try:
        path, overrides = _config_arguments(arguments[1:])
        if path is not None:
            _refuse_others_config(path, command)
        config: object = load_config(command.config, path, overrides)
    except ConfigError as error:
        return _tell(title, str(error), is_shared=True)
    try:
        _record(config)
        with _warned_once_a_host():
            return command.load()(config) or 0
    except KeyboardInterrupt:
        _tell(title, "interrupted", is_shared=True)
        return 130
    except ValueError as error:
        _record_fault(error)
        return _tell(title, str(error))
    except OSError as error:
        _record_fault(error)
        if error.filename is None:  # no file of the user's: a bug, or the machine
            _tell(title, _phase_and_kind(error), is_bug=True)
            raise
        return _tell(title, f"{error.filename}: {error.strerror}")
    except Exception as error:
        _record_fault(error)
        _tell(title, _phase_and_kind(error), is_bug=True)
        raise
    finally:
        if "glm_rlhf.parallel.runtime.preemption" in sys.modules:  # a command ran that heeds signals
            sys.modules["glm_rlhf.parallel.runtime.preemption"].restore_handlers()


def _phase_and_kind(error: Exception) -> str:
    from glm_rlhf.parallel.runtime.spans import phase_of  # torch is loaded: a command ran

    phase = phase_of(error)
    return f"failed{f' in phase {phase}' if phase else ''}: {type(error).__name__}: {error}"


def _record_fault(error: Exception) -> None:
    """Leave the traceback in the file that torchrun names in its summary; without torchrun there is none."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _config_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the config file's path, if one is named, and the overrides."""
    overrides = [argument for argument in arguments if is_override(argument)]
    files = [argument for argument in arguments if not is_override(argument)]
    for option in files:
        if option.startswith("-"):
            raise ConfigError(f"there is no option {option}: settings are written section.key=value")
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)} are given: one config file, then section.key=value")
    return (files[0] if files else None), overrides


def _refuse_others_config(path: str, command: Command) -> None:
    """Raise ConfigError where a file has keys that the command does not know, but another one all of them."""
    given = [entry.path for entry in read_file(path)]
    unknown = [key for key in given if key not in keys_of(command.config)]
    owners = [other.name for other in COMMANDS if keys_of(other.config).keys() >= set(given)]
    if unknown and owners:
        others = f" and {len(unknown) - 1} others of its keys" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{path} is a config of {' or '.join(owners)}: {command.name} does not know {unknown[0]}{others}"
        )


def _record(config: object) -> None:
    """Show the resolved config and write it to the run folder, where the command has one; rank 0 does.

    Raises:
        ValueError: it cannot be written there.
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
def _warned_once_a_host() -> Iterator[None]:
    """Have the first rank of this host alone show warnings that are logged: all read the same files."""
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
        return _tell(PROGRAM, f"no command given, there are: {names} (--help says more)", is_shared=True)
    if arguments[0] == "--version":
        from glm_rlhf.engine import __version__  # read from the package's metadata when asked for

        return _say(f"{PROGRAM} {__version__}")
    return _say(_program_help())


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
        f"The file holds sections of keys; an override wins over the file, the file over a default.\n\n"
        f"{help_text(command.config)}"
    )


def _unknown_command(name: str) -> str:
    names = [command.name for command in COMMANDS]
    near = get_close_matches(name, names, n=1)
    return f"unknown command {name!r}, " + (
        f"the nearest is {near[0]}" if near else f"there are: {', '.join(names)}"
    )


def _say(text: str) -> int:
    if _rank("RANK") == 0:
        sys.stdout.write(text + "\n")
    return 0


def _tell(title: str, message: str, *, is_shared: bool = False, is_bug: bool = False) -> int:
    """Return exit code 2 after one line on stderr.

    Args:
        title: who speaks.
        message: what to mend; its line breaks become spaces.
        is_shared: whether every rank of this host says the same, so that one is enough.
        is_bug: whether the traceback follows anyway.
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
