"""A result row for tests to change."""

from qat.training.results import Row

ROW = Row(
    run_id="a1",
    params=10,
    tokens=20,
    weight_bits=4.0,
    activation_bits=16.0,
    kv_bits=16.0,
    weight_format="int4",
    activation_format="none",
    kv_format="none",
    policy="none",
    eval_set="stdlib/validation",
    loss=1.5,
    loss_se=0.1,
    seed=0,
    learning_rate=0.1,
    schedule="cosine",
    flops=1e9,
    status="ok",
    wall_s=1.0,
    data_fingerprint="f",
    config_hash="c",
    versions="v",
)
