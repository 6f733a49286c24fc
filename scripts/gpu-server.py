#!/usr/bin/env python3
"""llama-server on a GPU, without and with the plugin: some slots behind one long prefix, as many on short prompts, all at once.

    gpu-server.py BIN MODEL [--prefix N] [--slots N] [--tokens N] [--rounds N] [--budget B]

BIN is an unpacked folder of scripts/pack.sh, MODEL one of `sqz random-model`, whose tokens are bytes: the prefix is N random letters. The index
and a slot file are built once; each slot restores the file, so that the prefix is computed once. Prints tokens per second of the slots
on the prefix while all slots generate (median of the rounds), and what the plugin counted. At last one slot is erased and
filled with other letters: its binding must be dropped. Ends with 1 where that is not so, nothing was sparse or a request fails.
"""
import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PATIENCE = 300


class Server:
    def __init__(self, args, folder, log, plugin):
        env = dict(os.environ, LD_LIBRARY_PATH=args.bin)
        if plugin:
            env.update(GGML_BACKEND_PATH=f"{args.bin}/libggml-squeeze.so", GGML_SQUEEZE_INDEX=f"{folder}/index.sqz.gguf",
                       GGML_SQUEEZE_BUDGET=str(args.budget), GGML_SQUEEZE_SPREAD="radius", GGML_SQUEEZE_LOG="1")
        context = args.slots * (args.prefix + 1024) + args.slots * 2048
        self.port, self.log = random.randint(20000, 40000), log
        command = [f"{args.bin}/llama-server", "-m", args.model, "-c", str(context), "-np", str(2 * args.slots), "--kv-unified", "-ngl", "99",
                   "--port", str(self.port), "--slot-save-path", folder, "--no-cache-idle-slots", "--no-warmup"]
        self.process = subprocess.Popen(command, env=env, stdout=open(log, "w"), stderr=subprocess.STDOUT)
        deadline = time.time() + PATIENCE
        while True:
            try:
                if self.get("/health").get("status") == "ok":
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.time() > deadline:
                sys.exit(f"gpu-server.py: llama-server did not start, see {log}")
            time.sleep(0.2)

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)


def ask(server, slot, prompt, n, to):
    body = {"prompt": prompt, "id_slot": slot, "n_predict": n, "cache_prompt": True, "temperature": 0, "ignore_eos": True}
    start = time.time()
    reply = server.get("/completion", body)
    to[slot] = (reply["tokens_predicted"], time.time() - start, reply["timings"]["predicted_per_second"])


def together(server, args, prompts):
    """Tokens per second of the first slots while all generate."""
    to = {}
    threads = [threading.Thread(target=ask, args=(server, i, p, args.tokens, to)) for i, p in enumerate(prompts)]
    start = time.time()
    [t.start() for t in threads]
    [t.join() for t in threads]
    if len(to) != len(prompts):
        sys.exit(f"gpu-server.py: {len(prompts) - len(to)} requests failed, see {server.log}")
    return sum(to[i][2] for i in range(args.slots)), time.time() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("bin")
    parser.add_argument("model")
    for name, value in (("prefix", 65536), ("slots", 4), ("tokens", 128), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--budget", type=float, default=0.1)
    args = parser.parse_args()
    args.bin = os.path.abspath(args.bin)
    letters = lambda seed, n: "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=n))
    text = letters(1, args.prefix)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/text.txt", "w") as file:
            file.write(text)
        env = dict(os.environ, LD_LIBRARY_PATH=args.bin, SQZ_BACKENDS=args.bin)
        start = time.time()
        build = [f"{args.bin}/sqz", "build", "-m", args.model, "-f", f"{folder}/text.txt", "-o", f"{folder}/index.sqz.gguf", "--slot-file", f"{folder}/slot.bin"]
        done = subprocess.run(build, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"gpu-server.py: sqz build failed: {done.stderr[-2000:]}")
        print(f"index and slot file built in {time.time() - start:.0f} s", flush=True)
        speeds, problems = {}, []
        for plugin in (False, True):
            log = os.path.join(os.environ.get("OUT", "."), f"server-{'plugin' if plugin else 'stock'}.log")
            server = Server(args, folder, log, plugin)
            for slot in range(args.slots):
                server.get(f"/slots/{slot}?action=restore", {"filename": "slot.bin"})
            rates = []
            for i in range(args.rounds + 1):
                prompts = [text + letters(100 * i + s, 24) for s in range(args.slots)] + [letters(900 + 100 * i + s, 40) for s in range(args.slots)]
                rate, seconds = together(server, args, prompts)
                rates.append(rate)
                print(f"{'plugin' if plugin else 'stock'}: {rate:.1f} t/s of {args.slots} slots on the prefix, {seconds:.1f} s", flush=True)
            speeds[plugin] = statistics.median(rates[1:])
            if plugin:
                server.get("/slots/0?action=erase", {})
                prompts = [letters(7, 400)] + [text + letters(7000 + s, 24) for s in range(1, args.slots)] + [letters(7900 + s, 40) for s in range(args.slots)]
                together(server, args, prompts)
            server.stop()
            if plugin:
                said = [line.strip() for line in open(log, errors="replace") if "squeeze: " in line]
                print("\n".join(said[-3:]))
                totals = [line for line in said if "totals" in line]
                for wanted, problem in ((r"sparse [1-9]", "nothing was sparse"), (r"dropped [1-9]", "no binding was dropped")):
                    if not totals or not re.search(wanted, totals[-1]):
                        problems.append(problem)
        print(f"| slots | prefix | without t/s | with t/s | speed-up |\n|---|---:|---:|---:|---:|\n"
              f"| {args.slots} + {args.slots} short | {args.prefix} | {speeds[False]:.1f} | {speeds[True]:.1f} | {speeds[True] / speeds[False]:.2f}x |")
        if problems:
            sys.exit("gpu-server.py: " + "; ".join(problems))


if __name__ == "__main__":
    main()
