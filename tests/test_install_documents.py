"""What the documents say of installing: torch is held where it is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = (ROOT / "docs" / "install.md", ROOT / "docs" / "zh" / "install.md", ROOT / "Dockerfile")


def _pipeline(place: Path) -> str:
    """The command that writes the installed torch down, without where it goes."""
    (found,) = re.findall(r"python -m pip .* \| grep -E \S+", place.read_text(encoding="utf-8"))
    return str(found)


@pytest.mark.slow
def test_a_torch_that_was_installed_from_a_file_is_held_too(tmp_path: Path) -> None:
    """pip says `torch @ file:///...` of such a one by `freeze`, which is no constraint."""
    for name, version in (("torch", "2.9.0"), ("torch_npu", "2.9.0.post2")):
        record = tmp_path / f"{name}-{version}.dist-info"
        record.mkdir()
        (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (record / "direct_url.json").write_text(f'{{"url": "file:///data/{name}.whl", "archive_info": {{}}}}')
    pipelines = {_pipeline(place) for place in PLACES}
    assert len(pipelines) == 1
    said = subprocess.run(
        ["bash", "-c", pipelines.pop()], env=_path_first(tmp_path), capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["torch==2.9.0", "torch_npu==2.9.0.post2"]


def _path_first(folder: Path) -> dict[str, str]:
    """This environment, with the packages of a folder before all others."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
