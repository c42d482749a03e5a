from pathlib import Path

from glmq.reporting.page import page, write_page


def test_a_name_that_is_no_utf_8_is_escaped(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("\udcce.png", ["\udcce"]))
    assert b"<title>\\udcce.png</title>" in (tmp_path / "page.html").read_bytes()
