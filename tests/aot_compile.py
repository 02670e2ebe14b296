"""Compiles gdjax's programs for a GPU and a TPU that are not there, and prints what came out, as JSON.

Run as a process of its own by `test_aot.py`: the plugins and what they read from the environment must be there before
JAX is imported. `python tests/aot_compile.py figures|losses|all-losses`
"""

from __future__ import annotations

import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
N = 1 << 14


def topology(platform: str) -> Any:
    """The device to compile for."""
    from jax.experimental import topologies

    if platform == "tpu":
        described = topologies.get_topology_desc("v5e:1x1", "tpu", chips_per_host_bounds=(1, 1, 1))
    else:
        text = (HERE / "h200.txtpb").read_text()
        assert "NVIDIA H200" in text  # an empty description is silently accepted
        described = topologies.get_topology_desc("", "cuda", target_config=text, topology="1x1x1")
    return described.devices[0]


# --- reading what compilers wrote ------------------------------------------------------------------------------------


def launches_per_turn(hlo: str) -> list[int]:
    """For every while loop of an HLO module: kernels launched per turn, in its body and its condition."""
    blocks = {m[1]: m[2] for m in re.finditer(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S)}
    pairs = re.findall(r" while\(.*?condition=%([\w.\-]+), body=%([\w.\-]+)", hlo)
    kernel = re.compile(r" (fusion|custom-call|copy|dot|reduce|scatter|gather|sort)\(")
    return [sum(len(kernel.findall(blocks[name])) for name in pair) for pair in pairs]


def opcodes(ptx: str) -> dict[str, int]:
    """How often each instruction stands in a piece of PTX."""
    found = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][a-z0-9_.]*)[ ;]", ptx, re.M)
    return dict(collections.Counter(name for name in found if not name.startswith("loc")))


def loops(ptx: str) -> list[dict[str, int]]:
    """The instructions of every loop: from a label to the branch back to it, the longest first."""
    found = []
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.M):
        back = re.compile(rf"bra(?:\.uni)?\s+\{label[1]};").search(ptx, label.end())
        if back:
            found.append(opcodes(ptx[label.end() : back.end()]))
    return sorted(found, key=lambda ops: -sum(ops.values()))


def floating(ops: dict[str, int]) -> int:
    """Floating point operations, a multiply-add as one."""
    return sum(n for name, n in ops.items() if re.fullmatch(r"(fma|mul|add|sub|neg|div|sqrt)(\.\w+)*\.f32", name))


def talk(ops: dict[str, int]) -> int:
    """Barriers and shuffles: instructions by which threads wait for each other."""
    return sum(n for name, n in ops.items() if name.startswith(("bar", "barrier", "shfl", "vote", "membar")))


def spills(log: str) -> int:
    """Bytes spilled, from what ptxas says."""
    return sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def bundles(text: str) -> int:
    """Bundles of the innermost loop of a TPU program."""
    depths = collections.Counter(m.count(">") for m in re.findall(r"^ *0x[0-9a-f]+ +[A-Z: ]*: ([> ]*)\{", text, re.M))
    return depths[max(depths)]


# --- what is compiled ------------------------------------------------------------------------------------------------


def described(shape: tuple[int, ...], own_data: bool = True, count: int = N) -> tuple[Any, Any]:
    """Inputs of `count` problems with points `[P, D]` (or a scalar each) of their own or shared, and their flags."""
    import jax
    import numpy as np

    from gdjax.engine import fixed

    f32 = lambda *s: jax.ShapeDtypeStruct(s, np.float32)  # noqa: E731
    lead = (count,) if own_data else ()
    data = (f32(*lead, *shape), f32(*lead, *shape[:1]))
    flags = fixed.Inputs(True, None, (own_data, own_data), {"learning_rate": False})
    return fixed.Inputs(f32(count, *shape[1:]), None, data, {"learning_rate": f32()}), flags


def descent(platform: str, loss: Any, inputs: Any, flags: Any, rule: Any, kernel: str, chunk: int = 1) -> Any:
    """The compiled descent."""
    from gdjax.engine import fixed, registers
    from gdjax.engine.block import compile_block
    from gdjax.engine.program import Program
    from gdjax.engine.targets import TARGETS
    from gdjax.plan import Plan

    tile = registers.TILES[fixed.tile](TARGETS[platform]) if kernel == "registers" else fixed.tile
    plan = Plan(kernel, inputs.weights.shape[0] if kernel == "lanes" else N, 1, chunk)
    return compile_block(tile, Program(loss, rule, None), plan, inputs, flags, [DEVICES[platform]])


def until(platform: str, loss: Any, inputs: Any, flags: Any, rule: Any, stop: Any) -> Any:
    """The compiled program of a batch with a stop rule."""
    import jax

    from gdjax.batch import problem_shapes
    from gdjax.engine import refill, registers
    from gdjax.engine.block import compile_block
    from gdjax.engine.program import Program
    from gdjax.engine.targets import TARGETS
    from gdjax.plan import Plan

    program, count = Program(loss, rule, stop), inputs.weights.shape[0]
    weights, _, data, hyper = problem_shapes(inputs, flags)
    state = jax.eval_shape(program.init, weights, data, hyper)
    lane = jax.eval_shape(program.begin, weights, state, jax.ShapeDtypeStruct((), "int32"), data)
    seated = jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), lane)
    running = refill.Running(seated, inputs.data, inputs.hyper)
    own = refill.Running(jax.tree.map(lambda _: True, lane), flags.data, flags.hyper)
    tile = registers.TILES[refill.finish](TARGETS[platform])
    return compile_block(tile, program, Plan("registers", count), running, own, [DEVICES[platform]])


def figures() -> dict[str, Any]:
    """The figures that are promised, from the programs that compilers made."""
    from ten_losses import squared

    from gdjax import stop
    from gdjax.kernel import squared_loss
    from gdjax.rules import Descent

    out: dict[str, Any] = {}
    if "gpu" in DEVICES:
        block = descent("gpu", squared_loss, *described((), count=1 << 20), Descent(), "lanes", 16)
        entry = max(written(".ptx"), key=lambda text: floating(opcodes(text)))
        arrays = [line for line in re.findall(r"^\s+((?:ld|st)\.global\S*)", entry, re.M) if "v4" in line]
        out["gpu scalar chunk"] = {
            "launches": launches_per_turn(block.executables[0].as_text())[0],
            "loads": sum(name.startswith("ld") for name in arrays),
            "stores": sum(name.startswith("st") for name in arrays),
            "operations": floating(opcodes(entry)) / (4 * 16),
        }
        for name, shape, chunk in (("scalar", (), 8), ("16x4", (16, 4), 1), ("32x8", (32, 8), 1)):
            loss = squared if shape else squared_loss
            block = descent("gpu", loss, *described(shape), Descent(), "registers", chunk)
            out[f"gpu {name}"] = gpu_kernel(block, chunk)
        block = descent("gpu", squared, *described((16, 4), own_data=False), Descent(), "registers")
        out["gpu 16x4 shared"] = gpu_kernel(block)
        for name, shape, own in (("304x4", (304, 4), True), ("1000x16 shared", (1000, 16), False)):
            block = descent("gpu", squared, *described(shape, own), Descent(), "registers")
            out[f"gpu {name}"] = gpu_kernel(block)
        block = until("gpu", squared, *described((16, 4)), Descent(), stop.gradient_below(1e-3))
        out["gpu 16x4 until"] = gpu_kernel(block)
        out["gpu 16x4 waves"] = waves("gpu", squared)
    if "tpu" in DEVICES:
        shapes = (("16x4", (16, 4), True), ("16x4 shared", (16, 4), False), ("304x4", (304, 4), True))
        for name, shape, own in (*shapes, ("1000x16 shared", (1000, 16), False)):
            descent("tpu", squared, *described(shape, own), Descent(), "registers")
            programs = [text for text in written("final_bundles.txt") if ">> {" in text]
            out[f"tpu {name}"] = {"bundles": max(map(bundles, programs))}
        out["tpu 16x4 waves"] = waves("tpu", squared)
    return out


def waves(platform: str, loss: Any) -> dict[str, int]:
    """Kernels and loops around them in the program of so many problems that those that run on are moved together."""
    from gdjax import stop
    from gdjax.rules import Descent

    block = until(platform, loss, *described((16, 4), count=1 << 18), Descent(), stop.gradient_below(1e-3))
    hlo = block.executables[0].as_text()
    kernels = hlo.count('custom_call_target="mosaic_gpu') + hlo.count('custom_call_target="tpu_custom_call"')
    return {"kernels": kernels, "loops": hlo.count(" while(")}


def gpu_kernel(block: Any, chunk: int = 1) -> dict[str, Any]:
    """Figures of a kernel in registers, per step of one problem."""
    hlo = block.executables[0].as_text()
    files = written()
    ptx = next(text for text in files if "NVPTX" in text[:80] and "mosaic_gpu_kernel(" in text)
    inner = loops(ptx)
    most = max(map(floating, inner))
    innermost = min((ops for ops in inner if floating(ops) == most), key=lambda ops: sum(ops.values()))
    return {
        "launches": hlo.count('custom_call_target="mosaic_gpu'),
        "loops in hlo": len(launches_per_turn(hlo)),
        "operations": floating(innermost) / chunk,
        "other": (sum(innermost.values()) - floating(innermost)) / chunk,
        "memory in loop": sum(n for name, n in innermost.items() if name.startswith(("ld.", "st."))),
        "talk in loop": talk(innermost),
        "talk": talk(opcodes(ptx)),
        "spilled": spills("".join(text for text in files if "ptxas info" in text)),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", "".join(files))), default=0),
    }


SEEN: set[Path] = set()


def written(ending: str = "") -> list[str]:
    """The text in files of this ending that compilers have dumped since the last call."""
    new = [path for path in sorted(Path(sys.argv[2]).rglob("*")) if path.is_file() and path not in SEEN]
    SEEN.update(new)
    return [path.read_text(errors="replace") for path in new if path.name.endswith(ending)]


def losses(names: list[tuple[str, str]]) -> dict[str, str]:
    """For every loss and rule and both devices: "" where the kernel compiles, else why the fallback is taken."""
    import jax
    import numpy as np
    from ten_losses import LOSSES, RULES

    from gdjax.batch import prepare
    from gdjax.engine import fixed, registers
    from gdjax.engine.program import Program
    from gdjax.minimize import choose_rule

    out = {}
    for name, rule_name in names:
        problem, options = LOSSES[name], RULES[rule_name]
        rule, hyper = choose_rule(options.get("learning_rate"), options.get("optimizer"), None)
        weights, data = problem.batch(N)
        batch = prepare(weights, data, 0, hyper, np.float32)
        own = jax.tree.map(lambda _: True, batch.weights)
        inputs = fixed.Inputs(batch.weights, None, batch.data, batch.hyper)
        flags = fixed.Inputs(own, None, batch.data_flags, batch.hyper_flags)
        for platform in DEVICES:
            why = registers.unfit(Program(problem.loss, rule, None), batch)
            if not why:
                with jax.enable_x64(rule_name == "momentum"):  # kernels of 32 bits, whatever the flag says
                    descent(platform, problem.loss, inputs, flags, rule, "registers")
            out[f"{platform}, {name}, {rule_name}"] = why
    return out


SOME = [("squared", "momentum"), ("network", "adam"), ("log-cosh", "plain"), ("softplus with cosine", "plain")]

DEVICES: dict[str, Any] = {}


def main() -> None:
    what, platforms = sys.argv[1], sys.argv[3].split(",")
    DEVICES.update({platform: topology(platform) for platform in platforms})
    written()
    if what == "figures":
        found: dict[str, Any] = figures()
    else:
        from ten_losses import LOSSES, RULES

        found = losses(SOME if what == "losses" else [(name, rule) for name in LOSSES for rule in RULES])
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
