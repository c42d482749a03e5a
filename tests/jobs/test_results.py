"""What the jobs return under torchrun."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PACKAGES

PROGRAM = """
import hashlib, sys
from pathlib import Path
import torch
import glmq

torch.set_num_threads(1)
model, pictures, out = map(Path, sys.argv[1:])
options = glmq.CalibrationOptions(images=pictures, limit=2)
stats = glmq.calibrate(model, out=out / "stats", options=options)
result = glmq.quantize(model, stats, out=out / "w8a8s", recipe=glmq.Recipe.w8a8s(sigma=3.0))
packed = glmq.compress(out / "w8a8s", out=out / "packed", codec="portable")
records = (stats.folder, stats.statistics.manifest, stats.times), result, packed
Path(out / f"rank{glmq.ranks.read_place().rank}").write_text("\\n".join(map(repr, records)))
"""


@pytest.mark.slow
def test_every_rank_gets_the_same_records(small: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("import glmq\n", "import glmq\nimport glmq.ranks\n"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
        *(str(tmp_path / "program.py"), str(small), str(pictures), str(tmp_path)),
    ]
    done = subprocess.run(command, cwd=PACKAGES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second
    assert "W8A8S" in first
