"""The README's Python runs."""

import re
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.usefixtures("optimized")

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:30])
def test_a_code_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"params": n, "tokens": d, "weight_bits": b, "loss": 1 + 9 / n**0.3 + 9 / d**0.3 + 1 / b}
        for n in (1e3, 4e3, 2e4)
        for d in (1e5, 4e5, 2e6)
        for b in (2, 3, 4, 16)
    ]
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    exec(compile(block, str(README), "exec"), {})
