"""What holds for the repository as a whole: arrows of imports, requirements, documented commands, SLURM scripts."""

import ast
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from cluster import Cluster, children
from launch import ROOT
from packaging.requirements import Requirement

PACKAGE = ROOT / "megatron_retro"

# Who may import whom inside the package. tools/ and pretrain_retro.py may import all of it.
BASE = {"errors", "reading", "distributed", "terminal", "watch", "storage", "workdir", "config"}
ARROWS = {
    "watch": set(),
    "errors": {"watch"},
    "reading": {"errors"},
    "distributed": {"errors", "watch"},
    "terminal": set(),
    "storage": {"errors", "reading"},
    "workdir": {"errors", "reading", "distributed", "storage"},
    "config": {"errors", "reading", "workdir"},
    "webpage": set(),
    "mcore_cpu": set(),
    "mcore_optimizer": set(),
    "mcore_writer": BASE,
    "mcore": {"mcore_cpu", "mcore_optimizer", "mcore_writer"} | BASE,
    "data": {"mcore"} | BASE,
    "model": {"mcore"} | BASE,
    "retrieval": {"data", "mcore"} | BASE,
    "inspection": {"webpage", "retrieval", "data", "mcore"} | BASE,
    "training": {"model", "data", "retrieval", "mcore"} | BASE,
    "interop": {"training", "model", "data", "retrieval", "mcore"} | BASE,
    "inference": {"training", "model", "data", "retrieval", "mcore"} | BASE,
    "serving": {"webpage", "inference", "training", "model", "data", "retrieval", "mcore"} | BASE,
    "hf": {"interop", "inference", "training", "model", "data", "retrieval", "mcore"} | BASE,
    "evaluation": {"webpage", "inference", "training", "model", "data", "retrieval", "mcore"} | BASE,
}


def imported_modules(file: pathlib.Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources() -> list[tuple[str, pathlib.Path]]:
    """(part of the package, file) of every module but the package's own __init__."""
    files = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")
    return [(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file) for file in files]


def test_imports_follow_the_arrows() -> None:
    for part, file in sources():
        for name in imported_modules(file):
            if name.startswith("megatron_retro."):
                target = name.split(".")[1]
                assert target == part or target in ARROWS[part], f"{file.relative_to(ROOT)} imports {name}"


def test_only_mcore_imports_megatron_core() -> None:
    others = [file for part, file in sources() if part not in ("mcore", "mcore_cpu", "mcore_writer")]
    for file in [*others, *ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        wrong = [name for name in imported_modules(file) if name.split(".")[0] == "megatron"]
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_flags_are_read_without_torch() -> None:
    modules = [f"megatron_retro.config.{file.stem}" for file in (PACKAGE / "config").glob("*.py")]
    check = f"import sys, {', '.join(sorted(modules))}; print({{'torch', 'megatron.core'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ------------------------------------------------------------------------------------------------ requirements


def requirements(name: str) -> dict[str, Requirement]:
    """The pins of a requirements file that hold for this interpreter, by lower-case name."""
    pins = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if text := line.split("#")[0].split("--hash")[0].strip():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name.lower()] = requirement
    return pins


def test_pins_lie_in_the_ranges_of_setup_py() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import json, setuptools; setuptools.setup = lambda **given: print(json.dumps(given)); "
         "__file__ = 'setup.py'; exec(open('setup.py').read())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    given = json.loads(done.stdout)
    pins = {**requirements("requirements.txt"), **requirements("requirements-no-deps.txt")}
    extras = given["extras_require"]
    for text in [
        *given["install_requires"],
        *extras["cpu"],
        *extras["hf"],
        *extras["hdf5"],
        *extras["serve"],
        *extras["dev"],
    ]:
        wanted = Requirement(text)
        (pin,) = pins[wanted.name.lower()].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"{text}, pinned at {pin}"


def test_requirements_name_no_address_and_no_apex() -> None:
    for name in ("requirements.txt", "requirements-no-deps.txt", "setup.py", "pyproject.toml", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--index|--find-links", text), name
        assert not re.search(r"^\s*[\"']?apex\b", text, re.MULTILINE), name


def test_ci_runs_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "make test" and os.access(ROOT / ".ci" / "run", os.X_OK)


# ------------------------------------------------------------------------------------------------ documents


def check_docs(*files: pathlib.Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/check_docs.py", *map(str, files)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_documented_commands_parse() -> None:
    done = check_docs()
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = {
    "torchrun --nproc-per-node 2 pretrain_retro.py --retro-work-dir w --seq-len 8": "did you mean --seq-length",
    "torchrun --nproc-per-node 2 pretrain_retro.py --retro-work-dir w \\\n  --tensor-model-parallel-size 3": "3",
    "OMP_NUM_THREADS=1 python tools/preprocess_retro_data.py --retro-work-dir w --split half": "half",
    "sbatch --nodes 2 examples/pretrain.sbatch --config examples/configs/none.yaml": "none.yaml",
    "make quickstart && make nothing": "nothing",
    "python tools/nothing.py": "tools/nothing.py",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_is_found(command: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "wrong.md"
    file.write_text(f"# Title\n\n```bash\n{command}\n```\n", encoding="utf-8")
    done = check_docs(file)
    assert done.returncode == 1 and WRONG[command] in done.stdout and done.stdout.startswith("wrong.md:4: ")


def test_quickstart_documents_are_the_same_each_time(tmp_path: pathlib.Path) -> None:
    written = []
    for name in ("a.jsonl", "b.jsonl"):
        script = ROOT / "examples" / "quickstart" / "stdlib_documents.py"
        subprocess.run([sys.executable, script, tmp_path / name, "300000"], check=True, stdout=subprocess.DEVNULL)
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    documents = [json.loads(line) for line in written[0].splitlines()]
    assert {tuple(document) for document in documents} == {("id", "text")}
    assert 200_000 < sum(len(document["text"]) for document in documents) <= 300_000
    assert not any("site-packages" in document["id"] for document in documents)


# ------------------------------------------------------------------------------------------------ SLURM

# Stands in for a training process: tells what it was given, then waits for a signal and takes a second to save. Begun
# again, it runs out of time; and begun once more it fails.
WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["TEST_RESULTS"])
rank = f"{os.environ['RANK']}-of-{os.environ['WORLD_SIZE']}"
attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
(folder / f"started-{rank}").write_text(" ".join(sys.argv[1:]))
print("worker", rank, flush=True)
if attempt == 1:
    print("exiting after iteration 7 as asked by --exit-duration-in-mins", flush=True)
if attempt:
    sys.exit(3 * (attempt == 2))
while not stop:
    time.sleep(0.05)
time.sleep(1)
(folder / f"saved-{rank}").touch()
"""


@pytest.fixture
def cluster(tmp_path: pathlib.Path) -> Iterator[Cluster]:
    repository, work = tmp_path / "repository", tmp_path / "work"
    (repository / "tools").mkdir(parents=True)
    for name in ("pretrain_retro.py", "tools/preprocess_retro_data.py"):
        (repository / name).write_text(WORKER)
    work.mkdir()
    (work / "manifest.json").write_text("{}")
    made = Cluster(tmp_path / "cluster", repository, work)
    yield made
    made.kill_leftovers()


def wait_until_started(cluster: Cluster) -> None:
    cluster.wait_until(lambda: len(list(cluster.results.glob("started-*"))) == 2)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGUSR1, 2), (signal.SIGTERM, 0)])
def test_a_signal_to_the_tasks_lets_all_ranks_save(cluster: Cluster, number: signal.Signals, times: int) -> None:
    """SIGUSR1 (the time limit is near) also requeues; SIGTERM (scancel, preemption) leaves that to SLURM.

    What is requeued once runs out of time by its own clock, which requeues it again, and then fails, which does not.
    """
    cluster.sbatch("pretrain.sbatch", "--num-layers", "2")
    wait_until_started(cluster)
    tasks = cluster.tasks()
    torchruns = [pid for task in tasks for pid in children(task)]
    for pid in [*torchruns, *tasks] if number == signal.SIGUSR1 else tasks:  # some set-ups signal every process
        os.kill(pid, number)
    code, output = cluster.finish()
    assert (code != 0) == (times > 0), output
    assert sorted(file.name for file in cluster.results.glob("saved-*")) == ["saved-0-of-2", "saved-1-of-2"]
    assert cluster.times_requeued() == times, output
    save = cluster.save
    given = (cluster.results / "started-0-of-2").read_text()
    assert re.fullmatch(
        rf"--retro-work-dir \S+ --save {save} --load {save} --exit-duration-in-mins 5[0-5] --num-layers 2", given
    )
    logs = sorted(save.glob("logs/*.0/node*/**/stdout.log"))
    assert sorted(log.read_text() for log in logs) == ["worker 0-of-2\n", "worker 1-of-2\n"]


def test_preprocessing_requeues_itself_before_the_time_limit(cluster: Cluster) -> None:
    cluster.sbatch("preprocess.sbatch", "--input", "text")
    wait_until_started(cluster)
    cluster.signal_job(signal.SIGUSR1)
    code, output = cluster.finish()
    assert code == 0, output
    assert cluster.times_requeued() == 1
    assert (cluster.results / "started-1-of-2").read_text().endswith("work --input text")


@pytest.mark.parametrize("script", ["pretrain.sbatch", "preprocess.sbatch"])
@pytest.mark.parametrize("missing", ["RETRO_WORK_DIR", "SLURM_JOB_ID"])
def test_a_missing_variable_is_named(cluster: Cluster, script: str, missing: str) -> None:
    del cluster.environment[missing]
    cluster.sbatch(script)
    code, output = cluster.finish()
    assert code == 1 and f"{missing}: is not set; " in output
