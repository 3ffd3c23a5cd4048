"""The shell scripts of TPUs and Slurm: shellcheck's opinion, and what they do with signals and missing settings."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("tpu/**/*.sh"), *ROOT.glob("slurm/*.sbatch"), *ROOT.glob("tests/tpu/*.sh")])

# Saves for longer than a shell's `wait` lasts when a signal comes, and ends with 0, as train.py does.
STOPPABLE = """
import pathlib, signal, sys, time
def save(*_):
  time.sleep(0.3)
  pathlib.Path(sys.argv[1], "saved").touch()
  sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(30)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "")


def test_scripts_are_where_this_looks():
  assert {"pod.sh", "worker.sh", "run.sh", "train.sbatch"} <= {script.name for script in SCRIPTS}


def program(folder: pathlib.Path, name: str, text: str) -> pathlib.Path:
  """A made-up program in a folder that is put on PATH."""
  path = folder / name
  path.write_text(text)
  path.chmod(0o755)
  return path


def stop_when_ready(process: subprocess.Popen, folder: pathlib.Path) -> int:
  """Sends SIGTERM to a started script once its child waits, and returns what it ends with."""
  deadline = time.monotonic() + 20
  while not (folder / "ready").exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  return process.wait(timeout=20)


def test_a_pod_that_is_told_to_stop_waits_for_the_save_and_is_not_done(tmp_path):
  child = program(tmp_path, "child.py", STOPPABLE)
  command = ["bash", str(ROOT / "tpu/gke/run.sh"), sys.executable, str(child), str(tmp_path)]
  assert stop_when_ready(subprocess.Popen(command), tmp_path) == 143
  assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("status", [0, 2])
def test_a_pod_that_ends_by_itself_ends_as_its_command_does(status):
  command = ["bash", str(ROOT / "tpu/gke/run.sh"), "bash", "-c", f"exit {status}"]
  assert subprocess.run(command).returncode == status


def slurm(folder: pathlib.Path, srun: str) -> subprocess.Popen:
  """The batch script under a made-up Slurm, whose scancel signals what the made-up srun started."""
  program(folder, "srun", srun)
  program(folder, "scancel", f'#!/bin/sh\necho "$@" >> "{folder}/calls"\nkill -TERM "$(cat "{folder}/pid")"\n')
  program(folder, "scontrol", f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n')
  environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
  environment.pop("PYTHON", None)  # make hands on its own
  command = ["bash", str(ROOT / "slurm" / "train.sbatch"), "--config=x", "--workdir=y"]
  return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_slurm_job_that_runs_out_of_time_saves_and_goes_back_to_the_queue(tmp_path):
  child = program(tmp_path, "child.py", STOPPABLE)
  start = f'#!/bin/sh\necho $$ > "{tmp_path}/pid"\nexec "{sys.executable}" "{child}" "{tmp_path}"\n'
  assert stop_when_ready(slurm(tmp_path, start), tmp_path) == 0
  assert (tmp_path / "saved").exists()
  assert (tmp_path / "calls").read_text().splitlines() == ["--signal=TERM 7", "requeue 7"]


def test_a_slurm_job_that_ends_by_itself_stays_out_of_the_queue(tmp_path):
  process = slurm(tmp_path, '#!/bin/sh\necho "$@"\nexit 3\n')
  out, _ = process.communicate(timeout=20)
  assert process.returncode == 3
  assert out.split()[2:] == [".venv/bin/python", "train.py", "--distributed", "--config=x", "--workdir=y"]
  assert not (tmp_path / "calls").exists()


def test_slurm_tells_what_is_missing():
  done = subprocess.run(["bash", str(ROOT / "slurm/train.sbatch"), "--config=x"], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == "error: --config=... and --workdir=... are missing after the name of this script\n"


@pytest.mark.parametrize(("share", "mounts"), [
  ("10.0.0.2:/share", ["sudo mount -t nfs 10.0.0.2:/share {mount}"]),
  ("gs://bucket", ["gcsfuse --implicit-dirs --rename-dir-limit=1000000 bucket {mount}"]),
])  # fmt: skip
def test_a_worker_mounts_and_installs(tmp_path, share, mounts):
  (tmp_path / "adaptive").mkdir()
  for name in ("sudo", "gcsfuse", "python3"):
    program(tmp_path, name, f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n')
  mount = str(tmp_path / "mount")
  environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "USER": "me", "HOME": str(tmp_path)}
  command = ["bash", str(ROOT / "tpu" / "worker.sh"), share, mount]
  subprocess.run(command, env=environment, cwd=tmp_path, check=True)
  calls = (tmp_path / "calls").read_text().splitlines()
  assert [call for call in calls if "nfs " in call or call.startswith("gcsfuse")] == [
    text.format(mount=mount) for text in mounts
  ]
  assert calls[-1] == "python3 -m uv pip install --quiet -c constraints.txt -e .[tpu]"


def test_a_worker_refuses_a_share_of_another_kind(tmp_path):
  program(tmp_path, "sudo", "#!/bin/sh\n")
  environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "USER": "me", "HOME": str(tmp_path)}
  command = ["bash", str(ROOT / "tpu" / "worker.sh"), "share", str(tmp_path / "mount")]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (2, "error: SHARE=share is neither gs://bucket nor address:/path\n")
