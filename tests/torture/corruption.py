"""Files damaged one at a time: each is named before anything is computed from it, and made again where it can be."""

import contextlib
import io
import pathlib
import random
import re
import shutil

from conftest import build

from megatron_retro.config.flags import parse
from megatron_retro.config.verification import VerifyConfig
from megatron_retro.errors import UserError
from megatron_retro.storage import fingerprint
from megatron_retro.training import checkpoint_files
from megatron_retro.training.data import TrainingData
from megatron_retro.training.verification import verify
from torture.training import make_work, pretrain
from torture.trees import difference, tree
from torture.trials import Lost, Result, run_trials, seeds

NUM_REPAIRS = 20
_FREE = ("latest_checkpointed_iteration.txt", "manifest.copy.json", ".lock")  # nothing is computed from them


class Material:
    """A work dir and the --save directory of a run on it, to be damaged and restored in place.

    Attributes:
        files: of every kind: (kind, path); of checkpoints, the newest one's.
    """

    def __init__(self, work: pathlib.Path, save: pathlib.Path):
        self.work, self.save, self.sound = work, save, tree(work)
        self.newest = max(save.glob("iter_*"))
        self.files = []
        for root in (work, self.newest):
            for path in sorted(root.rglob("*")):
                name = path.relative_to(root)
                if path.is_file() and name.name not in _FREE and name.parts[0] != "report":
                    self.files.append((re.sub(r"\d+", "0", f"{root == work} {name}"), path))

    def open(self, path: pathlib.Path) -> None:
        """What training does before it reads the work dir, or the checkpoint, in which `path` lies."""
        if path.is_relative_to(self.work):
            TrainingData.open(str(self.work), retrieve=True, verify="full")
        else:
            checkpoint_files.find_sound(str(self.save))


def damage(material: Material, number: int) -> tuple[str, dict[pathlib.Path, bytes]]:
    """Damage a file, or exchange two; (what was done, what was there before)."""
    draw = random.Random(number)
    kinds = sorted({kind for kind, _ in material.files})
    path = draw.choice([path for kind, path in material.files if kind == kinds[number % len(kinds)]])
    content = path.read_bytes()
    before = {path: content}
    others = [other for other in twins(material, path) if other.read_bytes() != content]
    how = draw.choice(["flip", "flip", "cut", "swap" if others else "flip"]) if content else "grow"
    if how == "flip":
        place = draw.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        return f"bit {place} of {path} flipped", before
    if how == "cut":
        left = draw.choice([0, len(content) - 1, draw.randrange(len(content))])
        path.write_bytes(content[:left])
        return f"{path} cut to {left} bytes", before
    if how == "swap":
        other = draw.choice(others)
        before[other] = other.read_bytes()
        path.write_bytes(before[other])
        other.write_bytes(content)
        return f"{path} and {other} exchanged", before
    path.write_bytes(b"\0")
    return f"{path} grown by a byte", before


def twins(material: Material, path: pathlib.Path) -> list[pathlib.Path]:
    """Files of the same size: others of the work dir; for a checkpoint's also those of the one before."""
    known = [other for _, other in material.files if other != path]
    if path.is_relative_to(material.newest):
        known += [other for other in material.save.glob(f"iter_*/{path.name}") if other != path]
    return [other for other in known if other.stat().st_size == path.stat().st_size]


def refuse(material: Material, number: int) -> str:
    """Damage a file, see it refused and named, and restore it; what was done.

    Raises:
        Lost: it was opened, or the message names no damaged file.
    """
    done, before = damage(material, number)
    try:
        material.open(next(iter(before)))
    except UserError as error:
        # Of an exchanged manifest the files are named: they are not those that it tells of.
        names = [path.parent if path.name == "manifest.json" else path.name for path in before]
        if not any(str(name) in str(error) for name in names):
            raise Lost(f"{done}, but the message names another file: {error}") from None
    except Exception as error:
        raise Lost(f"{done}: {type(error).__name__}, no UserError: {error}") from None
    else:
        raise Lost(f"{done}, and nobody noticed")
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    return done


def repair(material: Material, number: int, folder: pathlib.Path) -> None:
    """Damage a file of a copy of the work dir, see it named, run the command that repairs it, compare the result.

    Raises:
        Lost: it is not what it was.
    """
    draw = random.Random(number)
    work = shutil.copytree(material.work, folder / "work")
    inside = [path.relative_to(material.work) for _, path in material.files if path.is_relative_to(material.work)]
    path = work / draw.choice([path for path in inside if len(path.parts) > 1])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    was = fingerprint(path)
    path.write_bytes(content)
    told, command = (
        told_by_verification(work),
        f"tools/preprocess_retro_data.py --retro-work-dir {work} --verify-data full",
    )
    if not all(word in told for word in (str(path), was, fingerprint(path), command)):
        raise Lost(f"{path} was damaged, tools/verify_retro_data.py says: {told}")
    build(work, "--verify-data", "full")
    aside = path.with_name(f"{path.name}.damaged")
    if not aside.exists() or aside.read_bytes() != content:
        raise Lost(f"{path} was not set aside")
    aside.unlink()
    if problem := difference(tree(work), material.sound):
        raise Lost(f"{path} repaired: {problem}")


def told_by_verification(work: pathlib.Path) -> str:
    """What tools/verify_retro_data.py prints about a damaged work dir."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        if verify(parse(VerifyConfig, ["--retro-work-dir", str(work)])):
            raise Lost("tools/verify_retro_data.py found nothing")
    return told.getvalue()


def campaign(folder: pathlib.Path, count: int, only: int | None = None) -> Result:
    """`count` damages, of which some are repaired; or the one of number `only`."""
    save = folder / "save"
    pretrain(make_work(folder), save, "--train-iters", 2, "--save-interval", 1)
    material = Material(make_work(folder), save)
    material.open(material.work)
    material.open(material.save)
    failures = run_trials("corruption", seeds(count, only), lambda n, _: refuse(material, n), at_once=1)
    repaired = [] if only is not None else seeds(min(NUM_REPAIRS, count), None)
    failures += run_trials("repair", repaired, lambda n, place: repair(material, n, place), at_once=1)
    return Result(
        "A flipped bit, a cut file, two exchanged files of the same size: refused before first use, with the file's "
        "name; `tools/verify_retro_data.py` names a work dir's with both fingerprints and the command that makes it "
        "again, to the byte.",
        f"Random damages of all {len({kind for kind, _ in material.files})} kinds of file in a work dir and a "
        "checkpoint, manifests included, opened as training does with `--verify-data full`.",
        f"{count} damages, {len(repaired)} repairs",
        failures,
    )
