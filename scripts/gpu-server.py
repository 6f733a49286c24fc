#!/usr/bin/env python3
"""llama-server on a GPU, without and with the plugin: some slots on one long prefix and as many on short prompts, all on one cache.

    gpu-server.py BIN MODEL [--prefix N] [--slots N] [--tokens N] [--rounds N] [--requests N] [--budget B] [--gain X] [--work FOLDER]

BIN is an unpacked folder of scripts/pack.sh, MODEL one of `sqz random-model`; the prefix is random words of its vocabulary, N tokens.
`sqz build` computes it once; each slot restores its slot file. --work keeps index and slot file for another run with the same model and prefix.

Speed: tokens per second of the slots on the prefix while all slots generate, median of the rounds, without and with the plugin. Then, with it:
a slot is erased and filled with other words while others generate; its binding must be dropped and all its attention counted as dense,
the others' sparse as before. At last so many short requests at random among the slots, each of which must be answered in time.
Ends with 1 where one of these fails, or the gain is less than --gain.
"""
import argparse
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

# No reply for so many seconds is a hang.
PATIENCE = 120
REFILL = 1024
BEGIN = time.time()


def say(text):
    print(f"[{time.time() - BEGIN:5.1f} s] {text}", flush=True)


def fail(text):
    sys.exit(f"gpu-server.py: {text}")


class Server:
    def __init__(self, args, plugin):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.name = "plugin" if plugin else "stock"
        self.log, self.status = os.path.join(os.environ.get("OUT", "."), f"server-{self.name}.log"), f"{args.work}/status.json"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("GGML_", "LLAMA_"))}
        env["LD_LIBRARY_PATH"] = args.bin
        if plugin:
            env.update(GGML_BACKEND_PATH=f"{args.bin}/libggml-squeeze.so", GGML_SQUEEZE_INDEX=f"{args.work}/index.sqz.gguf",
                       GGML_SQUEEZE_BUDGET=str(args.budget), GGML_SQUEEZE_SPREAD="radius", GGML_SQUEEZE_LOG="1", GGML_SQUEEZE_STATUS=self.status)
        # --cache-ram 0: else a request for a slot that is busy has the server save and load that slot's prefix, into other cells
        context = args.slots * (args.prefix + REFILL) + args.slots * 2048
        command = [f"{args.bin}/llama-server", "-m", args.model, "--host", "127.0.0.1", "--port", str(self.port), "-ngl", "99", "-fit", "off",
                   "-np", str(2 * args.slots), "-c", str(context), "--kv-unified", "--slot-save-path", args.work, "--no-cache-idle-slots",
                   "--no-warmup", "--no-ui", "--cache-ram", "0"]
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        deadline = time.time() + PATIENCE
        while True:
            try:
                self.call("/health")
                break
            except OSError:
                if self.process.poll() is not None or time.time() > deadline:
                    self.process.kill()
                    fail(f"llama-server did not start, see {self.log}")
                time.sleep(0.1)

    def call(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)

    def ask(self, slot, prompt, n):
        """Tokens per second of the generation, and the seconds until the reply."""
        start = time.time()
        # one sampler: the default ones sort the whole vocabulary on the CPU for each slot, between the steps that are to be timed
        reply = self.call("/completion", {"prompt": prompt, "id_slot": slot, "n_predict": n, "cache_prompt": True, "samplers": ["top_k"],
                                          "top_k": 1, "ignore_eos": True,
                                          "response_fields": ["tokens_predicted", "timings/predicted_per_second"]})
        if reply["tokens_predicted"] != n:
            raise ValueError(f"slot {slot} made {reply['tokens_predicted']} of {n} tokens")
        return reply["timings/predicted_per_second"], time.time() - start

    def ask_all(self, jobs, n_client):
        """Requests by so many clients. One that is not answered ends it all, the server first, lest the others wait as long."""
        pool = ThreadPoolExecutor(n_client)
        futures = [pool.submit(self.ask, *job) for job in jobs]
        try:
            return [f.result() for f in futures]
        except (OSError, ValueError, KeyError) as error:
            done = sum(f.done() for f in futures)
            self.process.kill()
            pool.shutdown(cancel_futures=True)
            return fail(f"of {len(jobs)} requests {done} are done, then: {error!r}, see {self.log}")

    def counts(self, slot):
        """What the plugin has counted. The file is written twice a second at most, and a GPU's counts come with the graph after:
        so two dense tokens in a short slot are asked for before."""
        time.sleep(0.6)
        self.ask(slot, [1, 5, 6, 7], 2)
        with open(self.status) as file:
            read = json.load(file)
        counts = {k: read[k] for k in ("nodes_sparse", "rows_sparse", "kept_share", "bound_now")}
        return {**counts, "dropped": read["unbound"], "dense": read["nodes_dense"].get("unbound", 0)}

    def stop(self):
        self.process.terminate()
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "killed"


def since(before, after):
    return {k: v - before[k] for k, v in after.items()}


def words_of(model):
    with open(model, "rb") as file:
        found = re.findall(rb"\xe2\x96\x81([a-z]{4})", file.read(8 << 20))
    return sorted({word.decode() for word in found}) or fail(f"{model} has no words: make it with sqz random-model")


def build(args):
    """Index and slot file of the prefix."""
    rng, words = random.Random(1), words_of(args.model)
    text = " ".join(rng.choice(words) for _ in range(args.prefix - 1))
    if all(os.path.exists(f"{args.work}/{name}") for name in ("index.sqz.gguf", "slot.bin")):
        say("index and slot file are there")
        return text
    with open(f"{args.work}/text.txt", "w") as file:
        file.write(text)
    env = dict(os.environ, LD_LIBRARY_PATH=args.bin, SQZ_BACKENDS=args.bin)
    command = [f"{args.bin}/sqz", "build", "-m", args.model, "-f", f"{args.work}/text.txt", "-o", f"{args.work}/index.sqz.gguf", "--slot-file",
               f"{args.work}/slot.bin"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        fail(f"sqz build failed: {done.stderr[-2000:]}")
    say("index and slot file built; " + done.stderr.strip().split("\n")[-1])
    return text


def measure(args, server, prefix, some, rounds):
    """Tokens per second of the slots on the prefix in each round; the first finds the bindings."""
    rates = []
    for _ in range(rounds):
        jobs = [(s, prefix + some(24), args.tokens) for s in range(args.slots)] + [(args.slots + s, some(40), args.tokens) for s in range(args.slots)]
        replies = server.ask_all(jobs, len(jobs))
        rates.append(sum(rate for rate, _ in replies[:args.slots]))
        say(f"{server.name}: {rates[-1]:.1f} t/s of {args.slots} slots on the prefix")
    return rates


def refill(args, server, prefix, some, problems):
    """Slot 0 is erased and filled with other tokens while the others on the prefix generate; returns those tokens."""
    last, other = 2 * args.slots - 1, [1] + some(REFILL - 1)
    before = server.counts(last)
    with ThreadPoolExecutor(args.slots) as pool:
        others = [pool.submit(server.ask, s, prefix + some(24), 2 * args.tokens) for s in range(1, args.slots)]
        # answered when they are under way
        server.ask(last, some(8), 4)
        server.call("/slots/0?action=erase", {})
        if any(f.done() for f in others):
            problems.append("the slot was erased when nothing ran")
        server.ask(0, other, 8)
        [f.result() for f in others]
    change = since(before, server.counts(last))
    say(f"erased and refilled: {change['dropped']} bindings dropped, {change['nodes_sparse']} nodes sparse beside it")
    if change["dropped"] != 1:
        problems.append(f"{change['dropped']} bindings were dropped, not 1")
    return other


def alone(args, server, other, some, problems):
    """The refilled slot by itself has no sparse node, and with the others only their rows are."""
    last = 2 * args.slots - 1
    before = server.counts(last)
    server.ask(0, other + some(8), 32)
    change = since(before, server.counts(last))
    say(f"the refilled slot alone: {change['nodes_sparse']} nodes sparse, {change['dense']} dense for want of a binding")
    if change["nodes_sparse"] != 0 or change["dense"] == 0:
        problems.append("the refilled slot was not counted as dense")


def load(args, server, prefix, other, some):
    """Short requests at random; slot 0 keeps its other text."""
    rng = random.Random(2)
    jobs = []
    for _ in range(args.requests):
        slot = rng.randrange(2 * args.slots)
        base = other if slot == 0 else prefix if slot < args.slots else [1]
        jobs.append((slot, base + some(rng.randint(1, 8)), rng.randint(1, 8)))
    times = [seconds for _, seconds in server.ask_all(jobs, 2 * args.slots)]
    say(f"{len(times)} short requests of {2 * args.slots} clients, all answered: median {statistics.median(times):.2f} s, longest {max(times):.2f} s")


def with_plugin(args, server, prefix, some):
    """Rates of the rounds, and what is wrong."""
    last, problems = 2 * args.slots - 1, []
    rates = measure(args, server, prefix, some, 1)
    before = server.counts(last)
    rates += measure(args, server, prefix, some, args.rounds)
    after = server.counts(last)
    change = since(before, after)
    rows = change["rows_sparse"] / max(change["nodes_sparse"], 1)
    say(f"{change['nodes_sparse']} nodes sparse with {rows:.2f} rows each, {after['bound_now']} bindings, kept share {after['kept_share']:.3f}")
    # requests do not begin and end in the same graph
    if rows < args.slots - 0.5 or after["bound_now"] != args.slots:
        problems.append(f"not all of the {args.slots} slots were sparse")
    other = refill(args, server, prefix, some, problems)
    alone(args, server, other, some, problems)
    if args.requests:
        before = server.counts(last)
        load(args, server, prefix, other, some)
        change = since(before, server.counts(last))
        say(f"{change['nodes_sparse']} nodes sparse meanwhile, {change['dropped']} bindings dropped")
        if change["nodes_sparse"] == 0:
            problems.append("the other slots were not sparse any more")
        alone(args, server, other, some, problems)
    return rates, problems


def run(args):
    text = build(args)
    speeds, problems = {}, []
    for plugin in (False, True):
        server = Server(args, plugin)
        try:
            prefix = server.call("/tokenize", {"content": text, "add_special": True})["tokens"]
            if len(prefix) != args.prefix:
                fail(f"{args.prefix - 1} words are {len(prefix)} tokens: make the model with sqz random-model")
            for slot in range(args.slots):
                if server.call(f"/slots/{slot}?action=restore", {"filename": "slot.bin"})["n_restored"] != args.prefix:
                    fail("the slot file is of another prefix")
            say(f"{server.name}: {args.slots} slots restored")
            rng, ids = random.Random(3), sorted(set(prefix[1:]))
            some = lambda n: [rng.choice(ids) for _ in range(n)]
            if plugin:
                rates, problems = with_plugin(args, server, prefix, some)
            else:
                rates = measure(args, server, prefix, some, 1 + args.rounds)
            speeds[plugin] = statistics.median(rates[1:])
            status = server.stop()
            if status != 0:
                problems.append(f"llama-server ended with {status}")
        except (OSError, ValueError, KeyError) as error:
            fail(f"{error!r}, see {server.log}")
        finally:
            if server.process.poll() is None:
                server.process.kill()
    with open(server.log, errors="replace") as file:
        said = [line.strip() for line in file if "squeeze: " in line]
    print("\n".join(said[-4:]))
    gain = speeds[True] / speeds[False]
    print(f"| slots | prefix | budget | without t/s | with t/s | speed-up |\n|---|---:|---:|---:|---:|---:|\n"
          f"| {args.slots} + {args.slots} short | {args.prefix} | {args.budget} | {speeds[False]:.1f} | {speeds[True]:.1f} | {gain:.2f}x |")
    if gain < args.gain:
        problems.append(f"the gain is less than {args.gain}")
    if problems:
        fail("; ".join(problems))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bin")
    parser.add_argument("model")
    for name, value in (("prefix", 65536), ("slots", 4), ("tokens", 128), ("rounds", 3), ("requests", 500)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--work", help="folder for index and slot file, which are taken from there if they are there")
    args = parser.parse_args()
    args.bin, work = os.path.abspath(args.bin), args.work
    if work:
        os.makedirs(work, exist_ok=True)
    args.work = os.path.abspath(work) if work else tempfile.mkdtemp()
    try:
        run(args)
    finally:
        if not work:
            shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
