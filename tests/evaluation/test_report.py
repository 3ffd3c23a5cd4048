"""Reports on made-up families: what is written must come back and survive odd values."""

import csv
import dataclasses
import json
import math
import types

import numpy as np
import pytest
from made_up import DENSE, TINY, grid, replaced, result

from adaptive.evaluation.report import (
  Family,
  comparison,
  read_json,
  summarise,
  table,
  write_all,
  write_csv,
  write_json,
)
from adaptive.evaluation.results import compact, shared_hypervolumes


def test_family_is_checked():
  with pytest.raises(ValueError, match="'none' is not among the 3 results"):
    dataclasses.replace(TINY, full="none")
  with pytest.raises(ValueError, match="several results are named small"):
    dataclasses.replace(TINY, results=(*TINY.results, TINY.results[1]))


def test_summary_by_hand():
  s = summarise(TINY)
  assert s["front"] == ["small", "middle"]
  assert s["front_accuracy"] == ["small", "middle", "full"]
  # 10..20 at 0.2 - 0.1, 20..40 at 0.4 - 0.1, in a box of 30 by 0.4.
  assert s["hypervolume"] == pytest.approx((10 * 0.1 + 20 * 0.3) / (30 * 0.4))
  assert (s["retention_worst"], s["retention_worst_name"]) == (pytest.approx(0.4), "small")
  assert s["retention_mean"] == pytest.approx((1 + 0.4 + 0.8) / 3)
  assert (s["nested_violations"], s["nested_pairs"], s["worse_and_dearer"]) == (1, 3, 1)
  assert s["kendall_tau"] == pytest.approx(1 / 3)
  assert s["bounds"] == {"c_min": 10.0, "c_ref": 40.0, "q_ref": 0.1, "q_full": 0.5}


def test_noise_excuses_a_violation():
  # The middle one is 0.1 nats better than the full model: within two standard errors of 0.06.
  s = summarise(replaced(TINY, 2, loss_stderr=0.06))
  assert (s["nested_violations"], s["worse_and_dearer"]) == (0, 0)


def test_shared_hypervolume_ranks_families():
  deep = Family("deep", (TINY.results[0], TINY.results[2]), "full", {}, 0.1)
  own = summarise(deep)["hypervolume"], summarise(TINY)["hypervolume"]
  shared = shared_hypervolumes([deep, TINY])
  assert own[0] > own[1]  # each in its own box
  assert shared[0] < shared[1] == pytest.approx(own[1])
  assert math.isnan(shared_hypervolumes([DENSE])[0])


def test_csv_holds_every_result(tmp_path):
  write_csv(TINY, tmp_path / "one.csv")
  rows = list(csv.DictReader((tmp_path / "one.csv").open()))
  assert [row["name"] for row in rows] == ["full", "small", "middle"]
  assert (rows[1]["depth"], float(rows[1]["flops_per_token"]), rows[1]["step_ms"]) == ("1", 10.0, "")
  assert [row["on_front"] for row in rows] == ["0", "1", "1"]
  assert [row["worse_and_dearer"] for row in rows] == ["1", "0", "0"]
  assert float(rows[1]["retention"]) == pytest.approx(0.4)
  assert "run" not in rows[0]


def test_csv_of_several_families_has_all_dials(tmp_path):
  write_csv([TINY, grid("other", [1, 2], [128])], tmp_path / "two.csv")
  rows = list(csv.DictReader((tmp_path / "two.csv").open()))
  assert [row["run"] for row in rows] == ["tiny"] * 3 + ["other"] * 2
  assert [row["d_ff"] for row in rows] == ["", "", "", "128", "128"]


def test_csv_refuses_a_dial_named_like_a_column(tmp_path):
  with pytest.raises(ValueError, match="loss"):
    write_csv(Family("x", (result("a", {"loss": 1}, 3.0, 1.0),), "a"), tmp_path / "x.csv")


def test_json_round_trip_is_exact(tmp_path):
  families = [grid("ä first", noise=0.1), grid("second", latency=False), TINY, DENSE]
  write_json(families, tmp_path / "all.json")
  assert read_json(tmp_path / "all.json") == families


def test_json_takes_numpy_scalars_and_any_mapping(tmp_path):
  odd = replaced(TINY, 1, loss=np.float32(4.1), params_total=np.int64(7), dial=types.MappingProxyType({"depth": 1}))
  write_json(odd, tmp_path / "odd.json")
  back = read_json(tmp_path / "odd.json")[0].results[1]
  assert (back.loss, back.params_total, back.dial) == (float(np.float32(4.1)), 7, {"depth": 1})


def test_json_stays_valid_with_values_that_are_not_finite(tmp_path):
  path = tmp_path / "nan.json"
  write_json(replaced(TINY, 1, loss=math.inf, bits_per_byte=math.nan), path)

  def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")

  document = json.loads(path.read_text(), parse_constant=refuse)
  assert document["families"][0]["results"][1]["loss"] is None
  assert document["families"][0]["summary"]["not_finite"] == 1
  back = read_json(path)[0].results[1]
  assert math.isnan(back.loss)
  assert math.isnan(back.bits_per_byte)
  assert back.step_ms is None


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 99}', '{"format": 1, "families": [{"label": "x"}]}'])
def test_json_of_another_kind_is_refused(tmp_path, text):
  path = tmp_path / "other.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=r"other\.json"):
    read_json(path)


def test_table_is_sorted_marked_and_narrow():
  lines = table(grid(noise=0.05)).splitlines()
  assert max(map(len, lines)) <= 120
  rows = [line for line in lines if "depth=" in line and "%" in line and "kept" not in line]
  assert len(rows) == 24
  assert rows[0].split()[:2] == ["*", "depth=1,d_ff=128"]
  assert "F" in rows[-1].split()[0]
  marks = [line.split()[0] for line in table(TINY).splitlines()[3:6]]
  assert marks == ["*", "*", "F!"]


def test_long_table_is_shortened():
  family = grid(depths=range(1, 17), widths=range(100, 1100, 100), noise=0.03)
  diverged = replaced(family, 77, accuracy=0.01)
  text = table(diverged)
  shown = [r.name for r in diverged.results if f"  {r.name} " in text]
  assert len(family.results) == 160
  assert len(shown) <= 40
  assert {"depth=1,d_ff=100", diverged.full, diverged.results[77].name} <= set(shown)
  assert f"{len(shown)} of 160 sub-models shown; the CSV holds all" in text


def test_table_with_latencies_only_where_measured():
  assert "prefill" in table(grid())
  assert "prefill" not in table(grid(latency=False))


def test_comparison_has_one_row_per_run():
  families = [TINY, DENSE, grid("r" * 90)]
  lines = comparison(families).splitlines()
  assert len(lines) == 2 + 3
  assert lines[2].split()[:4] == ["tiny", "3", "3.0000", "50.00%"]
  assert lines[2].split()[-1] == "1/3"
  assert max(map(len, lines)) <= 120


def test_table_cuts_long_names():
  family = replaced(grid(), 0, name="layer_path=" + "0-1-2-3-" * 20)
  assert max(map(len, table(family).splitlines()[:-5])) <= 120


def test_compact_numbers():
  values = [0, 512, 999.6, 1234, 9996, 5_900_000, 1.5e12, 0.25, None, math.nan]
  assert [compact(v) for v in values] == ["0", "512", "1.00k", "1.23k", "10.0k", "5.90M", "1.50T", "0.250", "-", "-"]
  assert compact(2048, "B") == "2.05kB"


def test_write_all(tmp_path):
  families = [grid("a"), DENSE]
  paths = write_all(families, tmp_path / "new" / "folder")
  assert {kind: path.name for kind, path in paths.items()} == {
    kind: f"pareto.{kind}" for kind in ("csv", "json", "png", "html")
  }
  assert read_json(paths["json"]) == families
  before = paths["png"].read_bytes(), paths["html"].read_bytes()
  assert write_all(families, tmp_path / "new" / "folder") == paths
  assert (paths["png"].read_bytes(), paths["html"].read_bytes()) == before, "the same results give the same files"
