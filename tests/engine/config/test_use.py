"""No option does nothing: the code of each command reads every key that the command takes."""

import pytest
from config_reads import reads_of

from glm_rlhf.engine.cli import COMMANDS, Command
from glm_rlhf.engine.config.keys import keys_of, section_factories

OF_EVERY_COMMAND = ("glm_rlhf.engine.cli:_record", "glm_rlhf.engine.config.sections:resolve_output")
"""What reads the run folder's name and place for all commands."""


def unread(command: Command) -> list[str]:
    sections = {name: factory.func for name, factory in section_factories(command.config).items()}
    read = set().union(*(reads_of(place, sections) for place in (command.function, *OF_EVERY_COMMAND)))
    return [path for path, key in keys_of(command.config).items() if (key.section, key.name) not in read]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_key_is_read(command: Command):
    assert unread(command) == []


def test_reads_of_other_commands_do_not_count():
    """`sft` overlaps communication and has a layout; `ppo` does not overlap, `convert` has no layout."""
    commands = {command.name: command for command in COMMANDS}
    sections = {name: factory.func for name, factory in section_factories(commands["sft"].config).items()}
    reads = {name: reads_of(commands[name].function, sections) for name in ("sft", "ppo", "convert")}
    for key in (("train", "overlap_communication"), ("parallel", "cp")):
        assert key in reads["sft"]
    assert ("train", "overlap_communication") not in reads["ppo"]
    assert ("parallel", "cp") not in reads["convert"]
