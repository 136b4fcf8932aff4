"""Launch files of examples/: shellcheck, schemas, dry runs, and what the scripts do with signals and exit codes.

Stand-ins take the places of torchrun and of Slurm's commands here; `test_two_nodes.py` has the real torchrun.
"""

import copy
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_failure_policy_rule import JobsetV1alpha2FailurePolicyRule
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from megatron_prefix.cli.main import main
from tests.launching import MULTINODE, ROOT, environment, nodes, run_script, wait, wait_for

pytestmark = pytest.mark.ci_newest

LAUNCH = MULTINODE.parent
SLURM = LAUNCH / "slurm.sbatch"
SCRIPTS = sorted(
    [
        *ROOT.glob("examples/**/*.sh"),
        *ROOT.glob("examples/**/*.sbatch"),
        ROOT / "tests" / "run.sh",
        ROOT / ".ci" / "run",
    ]
)
SETTINGS: dict[str, Any] = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0"}
ENDS_S = 90

# torchrun with one worker, which saves for a moment when it is told to stop.
AGENT = """#!/usr/bin/env bash
case "$MODE" in
    done) exit 0 ;;
    fail) exit 1 ;;
    starting) echo working; exec sleep 60 ;;
esac
bash -c 'trap "sleep 0.4; echo saved; exit 0" TERM; echo working; while true; do sleep 0.02; done' &
wait $!
"""
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "srun $1" >>"$RECORD"; shift; done
tasks=()
trap 'interrupted=1; kill -USR1 "${tasks[@]}"' USR1
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do SLURM_NODEID=$i "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do
    interrupted=1
    while [ -n "$interrupted" ]; do interrupted=""; status=0; wait "$task" || status=$?; done
    [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$RECORD"
if [ "$1 $2" = "show hostnames" ]; then printf 'first\\nsecond\\n'; fi
"""
SQUEUE = '#!/usr/bin/env bash\necho "$JOB_STATE"\n'
SBATCH = '#!/usr/bin/env bash\necho "sbatch $*" >>"$RECORD"\n'


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    command = [shellcheck, "--external-sources", "--source-path", str(ROOT), str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- torchrun_multinode.sh


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NNODES": None}, "NNODES '': set it to the number of nodes"),
        ({"NNODES": "0"}, "NNODES '0': set it to the number of nodes"),
        ({"NODE_RANK": None}, "NODE_RANK '': set it to the number of this node"),
        ({"NODE_RANK": "2"}, "NODE_RANK '2': NNODES is 2, so set it to at most 1"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR '': set it to the name or address of node 0"),
        ({"RECIPE": "none.args"}, "RECIPE 'none.args': there is no such file"),
    ],
)
def test_a_missing_setting_is_named(settings: dict[str, Any], message: str) -> None:
    kept = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
    for first in ((), ("--dry-run",)):
        run = run_script(MULTINODE, *first, **kept)
        assert run.returncode == 2 and run.stdout == ""
        assert run.stderr.startswith(f"torchrun_multinode.sh: {message}") and run.stderr.count("\n") == 1


def test_the_dry_run_prints_what_would_start(tmp_path: Path) -> None:
    recipe = tmp_path / "a recipe.args"
    recipe.write_text("# two nodes\n--tp 2 # inside a node\n\n--lr 1e-6")
    run = run_script(MULTINODE, "--dry-run", "--save", "two words", RECIPE=recipe, NPROC=8, PYTHON="py", **SETTINGS)
    assert run.returncode == 0 and run.stderr == ""
    assert shlex.split(run.stdout) == [
        *("py", "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "node0:29500", "--rdzv-id", "megatron-prefix"),
        *("--rdzv-conf", "is_host=false,read_timeout=900,join_timeout=900", "-m", "megatron_prefix", "train"),
        *("--tp", "2", "--lr", "1e-6", "--save", "two words"),
    ]


@pytest.mark.parametrize("name", ["SLURM_NODEID", "JOB_COMPLETION_INDEX"])
def test_schedulers_number_the_nodes(name: str) -> None:
    common: dict[str, Any] = {"NNODES": 2, "MASTER_ADDR": "node0", "PROGRAM": "train_rl.py --spec x"}
    for rank, host in ((0, "true"), (1, "false")):
        run = run_script(MULTINODE, "--dry-run", "--lr", "1", **common, **{name: rank})
        words = shlex.split(run.stdout)
        assert f"is_host={host},read_timeout=900,join_timeout=900" in words
        assert words[-5:] == ["train_rl.py", "--spec", "x", "--lr", "1"]


@pytest.fixture
def stand_ins(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes an environment in which torchrun and Slurm's commands are stand-ins."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {"agent": AGENT, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def make(mode: str, **settings: Any) -> dict[str, str]:
        path = f"{folder}:{environment()['PATH']}"
        return environment(PATH=path, PYTHON=folder / "agent", MODE=mode, RECORD=tmp_path / "record", **settings)

    return make


@pytest.mark.parametrize(
    ("mode", "code", "says"),
    [("done", 0, ""), ("fail", 1, "== node 1 of 2: failed, torchrun's exit code 1. The first error, here or on")],
)
def test_the_end_of_the_run_is_its_end(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]], mode: str, code: int, says: str
) -> None:
    with nodes([(["bash", str(MULTINODE)], stand_ins(mode, **SETTINGS))], tmp_path) as started:
        assert wait(started, ENDS_S) == [code]
    assert started[0].text.startswith(says) and (says or not started[0].text)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_the_first_signal_makes_workers_save_and_no_other_disturbs_them(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]], name: str
) -> None:
    with nodes([(["bash", str(MULTINODE)], stand_ins("work", **SETTINGS))], tmp_path) as started:
        (node,) = started
        wait_for(lambda: "working" in node.text, started, ENDS_S)
        node.signal(signal.Signals[name])
        wait_for(lambda: "saves after its step" in node.text, started, ENDS_S)
        for other in (signal.SIGTERM, signal.SIGUSR1):
            node.signal(other)
        assert wait(started, ENDS_S) == [75]
    assert node.text.splitlines() == [
        "working",
        f"== node 1 of 2: {name}: the run saves after its step and stops",
        "saved",
        f"== node 1 of 2: stopped by {name}, saved; the same line goes on",
    ]


def test_a_signal_before_there_are_workers_ends_torchrun(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]]
) -> None:
    with nodes([(["bash", str(MULTINODE)], stand_ins("starting", **SETTINGS))], tmp_path) as started:
        wait_for(lambda: "working" in started[0].text, started, ENDS_S)
        started[0].signal(signal.SIGTERM)
        assert wait(started, ENDS_S) == [75]
    assert "stopped by SIGTERM without a save (torchrun's exit code" in started[0].text


# ---- slurm.sbatch


def slurm_job(stand_ins: Callable[..., dict[str, str]], mode: str, state: str = "RUNNING") -> tuple[list[str], Any]:
    job = {"SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": ROOT}
    return ["bash", str(SLURM), "--save", "out"], stand_ins(mode, JOB_STATE=state, **job)


@pytest.mark.parametrize(
    ("state", "requeued"), [("RUNNING", ["scontrol requeue 7"]), ("COMPLETING", []), ("CANCELLED", [])]
)
def test_a_preempted_job_goes_back_into_the_queue_and_a_cancelled_one_does_not(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]], state: str, requeued: list[str]
) -> None:
    with nodes([slurm_job(stand_ins, "work", state)], tmp_path) as started:
        (node,) = started
        wait_for(lambda: node.text.count("working") == 2, started, ENDS_S)
        node.signal(signal.SIGTERM)
        node.signal(signal.SIGUSR1)
        assert wait(started, ENDS_S) == [75]
    assert node.text.count("saved\n") == 2 and node.text.count("stopped by SIGUSR1, saved") == 2
    record = (tmp_path / "record").read_text().splitlines()
    assert record[0] == "scontrol show hostnames n[1-2]"
    assert record[1:3] == ["srun --kill-on-bad-exit=0", "srun --wait=120"] and record[3:] == requeued


@pytest.mark.parametrize(("mode", "code"), [("done", 0), ("fail", 1)])
def test_a_job_that_has_ended_stays_ended(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]], mode: str, code: int
) -> None:
    with nodes([slurm_job(stand_ins, mode)], tmp_path) as started:
        assert wait(started, ENDS_S) == [code]
    assert "requeue" not in (tmp_path / "record").read_text()


def test_slurm_dry_run_needs_no_slurm_and_asks_it_where_it_is(
    tmp_path: Path, stand_ins: Callable[..., dict[str, str]]
) -> None:
    run = run_script(SLURM, "--dry-run", "--save", "out", RECIPE=ROOT / "examples/recipes/qwen3-8b_64xh100.args")
    assert run.returncode == 0 and run.stderr == ""
    head, command, *rest = run.stdout.splitlines()
    assert head.startswith("# on each of 2 nodes") and rest == [
        "# there is no sbatch here to ask whether the job could be scheduled"
    ]
    words = shlex.split(command)
    assert "--cp" in words and words[-3:] == ["--save", "out", "--resume"]
    variables = stand_ins("done", SBATCH_ARGS="--nodes 8 --partition h100")
    sbatch = Path(variables["PYTHON"]).with_name("sbatch")
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    asked = subprocess.run(
        ["bash", str(SLURM), "--dry-run", "--lr", "1"],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stderr
    assert (tmp_path / "record").read_text() == f"sbatch --test-only --nodes 8 --partition h100 {SLURM} --lr 1\n"


def test_slurm_script_outside_of_a_job_says_what_to_do() -> None:
    run = run_script(SLURM, "--lr", "1")
    assert run.returncode == 2 and "submit it with sbatch" in run.stderr and run.stderr.count("\n") == 1
    run = run_script(SLURM, "--dry-run", SLURM_SUBMIT_DIR="/nowhere")
    assert run.returncode == 2 and "submit from the root of the checkout" in run.stderr


def test_slurm_reads_all_of_its_options() -> None:
    """Slurm stops at the first line that is neither empty nor a comment."""
    lines = SLURM.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split(maxsplit=1)[1] for line in lines if line.startswith("#SBATCH")]
    assert options == [line.split(maxsplit=1)[1] for line in lines[:first] if line.startswith("#SBATCH")]
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@900", "--open-mode=append"} <= set(options)


# ---- jobset.yaml


def manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def pod(job_set: dict[str, Any]) -> dict[str, Any]:
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def check_schema(job_set: dict[str, Any]) -> None:
    """By the models of JobSet's and Kubernetes' OpenAPI definitions: types, what is required, and no other fields.

    The models drop fields that they do not know, so that nothing may be missing from what they give back.
    """
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(job_set))
    assert read is not None and read.to_dict() == job_set, "unknown fields"
    fields = JobsetV1alpha2FailurePolicyRule.model_fields
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        pattern = re.search(r'regular expression "(.+?)"', fields["name"].description or "")
        assert pattern and re.search(pattern[1], rule["name"]), "rule name"
        assert rule["action"] in re.findall(r"\w+", (fields["action"].description or "").partition("are ")[2]), "action"


def test_the_manifest_is_a_job_set() -> None:
    check_schema(manifest())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job_set: pod(job_set).update(terminationGracePeriod=900),
        lambda job_set: pod(job_set)["containers"][0].update(image=3),
        lambda job_set: pod(job_set)["containers"][0].pop("name"),
        lambda job_set: pod(job_set)["containers"][0]["env"][0].update(value=8),
        lambda job_set: job_set["spec"].update(replicatedJobs=[{"replicas": 1}]),
        lambda job_set: job_set["spec"]["failurePolicy"].update(maxRestarts="three"),
        lambda job_set: job_set["spec"]["failurePolicy"]["rules"][0].update(name="stopped-and-saved"),
        lambda job_set: job_set["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
    ],
)
def test_a_wrong_manifest_is_found(spoil: Callable[[dict[str, Any]], None]) -> None:
    job_set = manifest()
    spoil(job_set)
    with pytest.raises((ValidationError, AssertionError)):
        check_schema(job_set)


def test_the_pods_run_what_the_recipe_is_for() -> None:
    job_set = manifest()
    (job,) = job_set["spec"]["replicatedJobs"]
    spec, (container,) = job["template"]["spec"], pod(job_set)["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    name = job_set["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-{job['name']}-0-0.{name}"
    assert int(variables["NNODES"]) == spec["completions"] == spec["parallelism"]
    gpus = int(variables["NNODES"]) * container["resources"]["limits"]["nvidia.com/gpu"]
    assert variables["RECIPE"].endswith(f"_{gpus}xh100.args")
    ports = [port["containerPort"] for port in container["ports"]]
    assert [int(variables["MASTER_PORT"])] == ports
    program, script = container["command"]
    run = run_script(ROOT / script, "--dry-run", *container["args"], JOB_COMPLETION_INDEX=3, **variables)
    assert program == "bash" and run.returncode == 0, run.stderr
    words = shlex.split(run.stdout)
    words = [f"--model={LAUNCH}" if word.startswith("--model=") else word for word in words]
    command = main.get_command(click.Context(main), "train")
    assert command is not None
    given = command.make_context("train", words[words.index("train") + 1 :]).params
    assert given["resume"] and given["save"] == Path("/checkpoints/run")


def test_the_pods_have_time_and_room_to_save() -> None:
    job_set = manifest()
    (container,), volumes = pod(job_set)["containers"], {each["name"]: each for each in pod(job_set)["volumes"]}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert {each["name"] for each in mounts.values()} == set(volumes)
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    paths = dict(word.removeprefix("--").split("=") for word in container["args"] if "=/" in word)
    for option, path in paths.items():
        (mount,) = (mounts[place] for place in mounts if path.startswith(f"{place}/"))
        assert "persistentVolumeClaim" in volumes[mount["name"]]
        assert option != "save" or not mount.get("readOnly")
    assert set(paths) == {"model", "rollouts", "save"} and pod(job_set)["terminationGracePeriodSeconds"] >= 600
    rules = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert any(rule.get("onExitCodes", {}).get("values") == [75] for rule in rules)  # the launcher's "stopped"
