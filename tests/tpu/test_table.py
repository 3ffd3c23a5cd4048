"""The table of docs/ahead_of_time.md is made of reports, one line each, in place of the one before."""

import json
import runpy

TABLE = runpy.run_path("tpu/table.py")
REPORT = {
  "devices": 256, "hbm": 16 * 2**30, "state": 2**30, "temporaries": 3 * 2**29, "total": 4 * 2**30, "flops": 512e12,
  "complaints": [], "unknown_loops": 2, "collectives": [
    {"kind": "all-gather", "devices": 16, "count": 3, "bytes": 1_500_000_000},
    {"kind": "all-reduce", "devices": 16, "count": 3, "bytes": 250_000_000},
    {"kind": "all-reduce", "devices": 256, "count": 1, "bytes": 250_000_000},
    {"kind": "all-to-all", "devices": 16, "count": 1, "bytes": 10_000_000},
    {"kind": "collective-permute", "devices": 2, "count": 1, "bytes": 10_000_000},
  ],
}  # fmt: skip


def test_a_report_is_a_row():
  cells = [cell.strip() for cell in TABLE["row"]("a | b | 1", REPORT).strip("|").split("|")]
  assert cells == ["a", "b", "1", "1.00", "1.50", "4.00", "25%", "2.0", "1.50", "0.00", "0.50", "0.02+", "0"]


def test_rows_have_as_many_cells_as_the_head(tmp_path):
  (tmp_path / "dense_lm-1.7b-v5e-16x16.json").write_text(json.dumps(REPORT))
  (tmp_path / "dense_lm-1.7b-v6e-8x8.json").write_text(json.dumps({"does_not_fit": "does not fit: 40 GB"}))
  lines = TABLE["markdown"](tmp_path).splitlines()
  assert len(lines) == 4
  assert {line.count("|") for line in lines} == {14}
  assert lines[2].startswith("| `dense_lm.py:1.7b` | v5e:16x16 | 1 | 1.00 |")


def test_the_table_replaces_the_one_before(tmp_path, monkeypatch):
  page = tmp_path / "page.md"
  page.write_text("before\n\n<!-- table -->\nold\n<!-- end table -->\n\nafter\n")
  monkeypatch.setitem(TABLE["write"].__globals__, "PAGE", page)
  (tmp_path / "dense_lm-135m-v5e-16x16.json").write_text(json.dumps(REPORT))
  for _ in range(2):
    TABLE["write"](tmp_path)
    text = page.read_text()
    assert text.startswith("before\n\n<!-- table -->\n| config | chips |")
    assert text.endswith("<!-- end table -->\n\nafter\n")
    assert text.count("dense_lm.py:135m") == 1
  assert "old" not in text
