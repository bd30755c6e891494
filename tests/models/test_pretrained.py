"""Checkpoints in GGUF and safetensors compute what the oracle does; others are refused."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import pretrained
from models.task import model_of
from models.transformer import Transformer, split
from qat.training.tokenizer import parse_tokenizer
from tests.models.llama_files import (
    Shape,
    decoded,
    learned_tokenizer,
    logits,
    weights,
    write_folder,
    write_gguf,
)

SHAPE = Shape()
NARROW_HEADS = Shape(heads=2, kv_heads=1, channels=32, width=96)
TIED = weights(SHAPE, tied=True)
TOKENS_T = np.random.default_rng(1).integers(0, SHAPE.vocabulary, 12)
TEXT = "It's 1,234.5  µm — that's\n\n  what 3 of them\tsaid: ½ of π, naïvely.  99 \n 1 "


@functools.partial(jax.jit, static_argnums=0)
def run(graph, params, rest, tokens_BT):
    return nnx.merge(graph, params, rest)(tokens_BT)


def measured(found):
    """Logits of our decoder on `TOKENS_T`."""
    model = model_of(found.description.config, None, jax.tree.map(jnp.asarray, found.params))
    return np.asarray(run(*split(model), jnp.asarray(TOKENS_T)[None])[0])


def assert_computes(found, shape, tensors, neighbours):
    expected = logits(shape, tensors, TOKENS_T, neighbours)
    np.testing.assert_allclose(measured(found), expected, rtol=1e-4, atol=1e-4)
    wrong = logits(shape, tensors, TOKENS_T, not neighbours)
    assert np.abs(wrong - expected).max() > 0.1  # the order of channels matters here


@pytest.fixture(scope="module")
def tied_gguf(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tied.gguf", SHAPE, TIED)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder") / "tied", SHAPE, TIED)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
def test_gguf_computes_what_its_numbers_say(kind, tmp_path):
    stored = {role: decoded(x, kind) for role, x in TIED.items()}
    found = pretrained.read(write_gguf(tmp_path / "model.gguf", SHAPE, TIED, kind))
    assert_computes(found, SHAPE, stored, neighbours=True)


@pytest.mark.parametrize(("dtype", "files"), [("float32", 1), ("float16", 1), ("bfloat16", 3)])
def test_safetensors_compute_what_their_numbers_say(dtype, files, tmp_path):
    found = pretrained.read(write_folder(tmp_path / "model", SHAPE, TIED, dtype, files))
    narrow = jnp.dtype(dtype)
    stored = {role: x.astype(narrow).astype(np.float32) for role, x in TIED.items()}
    assert_computes(found, SHAPE, stored, neighbours=False)


def test_an_untied_head_and_heads_of_another_width(tmp_path):
    tensors = weights(NARROW_HEADS, tied=False)
    of_file = pretrained.read(write_gguf(tmp_path / "model.gguf", NARROW_HEADS, tensors, "F16"))
    stored = {role: decoded(x, "F16") for role, x in tensors.items()}
    assert_computes(of_file, NARROW_HEADS, stored, neighbours=True)
    of_folder = pretrained.read(write_folder(tmp_path / "model", NARROW_HEADS, tensors))
    assert_computes(of_folder, NARROW_HEADS, tensors, neighbours=False)
    assert of_file.description.config == of_folder.description.config
    assert of_file.description.config.head_width == 32


def test_parameters_are_those_of_the_decoder(tied_gguf):
    found = pretrained.read(tied_gguf)
    config = found.description.config
    model = nnx.eval_shape(lambda: Transformer(config, None, rngs=nnx.Rngs(0)))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)  # noqa: E731
    assert shapes(found.params) == shapes(split(model)[1])
    assert config.rope_base == 50_000 and config.norm_epsilon == 1e-3
    assert found.description.context_length == SHAPE.context
    head, embedding = found.params["head"]["kernel"], found.params["embed"]["embedding"]
    np.testing.assert_array_equal(head, embedding.T)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
        {"architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": None},
    ],
)
def test_other_spellings_of_the_same_model(changes, tied_folder, tmp_path):
    same = pretrained.read(write_folder(tmp_path / "tied", SHAPE, TIED, **changes))
    assert same.description == pretrained.read(tied_folder).description


def test_a_tied_head_may_be_there(tied_folder, tmp_path):
    changes = {"tie_word_embeddings": True}
    both = write_folder(tmp_path / "tied", SHAPE, {**TIED, "head": TIED["embed"]}, **changes)
    assert pretrained.read(both).description == pretrained.read(tied_folder).description
    other = weights(SHAPE, tied=False)
    other = write_folder(tmp_path / "other", SHAPE, other, **changes)
    with pytest.raises(ValueError, match="head and embedding differ"):
        pretrained.read(other)


def test_a_converted_model_is_the_same_to_the_bit(tied_gguf, tmp_path):
    found, folder = pretrained.read(tied_gguf), tmp_path / "a" / "model"
    pretrained.write(folder, found)
    config, params, tokenizer = pretrained.load(folder)
    assert pretrained.describe(folder) == found.description
    assert config == found.description.config
    jax.tree.map(np.testing.assert_array_equal, params, found.params)
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {type(jnp.zeros(1))}
    assert parse_tokenizer(tokenizer.name) == tokenizer
    with pytest.raises(FileExistsError, match="not an empty folder"):
        pretrained.write(folder, found)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("pretrained.json", b": 96", b": 95", "is damaged"),
        ("tokenizer.json", b"endoftext", b"endoftexx", "belongs to another model"),
        ("params.safetensors", b"identity", b"identitx", "expected what qat.storage.save wrote"),
    ],
)
def test_damage_is_noticed(name, old, new, message, tied_gguf, tmp_path):
    pretrained.write(tmp_path / "model", pretrained.read(tied_gguf))
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path / "model")


def test_parts_of_two_models_are_not_one(tied_gguf, tmp_path):
    first = pretrained.read(tied_gguf)
    changed = dataclasses.replace(first.description, source="another")
    pretrained.write(tmp_path / "a", first)
    pretrained.write(tmp_path / "b", dataclasses.replace(first, description=changed))
    (tmp_path / "a" / "params.safetensors").replace(tmp_path / "b" / "params.safetensors")
    with pytest.raises(ValueError, match=r"params\.safetensors belongs to another model"):
        pretrained.load(tmp_path / "b")


PRE = tokenizers.pre_tokenizers
LLAMA_3 = (  # as Meta's tokenizer cuts words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt-2": PRE.ByteLevel(add_prefix_space=False),
    "smollm": PRE.Sequence([PRE.Digits(individual_digits=True), PRE.ByteLevel(False)]),
    "llama-bpe": PRE.Sequence(
        [PRE.Split(tokenizers.Regex(LLAMA_3), "isolated"), PRE.ByteLevel(False, use_regex=False)]
    ),
}


@pytest.mark.parametrize("pre", CUTS)
def test_the_tokenizer_of_gguf_is_that_of_the_other_library(pre, tmp_path):
    other = learned_tokenizer(CUTS[pre])
    path = write_gguf(tmp_path / "model.gguf", SHAPE, TIED, learned=other, pre=pre)
    pretrained.write(tmp_path / "model", pretrained.read(path))
    tokenizer = pretrained.load(tmp_path / "model")[2]
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in (TEXT, TEXT[::-1], "<|im_end|>"[:-1]):
        ids = other.encode(text).ids
        assert tokenizer.encode(text).tolist() == again.encode(text).ids == ids
        assert tokenizer.decode(np.array(ids)) == again.decode(ids) == text
    assert tokenizer.decode(np.array([tokenizer.separator])) == "\0"


def test_bytes_without_an_id_are_left_out_as_the_other_library_does(tmp_path):
    ascii_alone = [c for c in PRE.ByteLevel.alphabet() if c.isascii()] + ["Ġ", "Ċ", "ĉ"]
    other = learned_tokenizer(alphabet=ascii_alone, size=200)
    tokenizer = pretrained.read(write_gguf(tmp_path / "m.gguf", SHAPE, TIED, learned=other))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    ours = parse_tokenizer(str(tmp_path / "tokenizer.json"))
    for text in ("that is § 3, half¢ ¶", "€\n\n"):  # each left out is a word
        assert ours.encode(text).tolist() == other.encode(text).ids
    assert ours.decode(ours.encode(TEXT)) == TEXT.encode("ascii", "ignore").decode()


def fails(path, *words):
    """A ValueError of one line with these words, which names the file."""
    with pytest.raises(ValueError) as caught:
        pretrained.read(path.parent if path.suffix in (".json", ".safetensors") else path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, ["architecture 'qwen2': expected one of llama"]),
        ({"embedding_length": None}, ["llama.embedding_length = None: expected a whole number"]),
        ({"block_count": 3}, ["tensor blk.2.attn_norm.weight is missing"]),
        ({"block_count": 1}, ["tensor blk.1.attn_k.weight has no place"]),
        ({"attention.head_count_kv": 3}, ["heads = 4 is not a multiple of kv_heads = 3"]),
        ({"attention.head_count_kv": 4}, ["blk.0.attn_k.weight has shape (32, 64)", "(64, 64)"]),
        ({"rope.scaling.type": "yarn"}, ["rope.scaling.type = 'yarn': only 'none' is known"]),
        ({"rope.dimension_count": 8}, ["llama.rope.dimension_count = 8: expected 16"]),
        ({"expert_count": 8}, ["llama.expert_count = 8: only 0 is known"]),
        ({"pre": "qwen2"}, ["unknown tokenizer.ggml.pre 'qwen2'", "gpt-2, smollm, llama-bpe"]),
        ({"learned": learned_tokenizer(size=331)}, ["has 331 ids", "embedding 330 rows"]),
    ],
)
def test_a_gguf_file_that_is_another_model(changes, words, tmp_path):
    fails(write_gguf(tmp_path / "model.gguf", SHAPE, TIED, **changes), *words)


def test_a_type_that_is_not_known(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", SHAPE, TIED, "Q5_0")
    fails(path, "token_embd.weight has type Q5_0: expected one of F32, F16, Q8_0, Q4_1")


def test_gguf_needs_its_package(tied_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    fails(tied_gguf, "needs the package gguf: pip install")


def test_a_damaged_gguf_file(tied_gguf, tmp_path):
    whole = tied_gguf.read_bytes()
    for size in (0, 3, 20, 2000, len(whole) // 2, len(whole) - 100):
        path = tmp_path / f"{size}.gguf"
        path.write_bytes(whole[:size])
        fails(path, "expected a whole GGUF file of version 2 or 3")
    path.write_bytes(b"no" + whole[2:])
    fails(path, "magic")
    tensors = {**TIED, "norm": TIED["norm"] * np.float32("nan")}
    fails(write_gguf(tmp_path / "nan.gguf", SHAPE, tensors), "output_norm", "not finite")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, ["'Qwen2ForCausalLM'", "LlamaForCausalLM"]),
        ({"hidden_size": None}, ["hidden_size = None: expected a whole number above 0"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps = 'small': expected a number above 0"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu': only 'silu' is known"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling = {'type': 'linear'}"]),
        ({"sliding_window": 64}, ["sliding_window = 64"]),
        ({"vocab_size": 331}, ["embed_tokens.weight has shape (330, 64): expected (331, 64)"]),
        ({"tie_word_embeddings": False}, ["tensor lm_head.weight is missing"]),
    ],
)
def test_a_folder_that_is_another_model(changes, words, tmp_path):
    fails(write_folder(tmp_path / "model", SHAPE, TIED, **changes), *words)


def test_a_damaged_folder(tmp_path):
    folder = write_folder(tmp_path / "model", SHAPE, TIED, files=2)
    part = folder / "model-00002-of-00002.safetensors"
    stored, whole = load_file(part), part.read_bytes()
    save_file({**stored, "model.layers.0.self_attn.q_proj.bias": np.ones(64)}, part)
    fails(part, "self_attn.q_proj.bias has type F64: expected one of F32, F16, BF16")
    save_file({**stored, "model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}, part)
    fails(folder, "self_attn.q_proj.bias has no place", "no biases")
    save_file({**stored, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, "f4")}, part)
    pretrained.read(folder)
    for damaged in (b"", whole[:5], whole[:-3]):
        part.write_bytes(damaged)
        fails(part, "expected a whole safetensors file")
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name):
        pretrained.read(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    fails(folder / "model.safetensors.index.json", "expected a weight_map")
    (folder / "config.json").write_text("{")
    fails(folder / "config.json", "expected JSON")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: expected that, or a GGUF"):
        pretrained.read(folder)
