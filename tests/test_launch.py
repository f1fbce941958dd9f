"""The launchers: what they render, what they refuse, and their restarts, with stand-ins for every outside program."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")  # comes with flax

LAUNCH = Path(__file__).parent.parent / "experiments" / "launch"
SCRIPTS = ("tpu_pod.sh", "gke_jobset.sh", "slurm.sh")
TRAIN = ["lsp-jax", "train", "--preset", "recommended_lsp_3b", "--resume", "auto", "--output-dir", "/mnt/lsp/runs/one"]
CACHE = [
    "JAX_COMPILATION_CACHE_DIR=/mnt/lsp/runs/compilation-cache",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0",
    "HF_HOME=/mnt/lsp/runs/huggingface",
]
GIVEN = {
    "common": {"PRESET": "recommended_lsp_3b", "OUTPUT_DIR": "/mnt/lsp/runs/one"},
    "tpu_pod.sh": {
        "TPU_NAME": "lsp",
        "ZONE": "us-west4-a",
        "ACCELERATOR": "v5litepod-16",
        "RUNTIME": "v2-alpha-tpuv5-lite",
        "NFS": "10.0.0.2:/share",
        "SOURCE": "lsp-jax[tpu] @ git+https://host.example/lsp-jax@v1",
    },
    "gke_jobset.sh": {
        "NAME": "lsp",
        "IMAGE": "registry.example/lsp-jax:1",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "4x4",
        "CLAIM": "shared",
    },
    "slurm.sh": {"NODES": "2", "GPUS_PER_NODE": "8"},
}
FIELDS = ("--seed", "3", "--prompts.challenger", "Ask 'me' \"two\" $(HOME) \\ things.")


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder in front of PATH for stand-ins."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def stand_in(programs: Path, name: str, body: str) -> None:
    """A program that notes its arguments in `calls`, then runs `body`."""
    path = programs / name
    path.write_text(f'#!/bin/bash\ncd "{programs}"\nprintf "%q " {name} "$@" >> calls; echo >> calls\n{body}\n')
    path.chmod(0o755)


def calls(programs: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (programs / "calls").read_text().splitlines()]


def environment(script: str, programs: Path | None = None, **changes: str | None) -> dict[str, str]:
    path = os.environ["PATH"]
    given = {**GIVEN["common"], **GIVEN[script], **changes}
    base = {"PATH": f"{programs}:{path}" if programs else path, "HOME": "/nowhere", "RESTART_WAIT": "0", "POLL": "0"}
    return {**base, **{name: value for name, value in given.items() if value is not None}}


def launch(script: str, programs: Path | None = None, *fields: str, **changes: str | None) -> Any:
    command = ["bash", str(LAUNCH / script), *fields]
    env = environment(script, programs, **changes)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def dry_run(script: str, *fields: str, **changes: str | None) -> str:
    done = launch(script, None, *fields, DRY_RUN="1", **changes)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_bash_can_read_it(script: str):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_named_and_nothing_is_started(script: str, programs: Path):
    for program in ("gcloud", "kubectl", "sbatch", "srun"):
        stand_in(programs, program, "")
    for name in (*GIVEN["common"], *GIVEN[script]):
        done = launch(script, programs, **{name: None})
        assert done.returncode == 2 and done.stderr.startswith(f"{script}: error: {name} is not set: ")
        assert done.stderr.count("\n") == 1 and not done.stdout
    assert not (programs / "calls").exists()


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("slurm.sh", {"OUTPUT_DIR": "runs/one"}),
        ("slurm.sh", {"NODES": "two"}),
        ("tpu_pod.sh", {"OUTPUT_DIR": "/home/me/one"}),
        ("gke_jobset.sh", {"OUTPUT_DIR": "/home/me/one"}),
        ("gke_jobset.sh", {"TOPOLOGY": "sixteen"}),
        ("gke_jobset.sh", {"TOPOLOGY": "1x2"}),
        ("gke_jobset.sh", {"NAME": "my run"}),
    ],
)
def test_what_cannot_be_used_is_named(script: str, changes: dict[str, str]):
    ((name, value),) = changes.items()
    done = launch(script, None, DRY_RUN="1", **changes)
    assert done.returncode == 2 and done.stderr.startswith(f"{script}: error: {name} = {value}: ")


# --- Slurm ---------------------------------------------------------------------------------------------------------


def test_slurm_submits_itself_and_runs_one_process_a_gpu():
    submit, work = map(shlex.split, dry_run("slurm.sh", *FIELDS).splitlines())
    assert submit[0] == "sbatch" and submit[-len(FIELDS) - 1 :] == [str(LAUNCH / "slurm.sh"), *FIELDS]
    wanted = {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=B:USR1@120"}
    assert wanted <= set(submit)
    memory = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
    assert work == [
        "env", *CACHE, memory, "srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", *TRAIN, *FIELDS
    ]  # fmt: skip


def in_job(programs: Path, train: str, **changes: str) -> Any:
    """The batch script as Slurm runs it, with `train` as the body of lsp-jax; how often that ran, in `runs`."""
    stand_in(programs, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stand_in(programs, "lsp-jax", f"echo >> runs; count=$(wc -l < runs); {train}")
    return launch("slurm.sh", programs, *FIELDS, LSP_LAUNCH_DIR=str(LAUNCH), **changes)


def test_a_failed_run_is_started_again_with_the_same_command(programs: Path):
    done = in_job(programs, "[[ $count == 3 ]] || exit 1; printenv HF_HOME")
    assert done.returncode == 0 and done.stdout == "/mnt/lsp/runs/huggingface\n"
    assert [call for call in calls(programs) if call[0] == "lsp-jax"] == 3 * [[*TRAIN, *FIELDS]]
    assert done.stderr.count("restart 1 of 100") == done.stderr.count("restart 2 of 100") == 1


@pytest.mark.parametrize("status", [2, 130])
def test_bad_input_and_ctrl_c_are_not_started_again(status: int, programs: Path):
    done = in_job(programs, f"exit {status}")
    assert done.returncode == status and "not restarted" in done.stderr
    assert (programs / "runs").read_text() == "\n"


def test_restarts_end(programs: Path):
    done = in_job(programs, "exit 7", MAX_RESTARTS="2")
    assert done.returncode == 7 and "given up" in done.stderr
    assert (programs / "runs").read_text() == "\n" * 3


def test_a_job_near_its_time_limit_is_requeued(programs: Path):
    stand_in(programs, "srun", "touch running; until [[ -e requeued ]]; do sleep 0.05; done")
    stand_in(programs, "scontrol", "touch requeued")
    env = environment("slurm.sh", programs, LSP_LAUNCH_DIR=str(LAUNCH), SLURM_JOB_ID="41")
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sh")], env=env, stderr=subprocess.PIPE)
    try:
        while not (programs / "running").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        _, errors = job.communicate(timeout=30)
    finally:
        job.kill()
    assert job.returncode == 0 and b"requeued" in errors
    assert ["scontrol", "requeue", "41"] in calls(programs)


# --- TPU pod -------------------------------------------------------------------------------------------------------


def remote_command(call: list[str]) -> str:
    return next(word for word in call if word.startswith("--command=")).removeprefix("--command=")


def test_tpu_pod_asks_installs_and_runs_on_all_hosts():
    create, install, train = map(shlex.split, dry_run("tpu_pod.sh", *FIELDS, SPOT="1", PROJECT="p").splitlines())
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "lsp"]
    assert {"--node-id=lsp", "--accelerator-type=v5litepod-16", "--spot", "--zone=us-west4-a"} <= set(create)
    for call in (install, train):
        assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "lsp"]
        assert {"--worker=all", "--zone=us-west4-a", "--project=p"} <= set(call)
        subprocess.run(["bash", "-n", "-c", remote_command(call)], check=True)
    assert shlex.split(remote_command(train).partition(" exec ")[2]) == ["env", *CACHE, *TRAIN, *FIELDS]
    assert shlex.quote(GIVEN["tpu_pod.sh"]["SOURCE"]).strip("'") in " ".join(shlex.split(remote_command(install)))


GCLOUD = """
case "$*" in
  *" describe "*) [[ -e state ]] && cat state ;;
  *" create "*) echo WAITING_FOR_RESOURCES > state; (sleep 0.1; echo ACTIVE > state) & ;;
  *" delete "*) rm state ;;
  *uv*) ;;
  *train*) echo >> runs; count=$(wc -l < runs); %s ;;
esac
"""


def test_a_preempted_slice_is_asked_for_again(programs: Path):
    stand_in(programs, "gcloud", GCLOUD % "[[ $count == 2 ]] || { echo SUSPENDED > state; exit 255; }")
    done = launch("tpu_pod.sh", programs)
    assert done.returncode == 0, done.stderr
    verbs = [call[4] for call in calls(programs) if call[4] != "describe"]
    assert verbs == ["create", "ssh", "ssh", "delete", "create", "ssh", "ssh"]
    assert "exit status 255: restart 1" in done.stderr


def test_a_slice_is_not_asked_for_again_for_bad_input(programs: Path):
    stand_in(programs, "gcloud", GCLOUD % "exit 2")
    done = launch("tpu_pod.sh", programs)
    assert done.returncode == 2 and (programs / "runs").read_text() == "\n"


# --- GKE -----------------------------------------------------------------------------------------------------------


def test_jobset_has_what_jobset_and_kubernetes_require():
    jobset = yaml.safe_load(dry_run("gke_jobset.sh", *FIELDS, SLICES="2", SPOT="1", MAX_RESTARTS="5"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "lsp"
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert policy["maxRestarts"] == 5 and rule["name"] == "badinput"
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 2 and job["parallelism"] == job["completions"] == 16 // 4
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    (failure,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert failure == {"action": "FailJob", "onExitCodes": codes}
    # Kubernetes writes $$( as $( and leaves other dollars alone
    assert [word.replace("$$(", "$(") for word in container["command"]] == [*TRAIN, *FIELDS]
    assert [f"{entry['name']}={entry['value']}" for entry in container["env"] if "value" in entry] == CACHE
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {"shared": "/mnt/lsp"}
    assert volumes == {"shared": "shared"}


def test_jobset_without_spot_takes_any_node_and_is_applied(programs: Path):
    stand_in(programs, "kubectl", "cat > applied.yaml")
    assert launch("gke_jobset.sh", programs).returncode == 0
    assert calls(programs) == [["kubectl", "apply", "-f", "-"]]
    jobset = yaml.safe_load((programs / "applied.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert len(pod["nodeSelector"]) == 2 and pod["tolerations"] == []
