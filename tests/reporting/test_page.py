from pathlib import Path

from glmq.reporting.page import page, section, write_page


def test_a_name_that_is_no_utf_8_is_escaped(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page("\udcce.png", ["\udcce"]))
    assert b"<title>\\udcce.png</title>" in (tmp_path / "page.html").read_bytes()


def test_a_command_in_a_note_is_told_from_the_sentence() -> None:
    html = section("Next", note="Run `glmq verify a/b --reference <c>` then.")
    shown = 'Run <code>glmq verify a/<wbr>b <span class="word">--reference</span> &lt;c&gt;</code> then.</p>'
    assert html == f'<section><h2>Next</h2><p class="muted">{shown}</section>'
