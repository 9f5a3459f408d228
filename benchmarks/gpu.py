"""Speed and memory on one GPU: each ``Kernels`` option by itself and together, against the plain path and its peers.

The peers are a loop by hand on megatron-core with equal kernels, and vanilla Lightning with transformers, eager and
compiled. Rows run in the order of their importance, each in a fresh process, until ``--minutes`` are over; a row that
fails says so. ``gpu.md`` and ``gpu.json`` in ``--out`` are written after each row. ``--tiny`` runs the same code on any
machine, with models that say nothing of speed.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "lightning.pytorch", "megatron.core", "transformers", "lightning_megatron"]
LEAST_SECONDS = 20  # no row starts with less time than this left
FLAGS = ("fused_layers", "chunked_loss", "fused_weight_gradients")
PACKAGES = ("torch", "lightning", "megatron-core", "transformers", "lightning-megatron")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        model: A name in ``gpu_sides.MODELS``.
        name: What is measured.
        side: "strategy", "by hand", "transformers" or "transformers, compiled".
        kernels: Arguments of ``Kernels``; nothing is today's defaults.
        recompute: That of ``MegatronStrategy``.
    """

    model: str
    name: str
    side: str = "strategy"
    kernels: tuple[tuple[str, Any], ...] = ()
    recompute: str | None = None


# The path without any option. Torch chooses flash attention by itself today; named, it stays what it is.
PLAIN = (*((flag, False) for flag in FLAGS), ("attention", "flash"))


def rows() -> list[Row]:
    """All rows, the most important first."""
    together = Row("1B", "all options", kernels=(*((flag, True) for flag in FLAGS), ("attention", "cudnn")))
    plain, compiled = Row("1B", "plain", kernels=PLAIN), Row("1B", "transformers, compiled", "transformers, compiled")
    defaults, eager = Row("1B", "defaults"), Row("1B", "transformers, eager", "transformers")
    hand = Row("1B", "by hand on megatron-core", "by hand")
    alone = [Row("1B", f"plain + {flag}", kernels=_plain_but(flag, True)) for flag in FLAGS]
    alone.append(Row("1B", "plain + attention=cudnn", kernels=_plain_but("attention", "cudnn")))
    ordered = [of(row, model) for model in ("1B", "124M") for row in (defaults, plain, compiled, hand)]
    ordered += [of(row, "8 x 160M") for row in (defaults, plain, hand, compiled, eager)]
    ordered += [of(row, "3B") for row in (defaults, compiled)] + [of(defaults, "8B, LoRA")]
    ordered += [of(row, model) for model in ("1B", "124M") for row in (*alone, together)]
    long = "1B, 32k tokens"
    ordered += [of(plain, long), of(defaults, long)]
    ordered += [replace(of(defaults, long), name=f"recompute={kind}", recompute=kind) for kind in ("selective", "full")]
    ordered += [of(eager, model) for model in ("1B", "124M")]
    ordered += [of(plain, "3B"), of(plain, "8B, LoRA"), of(eager, "8B, LoRA"), of(hand, "3B")]
    return ordered


def of(row: Row, model: str) -> Row:
    return replace(row, model=model)


def _plain_but(name: str, value: Any) -> tuple[tuple[str, Any], ...]:
    return tuple({**dict(PLAIN), name: value}.items())


# One row, in a process of its own


def measure(row: Row, tiny: bool, warm_up: int, profile: bool) -> dict[str, Any]:
    """Run one row on this process's device."""
    import gpu_sides
    import torch

    from lightning_megatron import Kernels

    model = gpu_sides.MODELS[row.model]
    device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
    meter = gpu_sides.Meter(model.tiny() if tiny else model, device, warm_up, profile)
    if row.side.startswith("transformers"):
        return gpu_sides.with_transformers(meter.model, meter, compiles="compiled" in row.side)
    kernels = dict(row.kernels)
    if device.type == "cpu" and kernels.get("attention") == "cudnn":
        kernels["attention"] = "math"  # the CPU has no cuDNN
    run = gpu_sides.by_hand if row.side == "by hand" else gpu_sides.with_strategy
    return run(meter.model, meter, Kernels(**kernels), row.recompute)


def describe(tiny: bool) -> dict[str, Any]:
    """The device, and its peak in dense bf16."""
    import torch

    from lightning_megatron.callbacks.peak_flops import known_peak_flops

    if tiny or not torch.cuda.is_available():
        return {"device": "CPU", "peak_tflops": None}
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    peak = known_peak_flops(device, torch.bfloat16)
    return {"device": torch.cuda.get_device_name(device), "peak_tflops": None if peak is None else peak / 1e12}


def answer(call: Any, pipe: Any, log: str) -> None:
    """Run ``call`` with all output in the log, and send what it returns, or why it failed."""
    os.setpgid(0, 0)  # so that compilers that it has started end with it
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    try:
        pipe.send(call())
    except BaseException as error:
        import traceback

        traceback.print_exc()
        first_line = (str(error).strip().splitlines() or [""])[0]
        pipe.send({"error": f"{type(error).__name__}: {first_line[:160]}"})
        raise


class Processes:
    """Runs calls in fresh processes, forked from a server that has imported all that they need."""

    def __init__(self, log: Path) -> None:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the server's imports leave CUDA to the rows' processes
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._log = str(log)

    def describe(self, tiny: bool) -> dict[str, Any]:
        """As ``describe``; where the server's imports did touch CUDA, processes import for themselves from now on."""
        found = self.run(partial(describe, tiny), 120)
        if "forked subprocess" in found.get("error", ""):
            self._context = multiprocessing.get_context("spawn")
            found = self.run(partial(describe, tiny), 120)
        return found

    def run(self, call: Any, seconds: float) -> dict[str, Any]:
        """What ``call`` returns; ``{"error": ...}`` where it raises, dies, or is not done in time."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=answer, args=(call, theirs, self._log))
        process.start()
        theirs.close()
        try:
            if ours.poll(seconds):
                return ours.recv()
            return {"error": f"not done in {seconds:.0f} s"}
        except EOFError:
            process.join()
            return {"error": f"its process ended with exit code {process.exitcode}"}
        finally:
            process.join(2)
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()


# What is written


def columns(row: Row, found: dict[str, Any], others: dict[tuple[str, str], dict[str, Any]], peak: float | None) -> list:
    """The cells of a row."""
    if "error" in found:
        return [row.model, row.name, found["error"], *[""] * (len(HEADER) - 3)]
    speed = found["tokens_per_second"]

    def ratio(name: str) -> str:
        other = others.get((row.model, name), {}).get("tokens_per_second")
        return "" if other is None or name == row.name else f"{speed / other:.2f}"

    return [
        row.model, row.name, f"{speed:,.0f}", f"{found['tflops'] / peak:.1%}" if peak else "",
        f"{found['ms_per_step']:.1f}", f"{found['peak_memory_gb']:.1f}", f"{found['first_step_s']:.1f}",
        ratio("plain"), ratio("by hand on megatron-core"), ratio("transformers, compiled"),
        "" if found["loss"] is None else f"{found['loss']:.3f}",
    ]  # fmt: skip


HEADER = [
    "model", "what", "tokens/s", "MFU", "ms a step", "peak memory, GB", "first step, s",
    "of plain", "of by hand", "of transformers, compiled", "last loss",
]  # fmt: skip


def markdown(about: dict[str, Any], seen: list[tuple[Row, dict[str, Any]]], left: list[Row]) -> str:
    """The table, under what it was measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    title = f"{about['date']}, {about['device']}, {versions}; `{about['command']}`"
    others = {(row.model, row.name): found for row, found in seen}
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join(columns(row, found, others, about['peak_tflops']))} |" for row, found in seen]
    if about["peak_tflops"]:
        title += f"\n\nMFU is of {about['peak_tflops']:.0f} TFLOP/s (dense bf16), causal attention counted half."
    missing = "".join(f"\n- {row.model}: {row.name}" for row in left)
    return f"{title}\n\n" + "\n".join(lines) + (f"\n\nNot reached in time:{missing}" if missing else "") + "\n"


def write(out: Path, about: dict[str, Any], seen: list[tuple[Row, dict[str, Any]]], left: list[Row]) -> None:
    (out / "gpu.md").write_text(markdown(about, seen, left))
    results = [{**asdict(row), "kernels": dict(row.kernels), **found} for row, found in seen]
    (out / "gpu.json").write_text(json.dumps({**about, "rows": results}, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6, help="time for all rows together")
    parser.add_argument("--row-seconds", type=float, default=80, help="time for one row")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--only", default="", help="a regular expression of rows, such as '1B: (plain|defaults)$'")
    parser.add_argument("--list", action="store_true", help="print the rows, and run nothing")
    parser.add_argument("--profile", action="store_true", help="print the share of each kind of kernel in a step")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: proves the code, measures nothing")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.md, gpu.json and gpu.log")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    end = time.monotonic() + 60 * args.minutes
    wanted = [row for row in rows() if re.search(args.only, f"{row.model}: {row.name}")]
    if args.list:
        print("\n".join(f"{row.model}: {row.name}" for row in wanted))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    processes = Processes(args.out / "gpu.log")
    about = processes.describe(args.tiny)
    if "error" in about:
        sys.exit(f"The device cannot be used: {about['error']}. See {args.out / 'gpu.log'}.")
    if about["device"] == "CPU" and not args.tiny:
        sys.exit("No GPU was found. Use --tiny to run the code on the CPU.")
    about |= {
        "date": str(date.today()), "command": " ".join(["python", *sys.argv]), "profiled": args.profile,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip
    seen: list[tuple[Row, dict[str, Any]]] = []
    while len(seen) < len(wanted) and (left := end - time.monotonic()) >= LEAST_SECONDS:
        row = wanted[len(seen)]
        call = partial(measure, row, args.tiny, args.warm_up, args.profile)
        seen.append((row, processes.run(call, min(args.row_seconds, left))))
        tell(*seen[-1], about["peak_tflops"], 60 * args.minutes - (end - time.monotonic()))
        write(args.out, about, seen, wanted[len(seen) :])
    print("\n" + markdown(about, seen, wanted[len(seen) :]))


def tell(row: Row, found: dict[str, Any], peak: float | None, since: float) -> None:
    """Print a row as soon as it is measured."""
    cells = columns(row, found, {}, peak)
    named = [f"{name} {cell}" for name, cell in zip(HEADER[2:7], cells[2:7], strict=True) if cell]
    print(f"[{since:4.0f} s] {row.model}: {row.name}: {', '.join(named)}", flush=True)
    if "shares" in found:
        from kernel_kinds import table

        print(table(found["shares"]), flush=True)


if __name__ == "__main__":
    main()
