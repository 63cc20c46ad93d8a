"""The page of all keys is the one that the code writes."""

import importlib.util
from types import ModuleType

from doc_pages import DOCS

from glm_rlhf.engine.cli import COMMANDS
from glm_rlhf.engine.config.keys import keys_of


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "configuration_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says():
    module = reference()
    assert module.PAGE.read_text(encoding="utf-8") == module.page(COMMANDS), (
        "keys have changed: python docs/configuration_reference.py writes docs/configuration.md anew"
    )


def test_every_key_of_every_command_has_a_row_and_its_own_default():
    lines = reference().page(COMMANDS).splitlines()
    for command in COMMANDS:
        for key in keys_of(command.config).values():
            rows = [line.split(" | ")[-1] for line in lines if line.startswith(f"| `{key.path}` |")]
            assert any(row == "all |" or command.name in row for row in rows), key.path
    (rate,) = [line for line in lines if line.startswith("| `optimizer.lr` |")]
    assert "`1e-05` (sft, reward)" in rate
    assert "`1e-06` (ppo, dpo)" in rate
