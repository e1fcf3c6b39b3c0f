"""Proves that pickles are read without running anything, and that arrays come back exactly."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from echoshift.pipeline.errors import ManifestError, UnsafePickleError
from echoshift.pipeline.restricted_pickle import (
    NUMPY_CONSTRUCTORS,
    PANDAS_CONSTRUCTORS,
    PickledFrame,
    read_restricted_pickle,
)

ALL = {**NUMPY_CONSTRUCTORS, **PANDAS_CONSTRUCTORS}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def save(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_come_back_exactly(tmp_path, protocol):
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    shared = np.arange(3, dtype=">i2")
    value = {
        "f4": np.linspace(0, 1, 7, dtype="f4"),
        "fortran": fortran,
        "big endian": shared,
        "again": [shared, (shared,)],
        "bool": np.array([[True], [False]]),
        "empty": np.zeros((0, 4)),
        "zero-d": np.array(2.5),
        "text": np.array(["a", "é"], dtype=object),
        "fixed": np.array([b"ab", b"c"]),
        "scalar": np.float32(0.1),
        "plain": (1, "x", None, 2.5, b"y"),
    }
    read = read_restricted_pickle(save(tmp_path / "a.pkl", value, protocol))
    assert list(read) == list(value)
    for name in ("f4", "fortran", "big endian", "bool", "empty", "zero-d", "text", "fixed"):
        assert read[name].dtype == value[name].dtype and read[name].shape == value[name].shape
        np.testing.assert_array_equal(read[name], value[name])
        assert read[name].flags.writeable
    assert read["again"][0] is read["big endian"] and read["again"][1][0] is read["big endian"]
    assert read["scalar"] == np.float32(0.1) and read["scalar"].dtype == np.float32
    assert read["plain"] == value["plain"]


def test_names_of_numpy_1_and_2_are_both_read(tmp_path):
    new = pickle.dumps(np.arange(4), protocol=4)
    assert b"numpy._core.multiarray" in new
    old = pickletools.optimize(new).replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    old = old[:2] + old[11:]  # without its frame, whose length has changed
    for content in (new, old):
        np.testing.assert_array_equal(read_restricted_pickle(save(tmp_path / "a.pkl", content)), np.arange(4))


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {planted}",), "posix.system"),
        (builtins.eval, ("open('{planted}', 'w')",), "builtins.eval"),
        (builtins.getattr, ("x", "y"), "builtins.getattr"),
        (pd.read_pickle, ("{planted}",), "pandas.io.pickle.read_pickle"),
        (pd.DataFrame.to_csv, ("{planted}",), "pandas.core.generic.NDFrame.to_csv"),
        (np.save, ("{planted}", 1), "numpy.save"),
        (pickle.loads, (b"N.",), "_pickle.loads"),
    ],
)
@pytest.mark.parametrize("allowed", [NUMPY_CONSTRUCTORS, ALL])
@pytest.mark.parametrize("place", ["outside", "in an object array"])
def test_planted_calls_are_refused_by_name_and_not_made(tmp_path, function, args, name, allowed, place):
    planted = tmp_path / "planted"
    call = Call(function, *[a.replace("{planted}", str(planted)) if isinstance(a, str) else a for a in args])
    value: object = [call]
    if place == "in an object array":
        value = np.array([None, 1], dtype=object)
        value[0] = call
    path = save(tmp_path / "bad.pkl", value)
    with pytest.raises(UnsafePickleError) as raised:
        read_restricted_pickle(path, allowed)
    assert f"{path} asks for " in str(raised.value)
    assert name.rsplit(".", 1)[1] in str(raised.value) and name.split(".", 1)[0] in str(raised.value)
    assert not planted.exists()


def test_attributes_of_listed_names_and_pandas_in_weights_are_refused(tmp_path):
    path = save(tmp_path / "a.pkl", b"\x80\x04\x8c\x11pandas.core.frame\x8c\x10DataFrame.to_csv\x93.")
    with pytest.raises(UnsafePickleError, match=r"asks for pandas\.core\.frame\.DataFrame\.to_csv"):
        read_restricted_pickle(path, ALL)
    with pytest.raises(UnsafePickleError, match=r"asks for pandas\..*DataFrame"):
        read_restricted_pickle(save(tmp_path / "a.pkl", pd.DataFrame({"a": [1]})))


def test_object_array_whose_flags_deny_objects_is_no_pointer(tmp_path):
    """NumPy itself would take these 8 bytes for the address of an object."""
    dtype = b"cnumpy\ndtype\n(VO8\nI00\nI01\ntR(K\x03V|\nNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
        b"(K\x01K\x01\x85" + dtype + b"\x89C\x08AAAAAAAAtb."
    )
    with pytest.raises(ManifestError, match="object array of 1 values whose data are something else"):
        read_restricted_pickle(save(tmp_path / "a.pkl", content))


@pytest.mark.parametrize(
    "target",
    [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cpandas.core.indexes.base\nIndex\n",
     b"cpandas.core.frame\nDataFrame\n", b"cpandas.core.internals.managers\nBlockManager\n",
     b"cpandas.core.indexes.base\n_new_Index\n", b"cnumpy.core.multiarray\n_reconstruct\n"],
)  # fmt: skip
@pytest.mark.parametrize("state", [b"}Vvalue\nI1\ns", b"N}V__call__\nI1\ns\x86"])
def test_constructors_take_no_state(tmp_path, target, state):
    before = {key: dict(vars(c)) if isinstance(c, type) else None for key, c in ALL.items()}
    with pytest.raises(ManifestError, match="damaged or no pickle"):
        read_restricted_pickle(save(tmp_path / "a.pkl", b"\x80\x03" + target + state + b"b."), ALL)
    assert before == {key: dict(vars(c)) if isinstance(c, type) else None for key, c in ALL.items()}


@pytest.mark.parametrize(
    "content", [b"", b"not a pickle", b"\x80\x04]", pickle.dumps(np.arange(9))[:-20], b"\x80\x04cnumpy\nndarray\n."]
)
def test_damage_is_named(tmp_path, content):
    path = save(tmp_path / "a.pkl", content)
    with pytest.raises(ManifestError, match="damaged or no pickle") as raised:
        read_restricted_pickle(path)
    assert str(path) in str(raised.value) and raised.value.__cause__ is not None
    with pytest.raises(ManifestError, match=r"no file .*nothing\.pkl"):
        read_restricted_pickle(tmp_path / "nothing.pkl")


def test_structured_types_and_loops_are_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"not a plain one|with fields"):
        read_restricted_pickle(save(tmp_path / "a.pkl", np.zeros(2, dtype="i4,f4")))
    loop: list = []
    loop.append(loop)
    with pytest.raises(ManifestError, match="contain themselves"):
        read_restricted_pickle(save(tmp_path / "b.pkl", loop))


@pytest.mark.shared
@pytest.mark.parametrize("stem", ["D1_train", "D3_test"])
def test_real_frames_are_those_that_pandas_reads(shared_data, stem):
    path = shared_data / "annotations" / "mmsada" / f"{stem}.pkl"
    frame = read_restricted_pickle(path, ALL)
    reference = pd.read_pickle(io.BytesIO(path.read_bytes()))
    assert isinstance(frame, PickledFrame) and frame.n_rows == len(reference)
    assert list(frame.columns) == list(reference.columns)
    for name in reference.columns:
        assert frame.columns[name].tolist() == reference[name].tolist()
