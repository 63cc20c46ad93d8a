"""Damaged and malicious checkpoints: refused with a reason, never executed, the previous one used."""

import copy
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from saved_runs import save_steps

from glm_rlhf.parallel.checkpoint.restore import newest_checkpoint
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.storage.checkpoint_manifest import CheckpointError
from glm_rlhf.parallel.storage.checkpoint_tensors import open_checkpoint
from glm_rlhf.parallel.storage.durable_io import remove

NUM_RANDOM = 150
RANK = "rank_00001.safetensors"


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4, of four ranks."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ranks.run(save_steps, folder, {"tp": 2}, [2, 4])
    return folder


@pytest.fixture(scope="module")
def topology():
    with open_topology(Layout()) as topology:
        yield topology


def checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def rewrite(folder: Path, change) -> None:
    """Change a manifest's values, and make its checksum right again."""
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksum"]
    values = change(values) or values
    (folder / "manifest.json").write_text(json.dumps(values | {"checksum": checksum(values)}))


def note_file(folder: Path, name: str) -> None:
    """Make the manifest agree with a rank's file as it is: what remains is what only its content tells."""

    def change(values):
        content = (folder / name).read_bytes()
        values["ranks"][1]["facts"] = {
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    rewrite(folder, change)


def flip(name: str, where: float):
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[int(where * (len(content) - 1))] ^= 0x10
        (folder / name).write_bytes(content)

    return damage


def cut(name: str, keep: float, more: bytes = b""):
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(keep * len(content))] + more)

    return damage


def header(change):
    """Change the header of a rank's file, and let the manifest agree."""

    def damage(folder: Path) -> None:
        content = (folder / RANK).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        text = json.dumps(change(entries) or entries).encode()
        (folder / RANK).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        note_file(folder, RANK)

    return damage


def first_tensor(entries: dict) -> str:
    return next(name for name in entries if name.startswith("policy/weight/"))


def overlapping(entries):
    names = [name for name in entries if name.startswith("policy/weight/")]
    same = [name for name in names if entries[name]["shape"] == entries[names[0]]["shape"]]
    entries[names[0]]["data_offsets"] = entries[(same[1:] or names[1:])[0]]["data_offsets"]


def claims_much(folder: Path) -> None:
    content = (folder / RANK).read_bytes()
    (folder / RANK).write_bytes(struct.pack("<Q", 2**60) + content[8:])
    note_file(folder, RANK)


def swapped(one: str, other: str):
    def damage(folder: Path) -> None:
        (folder / one).rename(folder / "aside")
        (folder / other).rename(folder / one)
        (folder / "aside").rename(folder / other)

    return damage


def linked(name: str):
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"real_{name}")
        (folder / name).symlink_to(folder.parent / f"real_{name}")

    return damage


def as_folder(folder: Path) -> None:
    (folder / RANK).unlink()
    (folder / RANK).mkdir()


def from_before(folder: Path) -> None:
    shutil.copyfile(folder.with_name("step_2") / RANK, folder / RANK)


def manifest(change):
    return lambda folder: rewrite(folder, change)


def outside(name: str):
    facts = {"num_bytes": 1, "sha256": "0" * 64}
    return manifest(lambda values: values["companions"].update({name: facts}))


def duplicate_key(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 4, "step": 4', 1))


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


def in_its_place(place, make):
    """Put something else where a file or the checkpoint is."""

    def damage(folder: Path) -> None:
        remove(place(folder))
        make(place(folder))

    return damage


def starts_of(values) -> dict:
    return values["ranks"][1]["starts"]["policy"]


DAMAGES = {
    "flip in the length": flip(RANK, 0.0),
    "flip in the header": flip(RANK, 0.01),
    "flip in the middle": flip(RANK, 0.5),
    "flip in the last byte": flip(RANK, 1.0),
    "flip in the first rank's": flip("rank_00000.safetensors", 0.7),
    "flip in the last rank's": flip("rank_00003.safetensors", 0.3),
    "flip in the manifest": flip("manifest.json", 0.5),
    "flip in a companion": flip("config.json", 0.5),
    "rank's file empty": cut(RANK, 0.0),
    "rank's file halved": cut(RANK, 0.5),
    "rank's file one byte short": cut(RANK, 0.9999),
    "rank's file longer": cut(RANK, 1.0, b"\0"),
    "manifest empty": cut("manifest.json", 0.0),
    "manifest halved": cut("manifest.json", 0.5),
    "manifest with more behind": cut("manifest.json", 1.0, b"{}"),
    "companion halved": cut("tokenizer_config.json", 0.5),
    "rank's file missing": lambda folder: (folder / RANK).unlink(),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "companion missing": lambda folder: (folder / "config.json").unlink(),
    "two ranks swapped": swapped("rank_00000.safetensors", "rank_00002.safetensors"),
    "neighbours swapped": swapped("rank_00002.safetensors", "rank_00003.safetensors"),
    "a rank's file of the step before": from_before,
    "a folder in a file's place": as_folder,
    "rank's file a link": linked(RANK),
    "manifest a link": linked("manifest.json"),
    "companion a link": linked("config.json"),
    "header claims 2^60 bytes": claims_much,
    "header overlaps": header(overlapping),
    "header leaves a hole": header(lambda entries: entries.pop(first_tensor(entries)) and None),
    "header of another type": header(lambda entries: entries[first_tensor(entries)].update(dtype="F16")),
    "header of whole numbers": header(
        lambda entries: {
            name: entry | ({"dtype": "I32"} if name.startswith("policy/") else {})
            for name, entry in entries.items()
        }
    ),
    "header of an unknown type": header(lambda entries: entries[first_tensor(entries)].update(dtype="O")),
    "header misnames a parameter": header(
        lambda entries: {name.replace("layers.1", "layers.7"): entry for name, entry in entries.items()}
    ),
    "manifest of another format": manifest(lambda values: values.update(format=2)),
    "manifest without a model": manifest(lambda values: values.update(models={})),
    "manifest of another layout": manifest(lambda values: values["layout"].update(tp=4)),
    "manifest of an impossible layout": manifest(lambda values: values["layout"].update(tp=0)),
    "manifest lists too few ranks": manifest(lambda values: values["ranks"].pop() and None),
    "manifest of another shape": manifest(
        lambda values: values["models"]["policy"]["config"].update(num_layers=4)
    ),
    "manifest shifts a part": manifest(
        lambda values: starts_of(values).update(
            {name: start + 1 for name, start in starts_of(values).items()}
        )
    ),
    "manifest forgets a part": manifest(lambda values: starts_of(values).popitem() and None),
    "manifest adds a part": manifest(
        lambda values: values["ranks"][0]["starts"]["policy"].update(
            values["ranks"][3]["starts"]["policy"] | {"embedding.word_embeddings.bias": 0}
        )
    ),
    "manifest with text for a number": manifest(lambda values: values.update(step="4")),
    "manifest with a list for a model": manifest(lambda values: values.update(models=[])),
    "manifest a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "manifest with a key twice": duplicate_key,
    "manifest deep": lambda folder: (folder / "manifest.json").write_bytes(b"[" * 200_000),
    "manifest deep inside": manifest(lambda values: values["state"].update(a=deep(900))),
    "manifest with a huge number": lambda folder: (folder / "manifest.json").write_text("1" * 10_000),
    "manifest a FIFO": in_its_place(lambda folder: folder / "manifest.json", os.mkfifo),
    "manifest a folder": in_its_place(lambda folder: folder / "manifest.json", os.mkdir),
    "checkpoint a FIFO": in_its_place(lambda folder: folder, os.mkfifo),
    "checkpoint a file": in_its_place(lambda folder: folder, Path.touch),
    "checkpoint a link to nothing": in_its_place(lambda folder: folder, lambda path: path.symlink_to("none")),
    "checkpoint a link to itself": in_its_place(lambda folder: folder, lambda path: path.symlink_to(path)),
    "manifest names ../": outside("../step_2/config.json"),
    "manifest names an absolute path": outside("/etc/passwd"),
    "manifest names a folder": outside("."),
}


def damaged_copy(saved: Path, target: Path) -> Path:
    """Copies that share the sound one's files until they are written."""
    shutil.copytree(saved, target)
    return target / "step_4"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_with_a_reason_and_the_previous_step_used(saved, topology, tmp_path, capsys, name):
    DAMAGES[name](damaged_copy(saved, tmp_path / "run"))
    assert newest_checkpoint(tmp_path / "run", topology=topology).manifest.step == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: ")
    assert "step_4" in said.splitlines()[0]
    assert "resuming from the newest complete checkpoint, step_2" in said
    assert "Traceback" not in said


def test_there_are_enough_kinds_of_damage():
    assert len(DAMAGES) >= 30


@pytest.mark.parametrize("content", [b"step_9\n", b"", b"../../etc", b"\xff\xfe", b"step_2\n", None], ids=str)
def test_a_stale_tracker_is_reported_and_ignored(saved, topology, tmp_path, capsys, content):
    damaged_copy(saved, tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()
    if content is not None:
        (tmp_path / "run" / "latest").write_bytes(content)
    assert newest_checkpoint(tmp_path / "run", topology=topology).manifest.step == 4
    assert "resuming from the newest complete checkpoint, step_4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.truncate(os.mknod(path) or path, 2**40)]
)
def test_a_tracker_that_is_no_name_is_not_waited_for(saved, topology, tmp_path, capsys, make):
    damaged_copy(saved, tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()
    make(tmp_path / "run" / "latest")
    assert newest_checkpoint(tmp_path / "run", topology=topology).manifest.step == 4
    said = capsys.readouterr().err
    assert "resuming from the newest complete checkpoint, step_4" in said
    assert all(character.isprintable() for character in said.strip())


def test_no_complete_checkpoint_is_an_error_and_none_at_all_is_none(saved, topology, tmp_path):
    damaged_copy(saved, tmp_path / "run")
    for step in (2, 4):
        (tmp_path / "run" / f"step_{step}" / RANK).unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*step_4.*step_2"):
        newest_checkpoint(tmp_path / "run", topology=topology)
    assert newest_checkpoint(tmp_path / "nothing", topology=topology) is None


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.mkdir, (self.target,)


def payloads(marker: Path, folder: Path) -> dict[str, bytes]:
    torch.save({"policy": Payload(marker)}, folder / "torch")
    return {"pickle": pickle.dumps(Payload(marker)), "torch": (folder / "torch").read_bytes()}


def test_a_pickle_in_any_place_is_never_run(saved, topology, tmp_path):
    marker, num_tried = tmp_path / "ran", 0
    names = ["manifest.json", *(f"rank_0000{rank}.safetensors" for rank in range(4))]
    names += ["config.json", "tokenizer_config.json", "../latest", ".metadata", "common.pt", "__0_0.distcp"]
    for kind, content in payloads(marker, tmp_path).items():
        for name in names:
            folder = damaged_copy(saved, tmp_path / f"{kind}_{num_tried}")
            (folder / name).write_bytes(content)
            step = newest_checkpoint(folder.parent, topology=topology).manifest.step
            if name in names[:7]:
                assert step == 2, name
                if name.startswith("rank"):  # also when the manifest vouches for it
                    note_file(folder, RANK)
                    newest_checkpoint(folder.parent, topology=topology)
            else:
                assert step == 4, name  # nobody reads it
            num_tried += 1
            shutil.rmtree(folder.parent)
    assert num_tried >= 10
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))  # the payload is one
    assert marker.exists()


STRANGE = (None, True, -1, 0, 2**70, 1.5, "", "../x", "a\0b", [], {}, [[]], {"a": 1}, float("nan"))


def leaves(value, path=()):
    """Places of all values below, as paths of keys."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def put(value, path, new) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def test_random_manifests_and_headers_give_typed_errors_or_load(saved, tmp_path):
    """Any value anywhere in a manifest or header replaced, checksums right: a CheckpointError or none."""
    draw = random.Random(11)
    folder = damaged_copy(saved, tmp_path / "run")
    text = (folder / "manifest.json").read_text()
    values = json.loads(text)
    del values["checksum"]
    places = list(leaves(values))
    content = (folder / RANK).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    header_places = list(leaves(entries))
    num_refused, reasons = 0, set()
    for number in range(NUM_RANDOM):
        if number % 3:
            changed = copy.deepcopy(values)
            put(changed, draw.choice(places), draw.choice(STRANGE))
            rewrite(folder, lambda _, changed=changed: changed)
        else:
            changed = copy.deepcopy(entries)
            put(changed, draw.choice(header_places), draw.choice(STRANGE))
            head = json.dumps(changed).encode()
            (folder / RANK).write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])
            note_file(folder, RANK)
        try:
            checkpoint = open_checkpoint(folder)
            checkpoint.tensors(next(iter(checkpoint.manifest.models)))
        except CheckpointError as error:
            num_refused += 1
            reasons.add(str(error))
        (folder / "manifest.json").write_text(text)
        (folder / RANK).write_bytes(content)
    assert num_refused > NUM_RANDOM / 2
    assert all("step_4" in reason for reason in reasons)
