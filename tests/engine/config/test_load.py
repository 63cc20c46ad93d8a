"""Config files and overrides: what is read, what is refused, and how the refusal helps."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from glm_rlhf.engine.config.load import ConfigError, dump_config, is_override, load_config, save_config
from glm_rlhf.engine.config.sections import frozen_section


@frozen_section
class _Run:
    """The run."""

    name: Annotated[str, Field(min_length=1)]
    """Name."""
    seed: int = 7
    """Seed."""


@frozen_section
class _Optimizer:
    """The optimizer."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decays."""
    is_fused: bool = False
    """Whether it is fused."""
    kind: Literal["adam", "sgd"] = "adam"
    """Algorithm."""
    clip: float | None = None
    """Largest norm."""
    note: str | None = None
    """Remark."""


@frozen_section
class _Root:
    """Settings of a test."""

    run: _Run = Field(default_factory=partial(_Run, name="mine"))
    """The run."""
    optimizer: _Optimizer = Field(default_factory=_Optimizer)
    """The optimizer."""


@frozen_section
class _Data:
    """The data."""

    path: str
    """File."""


@frozen_section
class _NeedsData:
    """Settings with a key that has no default."""

    data: _Data
    """The data."""


def _load(tmp_path: Path, text: str | bytes, *overrides: str, root: type = _Root):
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(root, file, overrides)


def _refusal(tmp_path: Path, text: str | bytes, *overrides: str, root: type = _Root) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, *overrides, root=root)
    return str(caught.value).replace(f"{tmp_path}{os.sep}", "")


def test_no_file_gives_the_defaults_of_the_command():
    loaded = load_config(_Root)
    assert (loaded.run.name, loaded.run.seed, loaded.optimizer.lr) == ("mine", 7, 1e-3)


def test_override_beats_file_beats_default(tmp_path: Path):
    loaded = _load(tmp_path, "run: {seed: 1}\noptimizer:\n  lr: 0.5\n", "run.seed=2", "run.seed=3")
    assert (loaded.run.name, loaded.run.seed, loaded.optimizer.lr) == ("mine", 3, 0.5)


@pytest.mark.parametrize(
    "text", ["", "# only a remark\n", "run:\n", "---\n", "null\n", "\ufeffrun: {seed: 7}\n"]
)
def test_an_empty_file_or_section_changes_nothing(tmp_path: Path, text: str):
    assert _load(tmp_path, text) == load_config(_Root)


@pytest.mark.parametrize("number", ["1e-6", "1E-6", "1.0e-06", "0.000001", ".1e-5"])
def test_every_notation_of_a_number_is_a_number(tmp_path: Path, number: str):
    assert _load(tmp_path, f"optimizer: {{lr: {number}}}").optimizer.lr == 1e-6
    assert load_config(_Root, None, [f"optimizer.lr={number}"]).optimizer.lr == 1e-6


@pytest.mark.parametrize(
    "text", ["no", "on", "2024-01-01", "12:30", "0o17", "017", "1e", "a b", "中文", "<<"]
)
def test_what_old_yaml_would_change_stays_text(tmp_path: Path, text: str):
    assert _load(tmp_path, f"run:\n  name: {text}\n").run.name == text


def test_lists_become_tuples_and_whole_numbers_floats(tmp_path: Path):
    betas = _load(tmp_path, "optimizer: {betas: [0, 1]}").optimizer.betas
    assert betas == (0.0, 1.0)
    assert [type(value) for value in betas] == [float, float]
    assert load_config(_Root, None, ["optimizer.betas=[0.5,0.6]"]).optimizer.betas == (0.5, 0.6)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.name=7", "7"),
        ("run.name=true", "true"),
        ("run.name=null", "null"),
        ("run.name=a=b", "a=b"),
        ("run.name=a: b #c", "a: b #c"),
        ("run.name={a}", "{a}"),
        ("run.name=[x", "[x"),
        ("run.name= a ", " a "),
        ("run.name='7'", "7"),
        ('run.name="a b"', "a b"),
    ],
)
def test_an_override_of_text_is_taken_unparsed(override: str, expected: str):
    assert load_config(_Root, None, [override]).run.name == expected


def test_null_is_a_value_only_where_it_may_be(tmp_path: Path):
    loaded = load_config(_Root, None, ["optimizer.note=null", "optimizer.clip=null"])
    assert (loaded.optimizer.note, loaded.optimizer.clip) == (None, None)
    assert load_config(_Root, None, ["optimizer.note=nil"]).optimizer.note == "nil"
    assert (
        _refusal(tmp_path, "run: {seed: null}")
        == "c.yaml line 1: run.seed is null, it must be a whole number"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("run: {sede: 1}", "c.yaml line 1: unknown key run.sede, the nearest valid key is run.seed"),
        (
            "run:\n  seed: 1\noptimiser:\n  lr: 1\n",
            "line 4: unknown key optimiser.lr, the nearest valid key is optimizer.lr",
        ),
        ("run.seed: 1", "run.seed is the command line's form, in YAML write seed: below run:"),
        ("run: 5", "c.yaml line 1: run is the value '5', it must hold keys"),
        ("run: [seed]", "run is a list, it must hold keys"),
        ("- run", "c.yaml line 1: the file is a list, it must hold sections"),
        ("just words", "the file is the value 'just words', it must hold sections"),
        ("run: {seed: 1}\nrun: {name: a}", "c.yaml line 2: run is already set in line 1"),
        ("run:\n  seed: 1\n  seed: 2\n", "c.yaml line 3: seed is already set in line 2"),
        ("1: {seed: 1}", "a key is not text: '1'"),
        ("run: {~: 1}", "a key is not text: '~'"),
        ("? [a]\n: 1", "a key is not text"),
        ("run: {seed: 1", "is not YAML"),
        ("run:\n\tseed: 1", "c.yaml line 2 column 1 is not YAML"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}", "is not YAML: but found another document"),
        (
            "run: {name: !!python/object/apply:os.system ['true']}",
            "is not YAML: could not determine a constructor",
        ),
        ("run: {seed: !!int x}", "c.yaml: invalid literal"),
        ("run: {seed: *nowhere}", "found undefined alias"),
        ("run: &a {seed: *a}", "recursive"),
        ("a: " + "[" * 5000, "nests too deeply"),
        (b"run: {name: \xff}", "c.yaml is not UTF-8 text (byte 12)"),
        ("run: {seed: 1}".encode("utf-16"), "c.yaml is not UTF-8 text (byte 0)"),
        (b"run: {name: a\x00b}", "is not YAML: special characters are not allowed"),
        (b"\x1f\x8b\x08\x00", "is not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, text: str | bytes, complaint: str):
    assert complaint in _refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{seed: '5'}", "run.seed is '5' (text), it must be a whole number: write 5 without quotes"),
        ("{seed: 1e3}", "run.seed is 1000.0 (a number), it must be a whole number: write 1000"),
        ("{seed: 1.5}", "run.seed is 1.5 (a number), it must be a whole number"),
        ("{seed: true}", "run.seed is true, it must be a whole number"),
        ("{seed: 'true'}", "run.seed is 'true' (text), it must be a whole number"),
        ("{seed: [1]}", "run.seed is [1] (a list), it must be a whole number"),
        ("{seed: {a: 1}}", "run.seed is {'a': 1} (a mapping), it must be a whole number"),
        ("{name: 5}", 'run.name is 5 (a whole number), it must be text: write "5" in quotes'),
        ("{name: ''}", "run.name is '' (text), it must be text"),
    ],
)
def test_a_wrong_type_names_the_key_the_value_and_what_it_must_be(tmp_path: Path, text: str, complaint: str):
    assert _refusal(tmp_path, f"\nrun: {text}") == f"c.yaml line 2: {complaint}"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("'true'", "'true' (text), it must be true or false: write true without quotes"),
        ("'False'", "'False' (text), it must be true or false: write false without quotes"),
        ("yes", "'yes' (text), it must be true or false: write true without quotes"),
        ("'off'", "'off' (text), it must be true or false: write false without quotes"),
        ("'5'", "'5' (text), it must be true or false"),
        ("1", "1 (a whole number), it must be true or false"),
        ("perhaps", "'perhaps' (text), it must be true or false"),
    ],
)
def test_text_is_not_converted_to_a_boolean_or_number(tmp_path: Path, value: str, complaint: str):
    expected = f"c.yaml line 1: optimizer.is_fused is {complaint}"
    assert _refusal(tmp_path, f"optimizer: {{is_fused: {value}}}") == expected
    assert load_config(_Root, None, ["optimizer.is_fused=true"]).optimizer.is_fused is True


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.sede=1", "unknown key run.sede, the nearest valid key is run.seed"),
        ("seed=1", "unknown key seed, the nearest valid key is run.seed"),
        ("run.seed.x=1", "unknown key run.seed.x, the nearest valid key is run.seed"),
        ("run=1", "run is a section: set its keys one by one, such as run.name=…"),
        ("optimizer={lr: 1}", "optimizer is a section"),
        ("run.seed=", "run.seed= is empty: give a value"),
        ("optimizer.note=", "optimizer.note= is empty: give a value, or null for none"),
        ("run.seed", "'run.seed' sets no key: write section.key=value"),
        ("=1", "'=1' sets no key"),
        ("--run.seed=1", "--run.seed=1 has dashes: write run.seed=1"),
        ("run.seed=many", "run.seed is 'many' (text), it must be a whole number"),
        ("run.seed='5'", "run.seed is '5' (text), it must be a whole number: write 5 without quotes"),
        ("run.seed=[", "run.seed is '[' (text), it must be a whole number"),
        ("optimizer.betas=[1]", "optimizer.betas is [1] (a list), it must be a list of 2"),
        ("optimizer.betas=[1,a]", "it must be a list of 2: a number, a number"),
        ("run.seed=017", "run.seed is '017' (text), it must be a whole number"),
    ],
)
def test_a_wrong_override_is_refused(override: str, complaint: str):
    with pytest.raises(ConfigError) as caught:
        load_config(_Root, None, [override])
    assert str(caught.value).startswith("command line: ")
    assert complaint in str(caught.value)


def test_a_missing_key_says_how_to_set_it(tmp_path: Path):
    expected = "data.path is required: add data.path=… to the command line, or path: below data: in the file"
    assert _refusal(tmp_path, "", root=_NeedsData) == expected


def test_all_wrong_keys_are_named_at_once(tmp_path: Path):
    text = _refusal(tmp_path, "run: {seed: a}\noptimizer: {lr: 0, kind: lion}", "optimizer.clip=x")
    for path in ("run.seed", "optimizer.lr", "optimizer.kind", "optimizer.clip"):
        assert f"{path} is" in text


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there is no config file .*nothing\.yaml"):
        load_config(_Root, tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(_Root, tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"c\.yaml is not a regular file"):
        load_config(_Root, tmp_path / "c.yaml")


def test_aliases_do_not_multiply(tmp_path: Path):
    """Nine lists of nine aliases each are ten billion values out of half a kilobyte."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 9)}]")
    text = "run: {" + ", ".join(lines) + "}"
    start = time.process_time()
    assert "values, aliases counted; a config has at most" in _refusal(tmp_path, text)
    assert "run.seed is" in _refusal(tmp_path, "", f"run.seed={{{', '.join(lines)}}}")
    assert time.process_time() - start < 2
    assert _load(tmp_path, "run: {name: &n x, seed: &s 3}\noptimizer: {lr: *s}").optimizer.lr == 3.0


def test_thousands_of_unknown_keys_are_refused_in_a_short_message(tmp_path: Path):
    text = "run:\n" + "".join(f"  unknown_key_{i}: 1\n" for i in range(4000))
    start = time.process_time()
    message = _refusal(tmp_path, text)
    assert time.process_time() - start < 3
    assert "unknown key run.unknown_key_19," in message
    assert message.endswith("and 3980 more keys are unknown")
    assert len(message) < 4000


def test_a_config_of_a_megabyte_is_refused_unread(tmp_path: Path):
    start = time.process_time()
    assert "is larger than" in _refusal(tmp_path, "run:\n" + "  seed: 1\n" * 100_000)
    assert time.process_time() - start < 2


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("glm_rlhf.parallel.storage.text_files.os.open", refuse)
    assert _refusal(tmp_path, "") == "c.yaml cannot be read: Permission denied"


def test_an_error_in_several_items_of_a_list_is_reported_once():
    with pytest.raises(ConfigError) as caught:
        load_config(_Root, None, ["optimizer.betas=[a,b]"])
    assert str(caught.value).count("optimizer.betas") == 1


def test_a_config_is_saved_and_read_back(tmp_path: Path):
    loaded = load_config(_Root, None, ["run.name=1e-6", "optimizer.betas=[0.1,0.2]", "optimizer.note=no"])
    path = save_config(loaded, tmp_path / "a" / "b")
    assert path == tmp_path / "a" / "b" / "config.yaml"
    assert load_config(_Root, path) == loaded


_TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1)
_NUMBER = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    name=_TEXT
    | st.sampled_from(["null", "true", "1", "1e-6", "yes", "~", "<<", "2024-01-01", "'", "- a", "#"]),
    seed=st.integers(-(2**63), 2**63),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    clip=st.none() | _NUMBER,
    note=st.none() | _TEXT,
)
def test_any_config_survives_its_yaml(tmp_path_factory, name, seed, lr, clip, note):
    optimizer = _Optimizer(lr=lr, clip=clip, note=note, is_fused=seed % 2 == 0)
    config = _Root(run=_Run(name=name, seed=seed), optimizer=optimizer)
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(_Root, path) == config


def test_overrides_are_distinguished_from_files():
    assert [is_override(text) for text in ("a.b=c", "seed=1", "--a.b=c", "a_b.c-d=")] == [True] * 4
    assert [is_override(text) for text in ("c.yaml", "./a=b.yaml", "=x", "--flag", "")] == [False] * 5
