"""What one of several processes runs in `test_processes.py`: python process.py WHAT ARGUMENTS, with four devices."""

import os
import signal
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
import pytest

from gdjax import distributed, kernel, minimize, stop


def stream(source, sink, port="", processes="", process_id="", dies=""):
    """A stream of 21 parts on four devices; `dies`: killed when it writes its third part."""
    if dies:
        from gdjax.sink import Sink

        write = Sink.write
        written = []

        def killed(*arguments):
            written.append(arguments)
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*arguments)

        Sink.write = killed
    options = {"learning_rate": 0.1, "steps": 50, "stop": stop.gradient_below(1e-3), "part_size": 100}
    launch = {}
    if port:
        launch = {"coordinator": f"127.0.0.1:{port}", "processes": int(processes), "process_id": int(process_id)}
    devices = [f"cpu:{number}" for number in range(4)]
    try:
        solution = distributed.solve_stream(
            source, sink, kernel.squared_loss, "w", ("x", "t"), device=devices, **options, **launch
        )
    except distributed.PartsMissing as missing:
        print(f"missing: {missing}")
        return 3
    print(solution)
    return 0


def arrays(batch, out, port, process_id):
    """`minimize` on arrays that are sharded over the devices of two processes; writes what this one holds."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process_id))
    held = np.load(batch)
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("problems",)), jax.sharding.PartitionSpec("problems")
    )

    def spread(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    w, x, t, rates = (spread(held[name]) for name in ("w", "x", "t", "rates"))
    found = {}
    for name, rule in (("fixed", None), ("stop", stop.gradient_below(1e-2))):
        options = {"learning_rate": rates, "steps": 20, "stop": rule}
        part = minimize(kernel.squared_loss, w, (x, t), **options)
        whole = minimize(kernel.squared_loss, part.weights, (x, t), resume=part.state, **options)
        assert whole.weights.sharding == sharding
        assert sum(whole.summary().values()) == len(w) // 2
        for field in ("weights", "loss", "gradient_norm", "steps", "status"):
            for shard in getattr(whole, field).addressable_shards:
                found[f"{name} {field} {shard.index[0].start or 0}"] = np.asarray(shard.data)
    local = minimize(kernel.squared_loss, held["w"], (held["x"], held["t"]), learning_rate=0.1, steps=3)
    assert local.device == "cpu:0"  # its own, not that of process 0
    for device, start in ((sharding.mesh, held["w"]), ("cpu", w)):
        with pytest.raises(ValueError, match="device='auto'"):
            minimize(kernel.squared_loss, start, (held["x"], held["t"]), learning_rate=0.1, steps=3, device=device)
    np.savez(out, **found)
    return 0


def waits(port):
    """Process 0 of two, the other of which never comes."""
    distributed_launch = distributed.Launch(0, 2, f"127.0.0.1:{port}")
    with distributed.gathered(distributed_launch, patience=2, say=lambda text: print(text, flush=True)):
        time.sleep(100)


if __name__ == "__main__":
    sys.exit({"stream": stream, "arrays": arrays, "waits": waits}[sys.argv[1]](*sys.argv[2:]))
