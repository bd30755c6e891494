"""The page about a quantized model, from a table made up."""

import numpy as np
import pandas as pd

from qat.report import rounding

FORMATS = {"int2/channel": 2.5, "int3/channel": 3.5, "int4/channel": 4.5, "mxfp4": 4.6}


def line(policy="original", method="none", fmt="none", bits=16.0, delta=0.0, stop=0, **changes):
    return {
        "policy": policy,
        "method": method,
        "format": fmt,
        "text": "a<b>/validation",
        "start": stop // 2,
        "stop": stop,
        "total_bits": 1e6 * bits,
        "bits": bits,
        "loss": 2.0 + delta,
        "loss_se": 0.01,
        "delta": delta,
        "delta_se": 0.1 * abs(delta),
        "perplexity": float(np.exp(2.0 + delta)),
        "kl": delta,
        "kl_se": 0.0,
        "agreement": 0.9,
        "calibration": "a/train 32×512" if method == "gptq" else "none",
        "wall_s": 1.0,
        "status": "ok",
        **changes,
    }


def lines():
    made = [line()]
    for method in ("rtn", "gptq"):
        for fmt, bits in FORMATS.items():
            made.append(line("w", method, fmt, bits, 2.0**-bits))
            made += [line("w", method, fmt, bits, 2.0**-bits, stop) for stop in (8, 16)]
    made.append(line("kv", "rtn", "int4/token", 4.0, -0.001))
    made.append(line("kv", "rtn", "int2/token", 2.0, float("nan"), status="diverged"))
    return pd.DataFrame(made)


def written(tmp_path, table):
    rounding.write(tmp_path / "report.html", table, "run a1")
    return (tmp_path / "report.html").read_text()


def test_the_page_holds_every_number_and_loads_nothing(tmp_path):
    html = written(tmp_path, lines())
    assert html.count("<svg") == (2 + 2) + 2  # weights with two methods by position; the cache
    assert "a&lt;b&gt;/validation" in html
    for words in ("run a1", "2.0884", "a/train 32×512", "diverged", "mxfp4", "gptq"):
        assert words in html
    assert not any(word in html for word in ("<script", "<link", "<img", "@import", "url(http"))


def test_rows_without_their_original_have_no_figure_of_loss(tmp_path):
    html = written(tmp_path, lines().query("policy == 'w' and stop == 0"))
    assert html.count("<svg") == 1


def test_a_method_is_one_entry_of_the_legend(tmp_path):
    html = written(tmp_path, lines().query("stop == 0 and policy != 'kv'"))
    first = html[html.index("<svg") : html.index("</svg")]
    assert first.count("<!-- gptq -->") == first.count("<!-- original -->") == 1
    assert first.count("<!-- mxfp4 -->") == 2  # beside its points
