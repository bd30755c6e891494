"""One door to every trained model: a run of `launch.train`, or what `launch.pretrained` converted.

Of a run only the parameters of the newest whole checkpoint are read, whatever devices it was
trained on. Nothing in its folder is touched, so it may still be going on. A tokenizer that the run
learned is found with its prepared text, by the fingerprint that the run's config names.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from launch.experiment import Experiment
from launch.runner import CHECKPOINTS
from models import pretrained
from models.task import language_model
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.training import data, seal
from qat.training.byte_pairs import BytePairsOfCorpus
from qat.training.results import Row, hash_of, rows_of
from qat.training.step import Params
from qat.training.tokenizer import Tokenizer, parse_tokenizer

UNKNOWN = "unknown"
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model.

    Attributes:
        config: shape of the decoder.
        params: its parameters: a pure dict of float32 arrays, bound to no mesh.
        policy: precision it was trained in.
        tokenizer: encodes text for it.
        sequence_length: the longest sequence in training, tokens; 0 if unknown.
        identity: a hash of what it is: the run and its step, or the converted model.
        data_fingerprint: of the text it was trained on; "unknown" of a converted model.
        experiment: the run's; None of a converted model.
        row: of the finished run; None of a converted model, or of a run that is going on.
    """

    config: TransformerConfig
    params: Params
    policy: Policy
    tokenizer: Tokenizer
    sequence_length: int
    identity: str
    data_fingerprint: str
    experiment: Experiment | None = None
    row: Row | None = None


def open_checkpoint(folder: Path, data_dir: Path = Path("runs/data")) -> Checkpoint:
    """Opens a trained model.

    Args:
        folder: workdir of a run of `launch.train`, or folder made by `launch.pretrained`.
        data_dir: where the run's prepared text is, for a tokenizer that was learned from it.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: it is neither, has no whole checkpoint yet, or is damaged.
    """
    if pretrained.is_pretrained(folder):
        return _converted(folder)
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_bytes())
        fingerprint: str = config.pop("data_fingerprint")
        experiment = Experiment.from_config(config)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} holds no model: expected the workdir of launch.train or launch.pretrained"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not that of a run ({error}): expected the workdir of launch.train; other "
            "models are converted by python -m launch.pretrained --source"
        ) from None
    step, params = _newest(folder / CHECKPOINTS, experiment, fingerprint)
    run = {"config": experiment.config, "data": fingerprint}
    rows = [row for row in rows_of(folder) if row.run_id == hash_of(run)]
    return Checkpoint(
        config=experiment.model,
        params=params,
        policy=experiment.policy,
        tokenizer=_tokenizer(config["data"]["tokenizer"], fingerprint, data_dir),
        sequence_length=config["data"]["sequence_length"],
        identity=hash_of({**run, "step": step}),
        data_fingerprint=fingerprint,
        experiment=experiment,
        row=rows[0] if rows else None,
    )


def _converted(folder: Path) -> Checkpoint:
    """A model that `launch.pretrained` converted."""
    description = pretrained.describe(folder)
    config, params, tokenizer = pretrained.load(folder)
    length, identity = description.context_length, description.identity
    return Checkpoint(config, params, Policy.parse("none"), tokenizer, length, identity, UNKNOWN)


def _newest(folder: Path, experiment: Experiment, fingerprint: str) -> tuple[int, Params]:
    """Step and parameters of a run's newest checkpoint that is whole.

    Raises:
        ValueError: there is none, or it belongs to another run.
    """
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    broken: list[str] = []
    for step in sorted(steps, reverse=True):
        try:
            words = seal.read(folder / str(step))
        except seal.BrokenError as reason:
            broken.append(f"{step} is damaged, {reason}")
            continue
        identity = (words["identity"]["configuration"], words["identity"]["data"])
        if identity != (experiment.config_hash, fingerprint):
            raise ValueError(f"{folder / str(step)} belongs to another run than {_CONFIG} says")
        return step, _params(folder / str(step) / "state", experiment)
    raise ValueError(
        f"no whole checkpoint in {folder}: expected one at least"
        + (f"; {'; '.join(broken)}" if broken else "")
    )


def _params(state: Path, experiment: Experiment) -> Params:
    """The parameters of a saved training state.

    Raises:
        ValueError: they are those of another decoder.
    """
    task = language_model(experiment.model, experiment.policy, experiment.scaling)
    abstract = {"params": jax.eval_shape(task.init, jax.random.key(np.uint32(0)))}
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(state.absolute(), args=arguments)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (restored, abstract)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{state} holds another decoder than {_CONFIG} says")
    params: Params = jax.tree.map(jnp.asarray, restored["params"])
    return params


def _tokenizer(spec: str, fingerprint: str, data_dir: Path) -> Tokenizer:
    """That of a run's text.

    Raises:
        ValueError: it was learned from the text, which is not prepared there.
    """
    recipe = parse_tokenizer(spec)
    if not isinstance(recipe, BytePairsOfCorpus):
        return recipe
    for path in sorted(data_dir.glob("*/packed_text/*/metadata.json")):
        if json.loads(path.read_bytes())["fingerprint"] == fingerprint:
            return data.load(path.parent).tokenizer
    raise ValueError(
        f"tokenizer {spec!r} was learned from text {fingerprint}, which is not prepared in "
        f"{data_dir}: expected the run's --data_dir"
    )
