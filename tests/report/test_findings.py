"""Findings on a made-up table whose effects and noise are known."""

import numpy as np
import pandas as pd
import pytest

from qat import laws
from qat.report import findings, page

pytestmark = pytest.mark.usefixtures("optimized")

SIZES, TOKENS, SEEDS = (1000, 4000), (100_000, 400_000), (0, 1, 2)
EFFECTS = {"none": 0.0, "int4": 0.001, "int2": 0.3}


def made_up_rows(growth=2.0):
    """Loss = Chinchilla + effect; rounding adds 2^(4 - bits) / 10, times `growth` per budget."""
    rng = np.random.default_rng(0)
    rows = []
    for params in SIZES:
        for tokens in TOKENS:
            for seed in SEEDS if (params, tokens) == (SIZES[0], TOKENS[0]) else (0,):
                base = 1 + 20 / params**0.4 + 50 / tokens**0.4
                for fmt, effect in EFFECTS.items():
                    loss = base + effect + 0.01 * rng.normal()
                    rows.append(row(params, tokens, seed, fmt, loss))
                    if fmt == "none":
                        for bits in (3, 4):
                            delta = 0.1 * 2.0 ** (4 - bits) * rng.uniform(0.9, 1.1)
                            delta *= growth if tokens == TOKENS[1] else 1
                            rows.append(row(params, tokens, seed, fmt, loss + delta, bits, delta))
    return pd.DataFrame(rows)


def row(params, tokens, seed, fmt, loss, ptq_bits=16, delta=0.0):
    bits = 16.0 if fmt == "none" else float(fmt.removeprefix("int"))
    return {
        "params": params,
        "tokens": tokens,
        "seed": seed,
        "weight_bits": bits,
        "activation_bits": 16.0,
        "kv_bits": 16.0,
        "weight_format": fmt,
        "activation_format": "none",
        "kv_format": "none",
        "ptq_method": "none" if ptq_bits == 16 else "rtn",
        "ptq_bits": float(ptq_bits),
        "loss": loss,
        "loss_se": 0.01,
        "ptq_delta": delta,
        "ptq_delta_se": 0.002,
        "status": "ok",
        "eval_set": "made up",
        "data_fingerprint": "f",
        "versions": "v",
        "flops": 1.0,
        "wall_s": 1.0,
    }


@pytest.fixture(scope="module")
def fit():
    return laws.fit("precision", made_up_rows(), bootstrap=10, starts=32)


@pytest.fixture(scope="module")
def summary(fit):
    return findings.summarise(made_up_rows(), fit)


def test_differences_are_paired_within_a_cell(summary):
    table = summary.training
    assert (table[table.policy == "none"].delta == 0).all()
    for _, cell in table.groupby(["params", "tokens", "seed"]):
        none = cell[cell.policy == "none"].loss.item()
        np.testing.assert_allclose(cell.delta, cell.loss - none)


def test_noise_is_the_pooled_deviation_over_seeds(summary):
    table = summary.training
    cell = table[(table.params == SIZES[0]) & (table.tokens == TOKENS[0])]
    variances = [cell[cell.policy == policy].delta.var(ddof=1) for policy in ("w4", "w2")]
    assert summary.paired_noise == pytest.approx(np.sqrt(np.mean(variances)))


def test_only_what_exceeds_the_noise_is_an_effect(summary):
    table = summary.training
    assert table[table.policy == "w4"].within_noise.all()
    assert not table[table.policy == "w2"].within_noise.any()


def test_growth_with_tokens_is_found(summary):
    assert all(growth.grows for growth in summary.growths)
    for growth in summary.growths:
        assert growth.factor == pytest.approx(2.0, rel=0.25)
        assert growth.noise < 0.15
    assert "grows in 4 of 4 cases" in summary.verdict[0]
    assert "beyond noise" in summary.verdict[1]


def test_a_decline_is_not_called_growth(fit):
    verdict = findings.summarise(made_up_rows(growth=0.5), fit).verdict
    assert "does not always cost more" in verdict[0]
    assert "grows in 0 of 4 cases" in verdict[0]
    assert "within noise" in verdict[1]


def test_a_negative_addition_has_no_growth_factor(fit):
    rows = made_up_rows()
    rounded = (rows.ptq_bits == 4) & (rows.tokens == TOKENS[0])
    rows.loc[rounded, "ptq_delta"] = -1e-4
    verdict = findings.summarise(rows, fit).verdict
    assert "No growth factor" in verdict[2]


def test_a_replicate_without_a_logarithm_makes_the_noise_unknown(fit):
    rows = made_up_rows()
    rows.loc[(rows.ptq_bits == 3) & (rows.seed == 1), "ptq_delta"] = -1e-3
    verdict = findings.summarise(rows, fit).verdict
    assert "the seed noise is unknown" in verdict[1]
    assert "beyond noise" in verdict[2]


def test_without_replicates_the_noise_is_called_unknown(fit):
    rows = made_up_rows()
    verdict = findings.summarise(rows[rows.seed == 0], fit).verdict
    assert "the seed noise is unknown" in verdict[1]
    assert "the noise of the differences is unknown" in verdict[3]


def test_sixteen_bit_integers_are_not_called_unquantized():
    assert findings.policy_label(pd.Series(row(1, 1, 0, "int16", 1.0))) == "wint16"


def test_runs_that_diverged_are_counted(fit):
    rows = made_up_rows()
    rows.loc[(rows.weight_format == "int2") & (rows.params == 4000), "status"] = "diverged"
    assert "2 runs did not end well" in findings.summarise(rows, fit).verdict[-1]


def test_text_and_page_hold_every_number_and_load_nothing(summary, fit, tmp_path):
    text = findings.as_text(summary)
    assert "nats/token" in text
    assert all(line in text for line in summary.verdict)
    page.write(tmp_path / "report.html", summary, made_up_rows(), fit, "3 programs")
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == len(SIZES) + 3
    assert "3 programs" in html
    assert f"{summary.training.loss.iloc[0]:.4f}" in html
    assert not any(word in html for word in ("<script", "<link", "<img", "@import", "url(http"))
