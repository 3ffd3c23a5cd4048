"""The pod script: what it would run, word for word, and what it does when a made-up gcloud takes the chips away."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXPECTED = pathlib.Path(__file__).parent / "pod_dry_run.txt"
SETTINGS = dict(
  PROJECT="my-project", ZONE="us-west4-a", NAME="dense", ACCELERATOR_TYPE="v5litepod-256",
  RUNTIME_VERSION="v2-alpha-tpuv5-lite", SHARE="10.0.0.2:/share",
)  # fmt: skip
FLAGS = ["--", "--config=configs/dense_lm.py:1.7b", "--workdir=/mnt/share/dense", "--config.data.path=/mnt/share/*.txt"]
SCENES = {
  "one slice of its own": ({}, ["create", "setup", "launch", "log", "delete"]),
  "two slices that may be taken away": ({"SLICES": "2", "SPOT": "1"}, ["watch"]),
}


def pod(*arguments: str, folder: pathlib.Path = ROOT, **settings: str) -> subprocess.CompletedProcess:
  path = f"{folder}{os.pathsep}{os.environ['PATH']}"
  environment = {"PATH": path, "HOME": os.environ.get("HOME", "/"), **settings}
  command = ["bash", str(ROOT / "tpu" / "pod.sh"), *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def dry_run() -> str:
  text = ""
  for title, (settings, actions) in SCENES.items():
    for action in actions:
      done = pod(action, "--dry_run", *FLAGS, **SETTINGS, **settings)
      assert (done.returncode, done.stderr) == (0, "")
      text += f"## {title}: {action}\n{done.stdout}\n"
  return text


def test_dry_run_prints_the_exact_commands():
  """After a change that is meant: python tests/tpu/test_pod.py"""
  assert dry_run() == EXPECTED.read_text(encoding="utf-8")


def test_dry_run_runs_nothing(tmp_path):
  dry = folder_with_gcloud(tmp_path, chips=["ACTIVE"], run=["running"])
  for action in ("create", "setup", "launch", "watch", "resume", "log", "delete"):
    assert pod(action, "--dry_run", *FLAGS, folder=tmp_path, **SETTINGS, **dry).returncode == 0
  assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("arguments", "changes", "message"), [
  (["create"], {"PROJECT": ""}, "PROJECT is not set, such as PROJECT=my-project"),
  (["create"], {"ZONE": ""}, "ZONE is not set"),
  (["create"], {"NAME": ""}, "NAME is not set"),
  (["create"], {"ACCELERATOR_TYPE": ""}, "ACCELERATOR_TYPE is not set, such as ACCELERATOR_TYPE=v5litepod-16"),
  (["create"], {"RUNTIME_VERSION": ""}, "RUNTIME_VERSION is not set"),
  (["create"], {"SLICES": "two"}, "SLICES=two is no number of slices"),
  (["setup"], {"SHARE": ""}, "SHARE is not set"),
  (["launch"], {}, "--config=... is missing after --"),
  (["watch", "--", "--config=x", "--workdir=runs/x"], {}, "--workdir=/mnt/share/... is missing after --"),
  (["resume", "--", "--config=x", "--workdir=gs://bucket/x"], {}, "--workdir=/mnt/share/... is missing after --"),
  (["launch", "--config=x"], {}, "unknown argument '--config=x'; flags of train.py stand after --"),
  (["reboot"], {}, "'reboot' is none of create, setup, launch, watch, resume, log, delete"),
])  # fmt: skip
def test_what_is_missing_is_told_in_one_line(arguments, changes, message):
  done = pod(*arguments[:1], *([] if arguments[1:2] == ["--config=x"] else ["--dry_run"]), *arguments[1:],
             **{**SETTINGS, **changes})  # fmt: skip
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(f"error: {message}")
  assert done.stderr.count("\n") == 1


def folder_with_gcloud(folder: pathlib.Path, chips: list[str], run: list[str]) -> dict[str, str]:
  """A made-up gcloud, with the states that chips and run take one after the other; the settings that it needs."""
  for name in ("gcloud", "git"):  # git too: a checkout without history has nothing to pack
    shutil.copy(pathlib.Path(__file__).parent / "fake_gcloud.sh", folder / name)
    (folder / name).chmod(0o755)
  (folder / "answers.chips").write_text("".join(f"{state}\n" for state in chips))
  (folder / "answers.run").write_text("".join(f"{state}\n" for state in run))
  return {"CALLS": str(folder / "calls"), "ANSWERS": str(folder / "answers"), "POLL": "0"}


def deeds(folder: pathlib.Path) -> list[str]:
  """What was asked of the made-up gcloud, without its questions."""
  calls, found = (folder / "calls").read_text().splitlines(), []
  for call in calls:
    for mark, deed in (("delete", "delete"), (" create ", "create"), (" scp ", "setup"), ("systemd-run", "launch")):
      if mark in call:
        found.append(deed)
  return found


def test_watch_brings_a_preempted_run_back_and_ends_with_it(tmp_path):
  extra = folder_with_gcloud(
    tmp_path,
    # Twice: watch asks, then the deletion asks, then the creation waits.
    chips=["ACTIVE", "SUSPENDED", "SUSPENDED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
    run=["running running", "running exited", "exited exited"],
  )
  done = pod("watch", *FLAGS, folder=tmp_path, **SETTINGS, **extra)
  assert done.returncode == 0, done.stderr
  assert deeds(tmp_path) == ["delete", "create", "setup", "launch"]
  assert done.stderr.splitlines()[-1].endswith("finished")


def test_watch_makes_chips_that_somebody_deleted(tmp_path):
  missing = "fail:ERROR: (gcloud) NOT_FOUND: Resource 'dense' was not found"
  extra = folder_with_gcloud(tmp_path, chips=[missing, missing, "ACTIVE"], run=["exited"])
  assert pod("watch", *FLAGS, folder=tmp_path, **SETTINGS, **extra).returncode == 0
  assert deeds(tmp_path) == ["create", "setup", "launch"]


def test_watch_does_nothing_while_it_cannot_ask(tmp_path):
  offline = "fail:ERROR: (gcloud) network is unreachable"
  extra = folder_with_gcloud(tmp_path, chips=[offline, offline, "ACTIVE"], run=["fail:ssh: timed out", "exited"])
  done = pod("watch", *FLAGS, folder=tmp_path, **SETTINGS, **extra)
  assert done.returncode == 0
  assert deeds(tmp_path) == []
  assert "run: unreachable" in done.stderr


def test_a_slice_that_does_not_answer_is_not_finished(tmp_path):
  extra = folder_with_gcloud(tmp_path, chips=["ACTIVE"], run=["fail:ssh: timed out", "exited"])
  done = pod("watch", *FLAGS, folder=tmp_path, SLICES="2", **SETTINGS, **extra)
  assert done.returncode == 0
  assert [line.split("run: ")[1] for line in done.stderr.splitlines() if "run: " in line] == ["unreachable", "exited"]


def test_watch_gives_up_on_a_run_that_fails_again_and_again(tmp_path):
  extra = folder_with_gcloud(tmp_path, chips=["ACTIVE"], run=["running failed", "failed failed"])
  done = pod("watch", *FLAGS, folder=tmp_path, LAUNCHES="2", **SETTINGS, **extra)
  assert done.returncode == 2
  assert deeds(tmp_path) == ["setup", "launch"] * 2
  assert "error: the run failed on these chips again" in done.stderr


def test_a_command_that_fails_ends_the_action(tmp_path):
  extra = folder_with_gcloud(tmp_path, chips=["WAITING_FOR_RESOURCES", "FAILED"], run=["dead"])
  done = pod("create", folder=tmp_path, **SETTINGS, **extra)
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == "error: the request for chips ended as FAILED"


if __name__ == "__main__":
  EXPECTED.write_text(dry_run(), encoding="utf-8")
