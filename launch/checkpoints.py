"""One door to every trained model: a run of `launch.train`, or what `launch.pretrained` converted.

Of a run only the parameters after its last step are read, whatever devices it was trained on, and
nothing in its folder is touched. A tokenizer that the run learned is found with its prepared text,
by the fingerprint that the run's config names.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from launch.experiment import Experiment
from models import pretrained
from models.task import language_model
from models.transformer import TransformerConfig
from qat.policy import Policy
from qat.spelling import nearest
from qat.training import data, seal
from qat.training.byte_pairs import BytePairsOfCorpus
from qat.training.results import Row, hash_of, rows_of
from qat.training.sharding import path_name
from qat.training.step import Params
from qat.training.tokenizer import Tokenizer, parse_tokenizer

CHECKPOINTS = "checkpoints"  # folder of a run's states
UNKNOWN = "unknown"
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model.

    Attributes:
        name: its folder, as it was given.
        config: shape of the decoder.
        params: its parameters: a pure dict of float32 NumPy arrays.
        policy: precision it was trained in.
        tokenizer_name: of what encodes text for it, as `data.tokenizer` of a config spells it.
        sequence_length: the longest sequence in training, tokens; 0 if unknown.
        identity: a hash of what it is: the run and its step, or the converted model.
        data_fingerprint: of the text it was trained on; "unknown" of a converted model.
        experiment: the run's; None of a converted model.
        row: of the run's result; None of a converted model, or of a run that has none yet.
    """

    name: str
    config: TransformerConfig
    params: Params
    policy: Policy
    tokenizer_name: str
    sequence_length: int
    identity: str
    data_fingerprint: str
    experiment: Experiment | None = None
    row: Row | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify the parameters."""
        total = hashlib.blake2b(digest_size=6)
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            array = np.ascontiguousarray(leaf)
            total.update(f"{path_name(path)} {array.dtype} {array.shape}\n".encode())
            total.update(array.data)
        return total.hexdigest()

    def tokenizer(self, data_dir: Path) -> Tokenizer:
        """What encodes text for it.

        Args:
            data_dir: where the run's prepared text is, for a tokenizer that was learned from it.

        Raises:
            ValueError: it was learned from the text, which is not prepared there.
        """
        recipe = parse_tokenizer(self.tokenizer_name)
        if not isinstance(recipe, BytePairsOfCorpus):
            return recipe
        for path in sorted(data_dir.glob("*/packed_text/*/metadata.json")):
            if json.loads(path.read_bytes())["fingerprint"] == self.data_fingerprint:
                return data.load(path.parent).tokenizer
        raise ValueError(
            f"tokenizer {self.tokenizer_name!r} was learned from text {self.data_fingerprint}, "
            f"which is not prepared in {data_dir}: expected the run's --data_dir"
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a trained model.

    Args:
        folder: workdir of a finished run of `launch.train`, or folder made by `launch.pretrained`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is neither; or the run is not finished, diverged or is damaged.
    """
    place = folder.expanduser()
    if pretrained.is_pretrained(place):
        return _converted(str(folder), place)
    path = place / _CONFIG
    if not path.is_file():
        raise ValueError(_no_model(str(folder), place))
    try:
        config = json.loads(path.read_bytes())
        fingerprint: str = config.pop("data_fingerprint")
        experiment = Experiment.from_config(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not that of a run ({error}): expected the workdir of launch.train; other "
            "models are converted by python -m launch.pretrained --source"
        ) from None
    run = {"config": experiment.config, "data": fingerprint}
    rows = [row for row in rows_of(place) if row.run_id == hash_of(run)]
    return Checkpoint(
        name=str(folder),
        config=experiment.model,
        params=_params(_last_state(place, experiment, fingerprint), experiment),
        policy=experiment.policy,
        tokenizer_name=config["data"]["tokenizer"],
        sequence_length=config["data"]["sequence_length"],
        identity=hash_of({**run, "step": experiment.schedule.total_steps}),
        data_fingerprint=fingerprint,
        experiment=experiment,
        row=rows[0] if rows else None,
    )


def _no_model(name: str, place: Path) -> str:
    """Of a folder that is not there or holds something else, with the nearest that holds one."""
    beside = [each for each in sorted(place.absolute().parent.glob("*/")) if _is_model(each)]
    near = f"; nearest is {nearest(place, map(str, beside))!r}" if beside else ""
    return (
        f"checkpoint {name!r} holds no model: expected the workdir of launch.train or "
        f"launch.pretrained{near}"
    )


def _is_model(folder: Path) -> bool:
    return pretrained.is_pretrained(folder) or (folder / _CONFIG).is_file()


def _converted(name: str, place: Path) -> Checkpoint:
    """A model that `launch.pretrained` converted."""
    description = pretrained.describe(place)
    config, params, tokenizer = pretrained.load(place)
    return Checkpoint(
        name=name,
        config=config,
        params=jax.device_get(params),
        policy=Policy.parse("none"),
        tokenizer_name=tokenizer.name,
        sequence_length=description.context_length,
        identity=description.identity,
        data_fingerprint=UNKNOWN,
    )


def _last_state(folder: Path, experiment: Experiment, fingerprint: str) -> Path:
    """Folder of the state after a run's last step.

    Raises:
        ValueError: there is none, it is damaged, or it belongs to another run.
    """
    step = folder / CHECKPOINTS / str(experiment.schedule.total_steps)
    if not step.is_dir():
        raise ValueError(
            f"checkpoint {str(folder)!r}: the run has no state after its last step ({step.name}); "
            "expected one that is finished and has not diverged"
        )
    try:
        words = seal.read(step)
    except seal.BrokenError as reason:
        raise ValueError(f"checkpoint {step} is damaged: {reason}") from None
    identity = (words["identity"]["configuration"], words["identity"]["data"])
    if identity != (experiment.config_hash, fingerprint):
        raise ValueError(f"checkpoint {step} belongs to another run than {_CONFIG} says")
    return step / "state"


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
    params: Params = restored["params"]
    return params
