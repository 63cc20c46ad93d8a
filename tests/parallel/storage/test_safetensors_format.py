"""A safetensors header is accepted only if it is valid to the byte."""

import json
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm_rlhf.parallel.storage.model_folder import ModelFolderError
from glm_rlhf.parallel.storage.safetensors_format import FLOAT_DTYPES, plan_file, read_header


def write(path, header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin, end, dtype="F32", shape=None):
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def test_the_library_s_own_files_are_read(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(4),
        "c": torch.randn(7).bfloat16(),
        "d": torch.empty(0),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: e.shape for name, e in header.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, tensor in tensors.items():
        stored = content[header[name].offset : header[name].offset + header[name].num_bytes]
        assert stored == bytes(tensor.view(torch.uint8).flatten().tolist() if tensor.numel() else [])


BAD = {
    "empty": (lambda p: p.write_bytes(b""), "has 0 bytes"),
    "huge header": (lambda p: write(p, {}, length=2**40), "header has 1099511627776 bytes"),
    "header past the end": (lambda p: write(p, {}, b"", length=99), "is truncated: 10 bytes"),
    "not text": (lambda p: write(p, b"\xff\xfe"), "not UTF-8"),
    "not json": (lambda p: write(p, b"{'a'"), "is not JSON"),
    "a list": (lambda p: write(p, []), "holds a list"),
    "deep": (lambda p: write(p, b"[" * 100_000), "the header of"),
    "twice": (lambda p: write(p, b'{"a": 1, "a": 2}'), "'a' stands there twice"),
    "a number": (lambda p: write(p, {"a": 1}), "'a': exactly dtype, shape and data_offsets"),
    "more keys": (lambda p: write(p, {"a": entry(0, 16) | {"x": 1}}), "'a': exactly dtype"),
    "dtype": (lambda p: write(p, {"a": entry(0, 16, "F31")}), "'a': dtype 'F31' is unknown"),
    "dtype list": (lambda p: write(p, {"a": entry(0, 16, [])}), r"'a': dtype \[\] is unknown"),
    "negative": (lambda p: write(p, {"a": entry(0, 16, shape=[-4])}), r"'a': shape \[-4\]"),
    "true": (lambda p: write(p, {"a": entry(0, 4, shape=[True])}), r"'a': shape \[True\]"),
    "many dimensions": (lambda p: write(p, {"a": entry(0, 16, shape=[1] * 9)}), "8 dimensions at most"),
    "backwards": (lambda p: write(p, {"a": entry(16, 0, shape=[4])}), r"'a': data_offsets \[16, 0\]"),
    "wrong length": (
        lambda p: write(p, {"a": entry(0, 16, shape=[3])}),
        r"'a': 16 bytes .* F32 \[3\] needs 12",
    ),
    "overlap": (lambda p: write(p, {"a": entry(0, 12), "b": entry(8, 16)}), "'b': begins .* overlaps"),
    "twice the same": (lambda p: write(p, {"a": entry(0, 16), "b": entry(0, 16)}), "'b': begins .* overlaps"),
    "hole": (lambda p: write(p, {"a": entry(0, 4), "b": entry(8, 16)}), "'b': begins .* leaves a hole"),
    "hole in front": (lambda p: write(p, {"a": entry(8, 16)}), "'a': begins .* leaves a hole"),
    "cut": (lambda p: write(p, {"a": entry(0, 16)}, b"\0" * 8), "is truncated"),
    "left over": (lambda p: write(p, {"a": entry(0, 12)}), "has bytes left over"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_header_is_refused_in_one_sentence(tmp_path, case):
    make, message = BAD[case]
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(ModelFolderError, match=message) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shape_of_many_numbers_costs_linear_time(tmp_path):
    """Their product has millions of digits, and its computation took minutes."""
    path = write(tmp_path / "x.safetensors", {"a": entry(0, 16, shape=[2**62] * 300_000)})
    start = time.process_time()
    with pytest.raises(ModelFolderError, match=r"'a': shape .* is not a list of counts") as caught:
        read_header(path)
    assert time.process_time() - start < 2 * path.stat().st_size / 1e6 + 1
    assert len(str(caught.value)) < len(str(path)) + 300


_NUMBERS = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
_ENTRY = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "BOOL"]), _NUMBERS),
            "shape": st.one_of(
                st.lists(st.integers(0, 5), max_size=3), st.lists(_NUMBERS, max_size=3), _NUMBERS
            ),
            "data_offsets": st.one_of(
                st.lists(st.integers(0, 40), min_size=2, max_size=2), st.lists(_NUMBERS, max_size=3), _NUMBERS
            ),
        }
    ),
    st.recursive(_NUMBERS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)),
)


@settings(max_examples=300, deadline=None)
@given(
    header=st.one_of(
        st.dictionaries(st.text(max_size=4), _ENTRY, max_size=4).map(lambda h: json.dumps(h).encode()),
        st.binary(max_size=60),
    ),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    data=st.binary(max_size=40),
)
def test_any_bytes_are_either_refused_or_fill_the_file(tmp_path_factory, header, length, data):
    path = write(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", header, data, length)
    try:
        entries = read_header(path)
    except ModelFolderError:
        return
    spans = sorted((e.offset, e.offset + e.num_bytes) for e in entries.values())
    stops = [stop for _, stop in spans]
    assert all(begin == stop for (begin, _), stop in zip(spans[1:], stops, strict=False))
    assert max(stops, default=path.stat().st_size) == path.stat().st_size


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_never_reads_outside_the_file(tmp_path_factory, position, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_file({"first": torch.ones(4, 3), "second": torch.ones(5)}, path)
    content = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack("<Q", content[:8])
    content[position % (8 + header_bytes)] ^= 1 << bit
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except ModelFolderError:
        return
    assert all(8 <= e.offset <= e.offset + e.num_bytes <= len(content) for e in entries.values())


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from(list(FLOAT_DTYPES.values())), st.lists(st.integers(0, 4), max_size=3).map(tuple)
        ),
        max_size=6,
    )
)
def test_a_planned_file_is_what_the_library_reads(tmp_path_factory, tensors):
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    prefix, entries = plan_file(tensors)
    values = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    content = bytearray(prefix)
    for name, e in entries.items():
        assert e.offset == len(content)
        assert e.offset % values[name].element_size() == 0, "each tensor is aligned to its own type"
        content += bytes(values[name].flatten().view(torch.uint8).tolist())
    path.write_bytes(content)
    assert read_header(path) == entries
    read_back = load_file(path)
    assert read_back.keys() == values.keys()
    assert all(torch.equal(read_back[name], values[name]) for name in values)
