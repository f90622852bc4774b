"""tools/verify_retro_data.py tells damaged files, both fingerprints and what repairs them; runs pass over damage."""

import json
import re
import shlex
import shutil
import subprocess

from conftest import TRAINING
from launch import run_forked

from megatron_retro.training import checkpoint_files
from megatron_retro.workdir import STAGES, WorkDir

TOOL = "tools/verify_retro_data.py"
BUILD = "tools/preprocess_retro_data.py"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 16
    file.write_bytes(content)


def damages(text):
    """name -> (recorded, found, repair)"""
    found = re.findall(r"^damaged +(\S+)\n +recorded +(.+)\n +found +(.+)\n +repair +(.+)$", text, flags=re.MULTILINE)
    return {name: rest for name, *rest in found}


def test_a_work_dir(small_work, tmp_path):
    work = shutil.copytree(small_work, tmp_path / "work")
    assert "files" in run_forked(TOOL, "--retro-work-dir", work)
    names = [list(WorkDir(work).manifest["stages"][stage]["files"])[-1] for stage in STAGES]
    for name in names[1:]:
        flip(work / name)
    (work / names[0]).unlink()
    told = damages(run_forked(TOOL, "--retro-work-dir", work, ranks=2, expect=1))
    assert list(told) == [str(work / name) for name in names]
    assert told[str(work / names[0])][1] == "no such file"
    command = shlex.split(told[str(work / names[2])][2])
    assert command[:2] == ["python", BUILD]
    text = run_forked(*command[1:])
    assert text.count("will be made again") == 5
    flip(work / "manifest.copy.json")
    ((name, told),) = damages(run_forked(TOOL, "--retro-work-dir", work, expect=1)).items()
    assert name == str(work / "manifest.copy.json")
    subprocess.run(shlex.split(told[2]), check=True)
    assert "sound" in run_forked(TOOL, "--retro-work-dir", work)


def test_a_damaged_manifest_has_a_copy(small_work, tmp_path):
    work = shutil.copytree(small_work, tmp_path / "work")
    whole = (work / "manifest.json").read_text()
    for damaged in (whole.replace('"seed": 1234', '"seed": 1235'), whole.replace("\n", "\n ", 1), whole[:-1], ""):
        (work / "manifest.json").write_text(damaged)
        text = run_forked(TOOL, "--retro-work-dir", work, expect=2)
        assert re.search(r"manifest.json is damaged \(.+\); its copy is sound: mv \S+ \S+ && cp \S+ \S+$", text.strip())
    (work / "manifest.json").write_bytes((work / "manifest.copy.json").read_bytes())
    assert "sound" in run_forked(TOOL, "--retro-work-dir", work)


def test_checkpoints(small_work, trained, tmp_path):
    """A run whose newest checkpoint is damaged sets it aside and goes on from the one before; other programs refuse."""
    save = shutil.copytree(trained, tmp_path / "save")
    newest = checkpoint_files.find(str(save))
    older = shutil.copytree(newest, save / "iter_0000002")
    state = json.loads((older / "run.json").read_text())
    (older / "run.json").write_text(json.dumps({**state, "iteration": 2}, indent=1, sort_keys=True))
    prints = checkpoint_files.recorded_files(older)
    (older / "manifest.json").unlink()
    from megatron_retro import storage

    storage.write_sealed(
        older / "manifest.json", {"files": {**prints, "run.json": storage.fingerprint(older / "run.json")}}
    )
    assert run_forked(TOOL, "--checkpoint", save).count("sound") == 2
    for file in newest.iterdir():
        whole = file.read_bytes()
        flip(file)
        (damage,) = checkpoint_files_damaged(newest)
        assert damage == file.name
        file.write_bytes(whole)
    parts = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    flip(parts)
    (told,) = damages(run_forked(TOOL, "--checkpoint", save, expect=1)).items()
    assert told[0] == str(parts) and told[1][2] == f"mv {newest} {newest}.damaged"
    evaluate = ["tools/evaluate_retro.py", "--load", save, "--retro-work-dir", small_work, "--max-samples", 2]
    assert re.search(rf"checkpoint file {parts} was \S+ when .* take the one before", run_forked(*evaluate, expect=2))
    flags = ["--retro-work-dir", small_work, "--retro-add-retriever", "--retro-layers", "2,4", *TRAINING]
    text = run_forked("pretrain_retro.py", *flags, "--save", save, "--load", save, "--train-iters", 3, ranks=2)
    assert text.count("moved aside; the run goes on from the checkpoint before it") == 1
    assert f"resumed from {older}" in text and (save / f"{newest.name}.damaged").is_dir()


def checkpoint_files_damaged(path):
    from megatron_retro.errors import UserError

    try:
        return [name for name, _ in checkpoint_files.damaged(path)]
    except UserError:
        return ["manifest.json"]
