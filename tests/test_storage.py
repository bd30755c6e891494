"""Files of both kinds: what comes back, what is on disk, and what is refused."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qat.formats import codebook
from qat.quantizer import Quantizer
from qat.storage import PackedTensor, load, pack, save
from tests.storage_checks import PATHS, any_tensor, assert_same, with_codes

OWN = codebook("own", [-2.0, -0.1, 0.3, 1.7, 5.0])


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@pytest.fixture(params=PATHS)
def path(request, tmp_path):
    """Where each kind of file goes."""
    return tmp_path / request.param


class TestFiles:
    def test_any_container_and_dtype_comes_back(self, path):
        names = ["bool", "int8", "uint16", "int32", "float16", "bfloat16", "complex64"]
        names += ["int4", "uint4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
        random = np.random.default_rng(0)
        values = random.integers(0, 2, (2, 3))
        tree = {
            "arrays": {name: jnp.asarray(values.astype(jnp.dtype(name))) for name in names},
            "layers": [{"w": pack(any_tensor(random, "int3", (8, 3), 0))}, (), {}],
            "blocks": {0: normal(()), 1: (None, True, 3, 0.1, "text", float("inf"))},
            "empty": jnp.zeros((0, 3)),
            "a/0": normal((2,)),  # names that the files may not confuse
            "a": normal((3,)),
            "..": normal((4,)),
            "λ.%": normal((5,)),
        }
        save(path, tree)
        loaded = load(path)
        plain = (bool, int, float, str)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
            assert a == b if isinstance(b, plain) else not assert_same(a, b)
        assert list(loaded) == list(tree)

    def test_a_quantized_tensor_comes_back_packed_with_its_format(self, path):
        mine = with_codes([[4, 0, 1], [2, 3, 4]], OWN)
        save(path, mine)
        loaded = load(path)
        assert isinstance(loaded, PackedTensor)
        assert loaded.format == OWN
        assert_same(loaded.unpack(), mine)

    def test_64_bit_numbers_and_foreign_byte_orders_keep_their_values(self, path):
        tree = {"i": np.arange(3) << 40, "f": np.asarray(1 / 3), "be": np.arange(3, dtype=">f4")}
        save(path, tree)
        loaded = load(path)
        assert {k: v.dtype for k, v in loaded.items()} == {"i": "i8", "f": "f8", "be": "f4"}
        for k, v in tree.items():
            np.testing.assert_array_equal(loaded[k], v)

    def test_size_on_disk_is_the_size_in_memory(self, path):
        packed = pack(any_tensor(np.random.default_rng(0), "int3/channel", (256, 512), 0))
        assert packed.nbytes == 256 * 512 * 3 // 8 + 512 * 4
        save(path, {"w": packed})
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        extra = sum(file.stat().st_size for file in files) - packed.nbytes
        if path.is_file():
            assert 0 < extra < 1000
        else:  # orbax compresses
            assert extra < 6000

    def test_other_programs_can_read_the_names(self, tmp_path):
        path = tmp_path / "model.safetensors"
        qtensor = any_tensor(np.random.default_rng(0), "nvfp4", (64, 24), 0)
        save(path, {"a": {"b": qtensor}, "c": [1.0]})
        with safe_open(path, framework="numpy") as file:
            assert set(file.keys()) == {"a/b.codes", "a/b.scale", "a/b.tensor_scale"}
            assert list(file.metadata()) == ["qat"]

    def test_importing_costs_neither_library(self):
        code = "import qat.storage, sys; print({'orbax', 'safetensors'} & set(sys.modules))"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.stdout == "set()\n", run.stderr


class TestWriting:
    def test_refuses_what_is_there_unless_told(self, path):
        save(path, {"w": normal((2,))})
        with pytest.raises(FileExistsError, match=f"{path.name} exists.*overwrite=True"):
            save(path, {"w": normal((3,))})
        assert load(path)["w"].shape == (2,)
        save(path, {"w": normal((3,))}, overwrite=True)
        assert load(path)["w"].shape == (3,)
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    def test_never_replaces_a_foreign_directory(self, path):
        path.mkdir()
        (path / "thesis.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="did not write"):
            save(path, {}, overwrite=True)
        assert (path / "thesis.txt").read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_what_fails_leaves_nothing(self, path, overwrite, monkeypatch):
        if overwrite:
            save(path, {"w": normal((2,))})
        before = list(path.parent.iterdir())

        def half(where, *args, **kwargs):
            raise OSError("disk full")

        monkeypatch.setattr("safetensors.numpy.save_file", half)
        monkeypatch.setattr("orbax.checkpoint.args.JsonSave", half)
        with pytest.raises(OSError, match="disk full"):
            save(path, {"w": normal((3,))}, overwrite)
        assert list(path.parent.iterdir()) == before
        assert not overwrite or load(path)["w"].shape == (2,)

    def test_makes_missing_folders(self, path):
        save(path.parent / "new" / path.name, {})
        assert load(path.parent / "new" / path.name) == {}

    @pytest.mark.parametrize(
        ("leaf", "message"),
        [
            (jax.random.key(0), "a/0 is .*key<fry>"),
            (Quantizer("int4"), "a/0 is Quantizer"),
            (np.asarray(["text"]), "a/0 is ndarray of <U4"),
            ({(1, 2): 0}, r"a/0: keys are text or integers, got \(1, 2\)"),
        ],
    )
    def test_says_where_it_cannot_store(self, tmp_path, leaf, message):
        with pytest.raises(TypeError, match=message):
            save(tmp_path / "x", {"a": [leaf]})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("tree", [{"a": {"b": 0}, "a/b": 0}, {"__metadata__": 0}])
    def test_refuses_two_arrays_of_one_name(self, path, tree):
        with pytest.raises(ValueError, match="cannot be called"):
            save(path, jax.tree.map(jnp.float32, tree))


def one_line(path, reason=""):
    """What a file that `save` did not write, or not so, is refused with."""
    message = rf"\A[^\n]*{path.name}: expected what [^\n]*{reason}[^\n]*\Z"
    return pytest.raises(ValueError, match=message)


class TestDamage:
    def test_nothing_there(self, path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load(path)

    @pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
    def test_every_damaged_file_is_refused_or_does_not_matter(self, path, damage):
        save(path, {"w": np.random.default_rng(0).integers(0, 256, 4000, np.uint8)})
        expected, refused = load(path), 0
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        for file in files:
            whole = bytearray(file.read_bytes())
            middle = len(whole) // 2
            other = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
            file.write_bytes({"cut": whole[:middle], "flipped": other, "gone": b""}[damage])
            try:
                assert_same(load(path), expected)
            except ValueError as error:
                refused += 1
                assert str(error).startswith(f"{path}: expected what")
                assert "\n" not in str(error)
            file.write_bytes(whole)
        assert refused >= min(4, len(files))

    def test_foreign_files(self, tmp_path):
        text, other = tmp_path / "a.txt", tmp_path / "b.safetensors"
        text.write_text("not a checkpoint\n" * 100)
        save_file({"w": np.ones(3, np.float32)}, other)
        for path in (text, other):
            with one_line(path):
                load(path)

    def test_foreign_directories(self, tmp_path):
        plain, other = tmp_path / "plain", tmp_path / "other"
        plain.mkdir()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(other, {"w": np.ones(3, np.float32)})
        for path in (plain, other):
            with one_line(path):
                load(path)

    def test_a_later_version(self, path, monkeypatch):
        monkeypatch.setattr("qat.storage.files._VERSION", 2)
        save(path, {"w": 1})
        monkeypatch.undo()
        with one_line(path, "version 2"):
            load(path)
