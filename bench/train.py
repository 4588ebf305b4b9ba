"""Runs a recipe: resumes after a kill from its newest whole state, stops at a loss that is not finite, exports once."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import door
from bench.capabilities import has
from bench.identity import canonical, digest, seed_for
from bench.pictures import batch_of
from bench.provenance import collect
from bench.recipe import Recipe, TrainContext
from bench.text import say
from bench.types import Error

if TYPE_CHECKING:
    import torch

FORMAT = 1


class Damaged(Exception):
    """A state file that cannot be trusted."""


class Run(TrainContext):
    """One training run: its seeds, the parts that survive a kill, and the losses so far."""

    def __init__(self, recipe: Recipe, folder: Path, identity: str, seed: int, device: str, manifest: Any):
        import torch

        self.device = torch.device(device)
        self.recipe, self.folder, self.identity, self.root = recipe, folder, identity, seed
        self.manifest = manifest
        self.parts: dict[str, Any] | None = None
        self.losses: list[dict[str, float]] = []  # one entry per step done
        self.newest: Path | None = None  # whole state
        self.saved = time.monotonic()

    def restore(self, **parts: Any) -> int:
        if self.parts is not None:
            raise Error(f"recipe {self.recipe.name} calls restore twice")
        self.parts = parts
        states = sorted(self.folder.glob("*.state"), reverse=True)
        for path in states:
            try:
                content = read_state(path, self.recipe, self.identity)
                if content["parts"].keys() != parts.keys():
                    raise Damaged("it holds other parts")
            except Damaged as e:
                say(f"note: {path} is damaged ({e}); trying the state before it")
                continue
            for name, part in parts.items():
                try:
                    part.load_state_dict(content["parts"][name])
                except (KeyError, RuntimeError, ValueError) as e:
                    raise Error(
                        f"{path}: {name} does not fit the recipe any more: {e}",
                        hint=f"the recipe's code has changed; remove {self.folder} to begin again from step 0",
                    ) from None
            names = content["names"]
            self.losses = [dict(zip(names, row, strict=True)) for row in content["losses"].tolist()]
            self.newest = path
            return len(self.losses)
        if states:
            raise Error(
                f"no state in {self.folder} is whole: training cannot go on",
                hint=f"remove {self.folder} to begin again from step 0",
            )
        return 0

    def seed(self, step: int, stream: str) -> int:
        return seed_for(self.root, self.recipe.name, self.recipe.version, str(step), stream)

    def generator(self, step: int, stream: str) -> torch.Generator:
        import torch

        return torch.Generator().manual_seed(self.seed(step, stream))

    def ids(self) -> Sequence[str]:
        return self._data().ids()

    def images(self, ids: list[str], size: int) -> torch.Tensor:
        return batch_of(self._data(), ids, size, "adm", self.device)

    def _data(self) -> Any:
        if self.manifest is None:
            hint = "give it a field `data`"
            raise Error(f"recipe {self.recipe.name} asks for pictures, but names no data", hint=hint)
        return self.manifest

    def save(self) -> None:
        """Writes the state after the last step done; it and the whole one before it are kept."""
        import torch

        content = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "names": list(self.losses[-1]),
            "losses": torch.tensor([list(row.values()) for row in self.losses], dtype=torch.float64),
        }
        wrong = not_finite(content)
        if wrong:
            raise self.exploded(f"{wrong} is not finite")
        payload = io.BytesIO()
        torch.save(content, payload)
        header = {
            "format": FORMAT,
            "recipe": self.recipe.name,
            "version": self.recipe.version,
            "identity": self.identity,
            "step": len(self.losses),
            "sha256": digest(payload.getvalue()),
        }
        path = self.folder / f"{len(self.losses):09d}.state"
        door.replace(path, canonical(header).encode() + b"\n" + payload.getvalue())
        for other in self.folder.glob("*.state"):
            if other not in (path, self.newest):
                other.unlink()
        self.newest = path
        self.saved = time.monotonic()

    def exploded(self, what: str) -> Error:
        """The end of a run whose last step gave NaN or infinity; the curve up to it is written."""
        door.replace(self.folder / "loss.csv", loss_table(self.losses))
        kept = f"the last good state is kept in {self.folder}" if self.newest else "no state was saved before it"
        hint = "a smaller learning rate may help; it belongs to another --out"
        return Error(f"step {len(self.losses) - 1}: {what}; {kept}", hint=hint)


def train(
    recipe: Recipe,
    out: Path,
    *,
    spec: Mapping[str, Any],
    seed: int = 0,
    model: Any = None,
    device: str = "cpu",
    manifest: Any = None,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
    save_every: float = 30.0,
) -> Path:
    """Trains, or goes on where a killed run stopped, and returns the folder with what `recipe.export` wrote,
    `recipe.json`, `loss.csv` and `loss.svg`.

    `spec` is canonical JSON that says all that decides the outcome (fields of the recipe, fingerprint of the model,
    digest of `manifest`, whose pictures the recipe may ask for).
    States lie in `<out>.training/`, one every `save_every` seconds; the folder is removed at the end. With the same
    spec and seed a finished `out` is returned at once. `progress(steps done, losses)` is called after each step.
    Raises Error for a folder made by something else, a loss that is not finite, and states that are damaged or foreign.
    """
    import torch

    missing = [c.__name__ for c in recipe.starts_from if not has(model, c)]
    if missing:
        raise Error(f"recipe {recipe.name} starts from a model with {', '.join(missing)}", hint="name one with --model")
    out = Path(out)
    identity = digest([FORMAT, recipe.name, recipe.version, dict(spec), seed])
    folder = out.with_name(out.name + ".training")
    if _finished(out, identity) and not folder.exists():
        return out
    door.make_folder(folder)
    with door.lock(folder / "lock", f"{out}"):
        if _finished(out, identity):  # by the process that held the lock before
            shutil.rmtree(folder)
            return out
        door.sweep(out)
        run = Run(recipe, folder, identity, seed, device, manifest)
        trained = _steps(run, model, progress, save_every)
        facts = {
            "format": FORMAT,
            "recipe": recipe.name,
            "version": recipe.version,
            "spec": spec,
            "seed": seed,
            "identity": identity,
            "steps": len(run.losses),
            "device": str(run.device),
            "threads": torch.get_num_threads(),
            "made": collect(),
        }
        facts["figures"] = {
            name: value if math.isfinite(value) else None for name, value in recipe.checks(trained, run)
        }
        door.replace_folder(out, lambda target: _export(run, trained, facts, target))
        shutil.rmtree(folder)
    return out


def _steps(run: Run, model: Any, progress: Callable | None, save_every: float) -> Any:
    steps = run.recipe.train(model, run)
    with door.signals_held() as arrived:
        while True:
            try:
                losses = next(steps)
            except StopIteration as end:
                return end.value
            if run.parts is None:
                raise Error(f"recipe {run.recipe.name} never calls restore: it could not go on after a kill")
            losses = {name: float(value) for name, value in losses.items()}
            if run.losses and losses.keys() == run.losses[0].keys():
                losses = {name: losses[name] for name in run.losses[0]}  # tables go by the order of the first
            run.losses.append(losses)
            done = len(run.losses)
            if losses.keys() != run.losses[0].keys():
                raise Error(f"step {done - 1}: the losses are {', '.join(losses)}, before {', '.join(run.losses[0])}")
            bad = [name for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                raise run.exploded(f"{bad[0]} is {losses[bad[0]]}")
            if done == run.recipe.total or arrived or time.monotonic() - run.saved >= save_every:
                run.save()
            if progress:
                progress(done, losses)
            if arrived:
                return _leave(arrived[0])


def read_state(path: Path, recipe: Recipe, identity: str) -> dict[str, Any]:
    """parts, names and losses of a state; raises Damaged, or Error when it belongs to something else."""
    import torch

    try:
        head, _, payload = path.read_bytes().partition(b"\n")
        header = json.loads(head)
    except OSError as e:
        raise Damaged(f"it cannot be read: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise Damaged("its first line cannot be read") from None
    if not isinstance(header, dict) or digest(payload) != header.get("sha256"):
        raise Damaged("its checksum is wrong")
    expected = {"format": FORMAT, "recipe": recipe.name, "version": recipe.version, "identity": identity}
    for name, value in expected.items():
        if header.get(name) != value:
            raise Error(
                f"{path} was saved by a run with another {'specification' if name == 'identity' else name}",
                hint=f"give another --out, or remove {path.parent}",
            )
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise Damaged("it holds more than tensors and numbers") from None
    except Exception:  # of any kind: torch promises nothing for what it did not write
        raise Damaged("its tensors cannot be read") from None
    if not _is_state(content, header.get("step")):
        raise Damaged("it does not hold parts and losses")
    wrong = not_finite(content)
    if wrong:
        raise Damaged(f"{wrong} is not finite")
    return content


def _is_state(content: Any, step: Any) -> bool:
    """Parts by name, and a row of named losses for each of the steps done."""
    import torch

    if not isinstance(content, dict) or content.keys() != {"parts", "names", "losses"}:
        return False
    parts, names, losses = content["parts"], content["names"], content["losses"]
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    table = isinstance(losses, torch.Tensor) and named and losses.shape == (step, len(names))
    return isinstance(parts, dict) and table


def not_finite(value: Any, name: str = "state") -> str:
    """The name of the first tensor or number in nested dicts and lists that holds NaN or infinity; "" if none does."""
    import torch

    if isinstance(value, torch.Tensor):
        return name if value.is_floating_point() and not bool(value.isfinite().all()) else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else name
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return next((found for key, part in inner if (found := not_finite(part, f"{name}.{key}"))), "")


def loss_table(losses: list[dict[str, float]]) -> bytes:
    """CSV: step and each loss; empty where it was not finite."""
    from bench.text import csv_cell, csv_line

    lines = [csv_line(["step", *map(csv_cell, losses[0] if losses else ())])]
    for step, row in enumerate(losses):
        lines.append(csv_line([str(step), *(repr(v) if math.isfinite(v) else "" for v in row.values())]))
    return "".join(lines).encode("utf-8", "surrogatepass")


def _export(run: Run, trained: Any, facts: Mapping[str, Any], target: Path) -> None:
    from safetensors import SafetensorError

    try:
        run.recipe.export(trained, target)
    except SafetensorError as e:  # also where the disk is full
        raise Error(
            f"cannot write what {run.recipe.name} made: {e}",
            hint=f"its last state is kept in {run.folder}; make room, then run the same command again",
        ) from e
    for path in target.rglob("*"):
        if path.is_file():  # safetensors writes files that nobody else may read
            path.chmod(target.stat().st_mode & 0o666)
    (target / "recipe.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    (target / "loss.csv").write_bytes(loss_table(run.losses))
    _plot(run, target / "loss.svg")


def _plot(run: Run, path: Path) -> None:
    """One panel per loss; without date and random ids, so that the same curve is the same file."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(run.losses[0]) if run.losses else ["loss"]
    figure = Figure(figsize=(7, 1 + 1.6 * len(names)), layout="constrained")
    for number, (name, axes) in enumerate(zip(names, figure.subplots(len(names), 1, squeeze=False)[:, 0], strict=True)):
        values = [row[name] for row in run.losses]
        axes.plot(range(len(values)), values, linewidth=0.8)
        axes.set_ylabel(name)
        if values and min(values) > 0:
            axes.set_yscale("log")
        if number == len(names) - 1:
            axes.set_xlabel("step")
    with matplotlib.rc_context({"svg.hashsalt": run.recipe.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _finished(out: Path, identity: str) -> bool:
    """Is `out` the finished result of this run? Raises Error if it is something else."""
    if not out.exists():
        return False
    try:
        facts = json.loads((out / "recipe.json").read_text())
        made = facts["identity"], facts["recipe"], facts["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Error(f"{out} exists and was not made by a recipe", hint="give another --out") from None
    if made[0] != identity:
        raise Error(
            f"{out} holds the result of recipe {made[1]} (version {made[2]}) with another specification",
            hint="give another --out, or remove that folder",
        )
    return True


def _leave(number: int) -> None:
    """Lets a signal that was held back do what it does; KeyboardInterrupt if it lets the process live."""
    signal.raise_signal(number)
    raise KeyboardInterrupt
