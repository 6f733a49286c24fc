#!/usr/bin/env python3
"""Runs the CUDA bench (benches/cuda.rs) and PyTorch's dense attention on the same shapes, and prints one table.

Usage: bench-cuda.py BENCH_BINARY [--json FILE] [SHAPE ...]     SHAPE as the bench takes it, e.g. "32/32x128@131072 1 0.1"
The dense figure of a row is the best of PyTorch's scaled_dot_product_attention (every backend that takes the shape, GQA groups
as query rows) and of our attend kernel over all keys; both in captured graphs over buffers that outgrow the L2 cache. More than 16
rows are a prefill, e.g. "32/32x128@131072 512 0.1 tile=128": torch's attention of them is not causal either.
"""
import json
import subprocess
import sys

DEFAULT = [
    "32/32x128@131072 1 0.1", "32/32x128@131072 1 0.3", "32/32x128@131072 1 0.1 diag", "32/32x128@131072 1 0.1 estimate",
    "32/32x128@131072 16 0.1", "32/32x128@32768 1 0.1", "32/32x128@4096 1 0.1", "32/8x128@131072 1 0.1",
    "32/8x128@32768 1 0.1", "32/8x128@4096 1 0.1", "14/2x64@32768 1 0.1", "32/32x128@524288 1 0.1",
]


def median_us(torch, calls, replays=20):
    calls = calls * -(-8 // len(calls))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        keep = [call() for call in calls]
    times = []
    for _ in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    del keep
    return sorted(times[3:])[replays // 2]


def torch_dense(torch, heads, kv_heads, d, prefix, rows):
    """Microseconds of the fastest backend, and its name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    group, n_kv = heads // kv_heads, prefix + 64
    n_set = max(1, min(8, (400 << 20) // (n_kv * kv_heads * d * 4)))
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.float16)
    sets = [(make(1, kv_heads, group * rows, d), make(1, kv_heads, n_kv, d), make(1, kv_heads, n_kv, d)) for _ in range(n_set)]
    best = (float("inf"), "none")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                calls = [lambda s=s: torch.nn.functional.scaled_dot_product_attention(*s) for s in sets]
                best = min(best, (median_us(torch, calls), backend.name.split("_")[0].lower()))
        except (RuntimeError, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
    return best


def rate(r, stage):
    """Share of the copy's bandwidth; of a prefill TFLOP/s."""
    return f"{r[stage + '_share']:.0%}" if stage + "_share" in r else f"{r[stage + '_tflops']:.0f} TFLOP/s"


def main():
    arguments = sys.argv[1:]
    out = None
    if "--json" in arguments:
        at = arguments.index("--json")
        out = open(arguments[at + 1], "w")
        del arguments[at:at + 2]
    binary, shapes = arguments[0], arguments[1:] or DEFAULT
    try:
        import torch
    except ImportError:
        torch = None
    dense = {}
    print("| heads | prefix | rows | budget | spread | dense us | by | sparse us | speed-up | coarse lookup | select | lookup | select | attend | merge |"
          " lookup bw | attend bw |")
    print("|---|---:|---:|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for shape in shapes:
        run = subprocess.run([binary, shape], capture_output=True, text=True)
        if run.returncode or not run.stdout.strip():
            print(f"{shape}: {(run.stderr.strip().splitlines() or ['nothing printed'])[:3]}", flush=True)
            continue
        r = json.loads(run.stdout)
        key = (r["heads"], r["kv_heads"], r["d"], r["prefix"], r["rows"])
        if torch and key not in dense:
            dense[key] = torch_dense(torch, *key)
        r["torch_us"], r["torch_backend"] = dense.get(key, (None, None))
        best, by = min([(r["dense_us"], "own")] + [(r["torch_us"], r["torch_backend"])] * bool(torch))
        r["best_dense_us"], r["speed_up"] = best, best / r["us"]
        if out:
            print(json.dumps(r), file=out, flush=True)
        spread = r["spread"].lower() + (" + estimate" if r["estimate"] else "") + ("" if r.get("type", "f16") == "f16" else f", {r['type']}")
        spread += " + cold" if r.get("cold") else ""
        if "tile" in r:
            spread += f", tiles of {r['tile']}" + (", portable" if r["portable"] else "")
        flat = r["coarse_share"] >= 1
        spread += "" if flat else f" + coarse {r['coarse_share']}"
        coarse = "- | -" if flat else f"{r['coarse_lookup_us']:.1f} | {r['coarse_select_us']:.1f}"
        print(f"| {r['heads']}/{r['kv_heads']}x{r['d']} | {r['prefix']} | {r['rows']} | {r['budget']} | {spread} | {best:.1f} | {by} |"
              f" {r['us']:.1f} | {r['speed_up']:.2f}x | {coarse} | {r['lookup_us']:.1f} | {r['select_us']:.1f} | {r['attend_us']:.1f} |"
              f" {r['merge_us']:.1f} | {rate(r, 'lookup')} | {rate(r, 'attend')} |", flush=True)
    if torch:
        print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {r['copy_tb_s']} TB/s")


if __name__ == "__main__":
    main()
