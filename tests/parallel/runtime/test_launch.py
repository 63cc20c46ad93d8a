"""Launch variables: what a launcher sets is read, anything else is one sentence that names the variable."""

import pytest

from glm_rlhf.parallel.runtime.launch import Launch, read_address, read_launch

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


def test_what_torchrun_sets_is_read():
    assert read_launch(TORCHRUN) == Launch(rank=3, world_size=4, local_rank=1, is_launched=True)
    assert read_address(TORCHRUN) == ("node0", 29500)


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"HOME": "/"}])
def test_without_a_launcher_there_is_one_rank(environment: dict[str, str]):
    assert read_launch(environment) == Launch()


def test_a_rank_without_a_local_number_has_the_first_device():
    environment = {"RANK": "1", "WORLD_SIZE": "2"}
    assert read_launch(environment) == Launch(rank=1, world_size=2, is_launched=True)


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["", " ", "abc", "-1", "1.5", "0x2", "nan"])
def test_junk_is_refused_by_name(name: str, value: str):
    with pytest.raises(ValueError, match=f"^{name} is .*it must be a whole number, at least [01]"):
        read_launch(TORCHRUN | {name: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', it must be a whole number, at least 1"),
        ({"RANK": "4"}, "RANK is 4, it must be below WORLD_SIZE, which is 4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, it must be below LOCAL_WORLD_SIZE, which is 2"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is 5, it must be at most WORLD_SIZE, which is 4"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, a port is a whole number from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0', it must be a whole number, at least 1"),
    ],
)
def test_a_number_out_of_range_is_refused(changes: dict[str, str], sentence: str):
    with pytest.raises(ValueError) as caught:
        read_launch(TORCHRUN | changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is not set: start the ranks with torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set: start the ranks with torchrun"),
    ],
)
def test_half_of_a_launch_is_refused(environment: dict[str, str], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        read_launch(environment)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_address_is_refused_by_name(name: str):
    with pytest.raises(ValueError, match=f"{name} is not set, though RANK and WORLD_SIZE are set"):
        read_address({key: value for key, value in TORCHRUN.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} is empty, though"):
        read_address(TORCHRUN | {name: ""})
