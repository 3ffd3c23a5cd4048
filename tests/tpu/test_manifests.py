"""The Kubernetes manifests against the types of the API, and what they promise across fields.

The types are those that the Kubeflow project generates from the JobSet and Kubernetes API definitions: names of fields,
their nesting and their types. What only a cluster checks is not covered: label values, admission rules of GKE.
"""

import math
import pathlib

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_persistent_volume_claim import IoK8sApiCoreV1PersistentVolumeClaim
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

GKE = pathlib.Path(__file__).parents[2] / "tpu" / "gke"


def read(name: str) -> dict:
  return yaml.safe_load((GKE / name).read_text(encoding="utf-8"))


def pod(jobset: dict) -> dict:
  return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def is_valid(model: type, manifest: dict) -> bool:
  """Whether the model's type takes the manifest and knows each of its fields: unknown ones get lost on the way."""
  return model.from_dict(manifest).to_dict() == manifest


def test_manifests_have_the_types_of_the_api():
  assert is_valid(JobsetV1alpha2JobSet, read("jobset.yaml"))
  assert is_valid(IoK8sApiCoreV1PersistentVolumeClaim, read("volume.yaml"))


def test_the_check_finds_a_misspelt_field_and_a_wrong_type():
  manifest = read("jobset.yaml")
  pod(manifest)["terminationGracePeriod"] = 300
  assert not is_valid(JobsetV1alpha2JobSet, manifest)
  manifest = read("jobset.yaml")
  manifest["spec"]["failurePolicy"]["maxRestarts"] = "many"
  with pytest.raises(ValueError, match="maxRestarts"):
    is_valid(JobsetV1alpha2JobSet, manifest)


def test_machines_and_chips_make_up_the_topology():
  job = read("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
  topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  resources = job["template"]["spec"]["containers"][0]["resources"]
  assert resources["limits"] == resources["requests"]
  assert job["completions"] == job["parallelism"]
  assert job["parallelism"] * resources["limits"]["google.com/tpu"] == math.prod(map(int, topology.split("x")))


def test_a_lost_pod_restarts_the_set_and_not_itself():
  manifest = read("jobset.yaml")
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
  assert manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0
  assert pod(manifest)["restartPolicy"] == "Never"
  assert pod(manifest)["terminationGracePeriodSeconds"] >= 300


def test_the_workdir_lies_on_the_claimed_volume():
  manifest = read("jobset.yaml")
  (container,) = pod(manifest)["containers"]
  (mount,) = container["volumeMounts"]
  (volume,) = pod(manifest)["volumes"]
  assert mount["name"] == volume["name"]
  assert volume["persistentVolumeClaim"]["claimName"] == read("volume.yaml")["metadata"]["name"]
  assert "ReadWriteMany" in read("volume.yaml")["spec"]["accessModes"]
  assert any(argument.startswith(f"--workdir={mount['mountPath']}/") for argument in container["args"])
