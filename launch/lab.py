"""What experiments share: prepared text, and the compiled programs of each shape."""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

import qat.nnx
from launch import origin
from launch.experiment import Experiment
from launch.own_text import written
from models.task import constants_for, language_model, model_of
from qat.analysis import mean_and_standard_error
from qat.policy import Policy
from qat.training.checkpoint import Checkpoints
from qat.training.data import Batches, TextDataset, prepare, train_batches, validation_batches
from qat.training.distillation import Taught, taught
from qat.training.lanes import spread
from qat.training.loop import TrainingResult, train
from qat.training.optimizer import adamw
from qat.training.results import Row, hash_of, package_versions
from qat.training.schedule import Schedule
from qat.training.sharding import make_mesh
from qat.training.step import (
    Constants,
    Params,
    Programs,
    TrainState,
    evaluate,
    make_programs,
)

LossesOfSequences = np.ndarray


class Lab:
    """Text and compiled programs, shared by all experiments that ask for the same.

    Args:
        data_dir: where prepared text is kept.
        devices: what runs may use; all there are if None.
    """

    def __init__(self, data_dir: Path, devices: Sequence[jax.Device] | None = None):
        self._data_dir = data_dir
        self._devices = devices
        self._datasets: dict[str, TextDataset] = {}
        self._programs: dict[tuple[str, int], Programs] = {}
        self._teachers: dict[tuple[str, str], Params] = {}

    def dataset(self, experiment: Experiment) -> TextDataset:
        """The prepared text of an experiment."""
        data = experiment.config["data"]
        key = hash_of(data)
        if key not in self._datasets:
            self._datasets[key] = prepare(
                data["source"],
                data["sequence_length"],
                self._data_dir,
                tokenizer=data["tokenizer"],
                validation_fraction=data["validation_fraction"],
                process_index=jax.process_index(),
                on_progress=functools.partial(print, flush=True),
            )
        return self._datasets[key]

    def programs(self, experiment: Experiment, run: int = 0) -> Programs:
        """The jitted programs of an experiment's shape.

        Args:
            experiment: of that shape.
            run: size of the mesh's axis for lanes, see `lane_axis`; 0 is programs of one run.
        """
        config, key = experiment.config, (experiment.shape, run)
        if key not in self._programs:
            task = language_model(experiment.model, experiment.policy, experiment.scaling)
            if "teacher" in config:
                task = taught(task, language_model(experiment.model, None))
            optimizer = adamw(
                weight_decay=config["weight_decay"],
                clip_norm=config["clip_norm"],
                not_decayed=config["not_decayed"],
                rates=functools.partial(experiment.scaling.rates, axes=task.axes),
            )
            mesh = make_mesh(**config["mesh"], devices=self._devices, run=run)
            check_batch(config, mesh.shape)
            self._programs[key] = make_programs(task, optimizer, mesh, config["accumulation"])
        return self._programs[key]

    def lane_axis(self, experiment: Experiment, lanes: int) -> int:
        """Parts of the mesh over which so many runs are spread; what is left is its data axis."""
        mesh = experiment.config["mesh"]
        devices = len(jax.devices() if self._devices is None else self._devices)
        one_run = max(1, mesh["data"]) * mesh["fsdp"] * mesh["tensor"]
        return spread(lanes, max(1, devices // one_run))

    def batches(self, experiment: Experiment) -> tuple[Batches, Batches]:
        """Training and validation batches of an experiment."""
        config, dataset = experiment.config, self.dataset(experiment)
        size = config["batch_size"]
        return (
            train_batches(self._text(experiment), size, config["seed"]),
            validation_batches(dataset, size, config["evaluation_batches"]),
        )

    def _text(self, experiment: Experiment) -> TextDataset:
        """What an experiment trains on: its own text, or what its teacher writes."""
        config, dataset = experiment.config, self.dataset(experiment)
        if "writing" not in config:
            return dataset
        key = hash_of({name: config[name] for name in ("teacher", "data", "writing")})
        if key not in self._datasets:
            teacher = origin.opened(config["teacher"])
            self._datasets[key] = written(teacher, dataset, config["writing"], self._data_dir)
        return self._datasets[key]

    def run_id(self, experiment: Experiment, schedule: Schedule | None = None) -> str:
        """Identifies config, data, and the schedule if it is that of a branch."""
        fingerprint = self.dataset(experiment).fingerprint
        identity = {"config": experiment.config, "data": fingerprint}
        if schedule in experiment.branches:
            identity["branch"] = dataclasses.asdict(schedule)
        return hash_of(identity)

    def fresh(self, experiment: Experiment) -> TrainState:
        """The state before the first step; its parameters are those of `init`, if that is set.

        Raises:
            ValueError: that checkpoint cannot be read, or holds other parameters by now.
        """
        programs = self.programs(experiment)
        state = programs.init_state(np.uint32(experiment.config["seed"]))
        if "init" not in experiment.config:
            return state
        params = origin.opened(experiment.config["init"]).params
        return state._replace(params=_placed(params, programs.state_sharding.params))

    def constants(self, experiment: Experiment, policy: Policy) -> Constants:
        """What an experiment's programs need beside parameters, at a policy's precision.

        Raises:
            ValueError: a teacher cannot be read, or holds other parameters by now.
        """
        if "teacher" not in experiment.config:
            return constants_for(experiment.model, policy)
        key = (experiment.shape, experiment.config["teacher"])
        if key not in self._teachers:
            params = origin.opened(experiment.config["teacher"]).params
            shardings = self.programs(experiment).constants_sharding.teacher_params
            self._teachers[key] = _placed(params, shardings)
        return _taught_constants(experiment, policy, self._teachers[key])

    def restored(self, experiment: Experiment, checkpoints: Checkpoints) -> TrainState | None:
        """The state of the newest whole checkpoint, None where none was ever saved.

        Raises:
            ValueError: see `Checkpoints.restore`.
        """
        programs = self.programs(experiment)
        abstract = jax.eval_shape(programs.init_state, np.uint32(0))
        return checkpoints.restore(abstract, programs.state_sharding)

    def train(
        self,
        experiment: Experiment,
        state: TrainState | None = None,
        schedule: Schedule | None = None,
        programs: Programs | None = None,
        **options: Any,
    ) -> tuple[TrainingResult, float]:
        """Trains; also returns the seconds it took.

        Args:
            experiment: what.
            state: from where, consumed; None is the beginning.
            schedule: of the run or a branch; None is the run's.
            programs: of the experiment's shape, where they are not to be the usual ones.
            options: see `qat.training.loop.train`.
        """
        start = time.perf_counter()
        result = train(
            programs or self.programs(experiment),
            self.fresh(experiment) if state is None else state,
            self.constants(experiment, experiment.policy),
            schedule or experiment.schedule,
            self.batches(experiment)[0],
            loss_limit=experiment.loss_limit,
            **options,
        )
        return result, time.perf_counter() - start

    def evaluate(self, experiment: Experiment, params: Any, policy: Policy) -> LossesOfSequences:
        """Validation loss of each sequence under a policy, which need not be the trained one."""
        constants = self.constants(experiment, policy)
        batches = self.batches(experiment)[1]
        return evaluate(self.programs(experiment), params, constants, batches)

    def errors(self, experiment: Experiment, params: Any) -> str:
        """Every quantizer's error on a batch of validation text, as a table."""
        tokens_BT = self.batches(experiment)[1].batch_at(0)[:, :-1]
        policy = dataclasses.replace(experiment.policy, mode="fake")  # rounds alike, and shows it
        whole = multihost_utils.process_allgather(params, tiled=True)
        model = model_of(experiment.model, policy, whole)
        return qat.nnx.error_table(qat.nnx.quantization_errors(model, tokens_BT))

    def row(
        self,
        experiment: Experiment,
        status: str,
        wall_s: float,
        losses: LossesOfSequences,
        schedule: Schedule | None = None,
    ) -> Row:
        """The result row of a trained model; cost and tokens are those of its schedule alone.

        Args:
            experiment: what was trained.
            status: how training ended.
            wall_s: seconds it took.
            losses: of validation sequences.
            schedule: of the run or a branch; None is the run's.
        """
        config, model, policy = experiment.config, experiment.model, experiment.policy
        loss, loss_se = mean_and_standard_error(losses)
        schedule = schedule or experiment.schedule
        tokens = experiment.tokens_of(schedule)
        status = status if status != "ok" or np.isfinite(loss) else "diverged"
        delta = 0.0 if status == "ok" else float("nan")  # of nothing rounded to itself
        return Row(
            run_id=self.run_id(experiment, schedule),
            params=model.params,
            tokens=tokens,
            weight_bits=policy.bits("weights"),
            activation_bits=policy.bits("activations"),
            kv_bits=policy.bits("kv_cache"),
            weight_format=policy.format_name("weights"),
            activation_format=policy.format_name("activations"),
            kv_format=policy.format_name("kv_cache"),
            experts=model.experts,
            experts_per_token=model.experts_per_token if model.experts else 0,
            policy=str(policy),
            init=config.get("init", "none"),
            teacher=config.get("teacher", "none"),
            eval_set=f"{config['data']['source']}/validation",
            loss=loss,
            loss_se=loss_se,
            ptq_delta=delta,
            ptq_delta_se=delta,
            seed=config["seed"],
            learning_rate=config["learning_rate"],
            schedule=config["schedule"]["name"],
            flops=experiment.train_flops(tokens),
            status=status,
            wall_s=wall_s,
            data_fingerprint=self.dataset(experiment).fingerprint,
            config_hash=experiment.config_hash,
            versions=package_versions(),
        )


def blank_constants(experiment: Experiment) -> Constants:
    """Those of `Lab.constants`, a teacher's parameters zero: to time or compile a step alone."""
    if "teacher" not in experiment.config:
        return constants_for(experiment.model, experiment.policy)
    shapes = jax.eval_shape(language_model(experiment.model, None).init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return _taught_constants(experiment, experiment.policy, zeros)


def _taught_constants(experiment: Experiment, policy: Policy, teacher: Params) -> Taught:
    """Of a student at a policy's precision, whose teacher has full precision."""
    own = constants_for(experiment.model, policy)
    return Taught(own, teacher, constants_for(experiment.model, None))


def _placed(params: Params, shardings: Any) -> Params:
    """Arrays of the host on the devices, of which each process fills its own."""

    def place(array: np.ndarray, sharding: Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, params, shardings)


def placed_like(params: Params, others: Params) -> Params:
    """Arrays that every process has whole, on the devices as others are."""
    return _placed(jax.tree.map(np.asarray, params), jax.tree.map(lambda x: x.sharding, others))


def check_batch(config: Mapping[str, Any], mesh: Mapping[str, int]) -> None:
    """Raises ValueError unless devices, by mesh axis, can share every part of a batch evenly."""
    parts, data, fsdp = config["accumulation"], mesh["data"], mesh["fsdp"]
    if config["batch_size"] % (parts * data * fsdp):
        raise ValueError(
            f"batch_size = {config['batch_size']} is not a multiple of accumulation × data × fsdp "
            f"= {parts} × {data} × {fsdp}"
        )
