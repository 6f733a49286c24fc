#!/usr/bin/env python3
"""Load on an unmodified llama-server with eight slots, first without the plugin and then with it, the same requests each time.

    soak.py [--requests N] [--seconds N] [--seed N] [--unified] [--shift] [--budget B] [--only-plugin]

Eight clients on 127.0.0.1 ask at random: on a prefix; on a second one that is nearly the same, with an index of its own; on other text;
on the prefix with one word changed; with generations that shift the context (--shift); broken off in the middle of a stream; slots are
saved, erased and restored in between. Checked: every answer on a prefix names its fact; then, one at a time and each with an erased slot
before it, texts off the prefixes and edited prefixes have the plugin-less server's answer, and the plugin says that they were dense; every
reply comes, the server lives, and its memory does not grow beyond the other's. Ends with 1 after a wrong answer, a crash or a hang.
Needs a release build, scripts/llama.sh and scripts/models.sh.
"""
import argparse
import json
import os
import queue
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TARGET = os.environ.get("CARGO_TARGET_DIR", os.path.join(ROOT, "target"))
MODEL = os.path.join(os.environ.get("SQZ_MODELS", os.path.join(TARGET, "models")), "smollm2-135m.gguf")
BIN = os.environ.get("SQZ_LLAMA_BIN", os.path.join(TARGET, "llama/bin"))
SLOTS = 8
TOKENS = 8
# No reply for so many seconds is a hang.
PATIENCE = 240

FACTS = [
    ("\nThe cat of the archivist is named", " Ambrose"),
    ("\nEvery visitor signs the", " green book"),
    ("\nLost things are kept for one year in the", " cellar"),
    ("\nFees are paid at the second window on the", " left"),
    ("\nIn winter they get hot soup from the", " kitchen"),
]
# The second prefix: an index that is taken for the other's gives the other's fact.
CHANGES = [("Ambrose", "Oliver"), ("green book", "black book"), ("cellar", "attic"), ("kitchen", "bakery")]


def read(name):
    with open(os.path.join(ROOT, "cli/tests", name), encoding="utf-8") as file:
        return file.read()


PREFIX = read("server/handbook.txt")
SECOND = PREFIX
for old, new in CHANGES:
    assert old in SECOND
    SECOND = SECOND.replace(old, new)
OTHERS = [read("common/text.txt"), read("server/other.txt")]


def right_of(prefix, i):
    question, answer = FACTS[i]
    for old, new in CHANGES if prefix is SECOND else []:
        answer = answer.replace(old, new)
    return prefix + question, answer


def edited(rng, prefix):
    words = [m.span() for m in re.finditer(r"[a-z]{4,}", prefix)]
    start, end = rng.choice(words[5:])
    return prefix[:start] + rng.choice(["harpsichord", "Tuesday", "seven", "glacier"]) + prefix[end:]


class Server:
    def __init__(self, name, args, variables):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = os.path.join(args.work, name + ".log")
        command = [os.path.join(BIN, "llama-server"), "-m", MODEL, "--host", "127.0.0.1", "--port", str(self.port), "-t", "2"]
        command += ["-np", str(SLOTS), "-c", str(SLOTS * 512), "-fit", "off", "--no-ui", "--slot-save-path", args.work]
        command += ["--cache-ram", "64", "--no-cache-idle-slots", "--kv-unified" if args.unified else "--no-kv-unified"]
        command += ["--context-shift"] if args.shift else []
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("GGML_", "LLAMA_"))}
        with open(self.log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(command, env={**clean, **variables}, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        begin = time.time()
        while True:
            try:
                self.call("/health", None, 5)
                return
            except OSError:
                if self.process.poll() is not None or time.time() - begin > PATIENCE:
                    raise SystemExit(f"soak.py: llama-server does not start, see {self.log}")
                time.sleep(0.1)

    def call(self, path, body, timeout=PATIENCE):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read())

    def ask(self, prompt, n=TOKENS, **more):
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "seed": 1, "cache_prompt": True, **more}
        return self.call("/completion", body)

    def cancelled(self, prompt, chunks):
        """Reads a few chunks of a stream and hangs up."""
        body = json.dumps({"prompt": prompt, "n_predict": 60, "temperature": 0, "ignore_eos": True, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as s:
            head = f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            s.sendall(head.encode() + body)
            for _ in range(chunks):
                if not s.recv(4096):
                    break

    def slot(self, number, action, name):
        return self.call(f"/slots/{number}?action={action}", {"filename": name})

    def memory(self):
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as file:
            return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) // 1024

    def text(self):
        with open(self.log, encoding="utf-8", errors="replace") as file:
            return file.read()

    def stop(self):
        self.process.terminate()
        status = self.process.wait(PATIENCE)
        return status


def plan(args):
    """The requests: the same for both servers."""
    rng = random.Random(args.seed)
    kinds = ["prefix"] * 5 + ["second"] * 3 + ["other"] * 3 + ["edited"] * 2 + ["cancelled", "restored"] + (["shift"] if args.shift else [])
    for number in range(args.requests):
        kind, i = rng.choice(kinds), rng.randrange(len(FACTS))
        slot = rng.randrange(SLOTS)
        if kind in ("prefix", "second", "restored"):
            prompt, right = right_of(SECOND if kind == "second" else PREFIX, i)
        elif kind == "edited":
            prompt, right = edited(rng, PREFIX) + FACTS[i][0], None
        elif kind == "shift":
            # The rest of the context and more: its first half goes, or the prefix is kept.
            prompt, right = right_of(PREFIX, i)
        else:
            text = rng.choice(OTHERS)
            start = rng.randrange(200)
            prompt, right = text[start : start + rng.randrange(300, 1000)] + f"\n{number}. In short,", None
            if kind == "cancelled" and rng.random() < 0.5:
                prompt = right_of(PREFIX, i)[0]
        yield number, kind, prompt, right, slot, rng.random()


class Load:
    def __init__(self, server, args):
        self.server, self.args = server, args
        self.times, self.wrong, self.errors = {}, [], []
        self.lock, self.done, self.last = threading.Lock(), 0, time.time()
        self.begin = time.time()
        self.memory = {}

    def one(self, number, kind, prompt, right, slot, chance):
        begin = time.time()
        if kind == "cancelled":
            self.server.cancelled(prompt, 1 + int(8 * chance))
            return
        if kind == "restored":
            # Whatever the slot holds, saved and put back; then the prefix in this slot.
            name = f"soak-{self.server.port}-{number}.slot"
            if self.server.slot(slot, "save", name)["n_saved"] > 0:
                self.server.slot(slot, "erase", name)
                if chance < 0.7:
                    self.server.slot(slot, "restore", name)
                os.remove(os.path.join(self.args.work, name))
            begin = time.time()
            reply = self.server.ask(prompt, id_slot=slot)
        elif kind == "shift":
            reply = self.server.ask(prompt, 150, n_keep=0 if chance < 0.5 else -1)
        else:
            reply = self.server.ask(prompt)
        took = time.time() - begin
        content = reply["content"]
        with self.lock:
            self.times.setdefault(kind, []).append(took)
            if not content or (right and not content.startswith(right)):
                self.wrong.append((number, kind, right, content[:60]))

    def client(self, work):
        while True:
            try:
                request = work.get_nowait()
            except queue.Empty:
                return
            if time.time() - self.begin > self.args.seconds:
                return
            try:
                self.one(*request)
            except Exception as error:  # whatever it is, it is reported
                with self.lock:
                    self.errors.append((request[0], request[1], repr(error)))
            with self.lock:
                self.done, self.last = self.done + 1, time.time()
                if self.done in (SLOTS * 6, self.args.requests):
                    self.memory[self.done] = self.server.memory()

    def run(self):
        work = queue.Queue()
        for request in plan(self.args):
            work.put(request)
        clients = [threading.Thread(target=self.client, args=(work,), daemon=True) for _ in range(SLOTS)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            time.sleep(0.2)
            if self.server.process.poll() is not None:
                raise SystemExit(f"soak.py: the server ended with {self.server.process.returncode}, see {self.server.log}")
            if time.time() - self.last > PATIENCE + 20:
                self.server.process.kill()
                raise SystemExit(f"soak.py: no reply for {PATIENCE} s after {self.done} requests, see {self.server.log}")
        self.memory[self.done] = self.server.memory()


def quantile(times, q):
    times = sorted(times)
    return times[min(len(times) - 1, int(q * len(times)))] if times else float("nan")


def alone(server, args):
    """Texts off the prefixes and edited prefixes, one at a time in an empty slot: answers, and what the plugin said."""
    rng = random.Random(args.seed + 1)
    answers = []
    for i in range(args.alone):
        if i % 2 == 0:
            prompt = OTHERS[i // 2 % 2][rng.randrange(100) :][:900] + f"\n{i}. In short,"
        else:
            prompt = edited(rng, PREFIX if i % 4 == 1 else SECOND) + FACTS[i % len(FACTS)][0]
        server.slot(0, "erase", "x")
        mark = os.path.getsize(server.log)
        content = server.ask(prompt, id_slot=0)["content"]
        with open(server.log, encoding="utf-8", errors="replace") as file:
            file.seek(mark)
            graphs = re.findall(r"squeeze: graph of (\d+) query rows: sparse (\d+) nodes", file.read())
        answers.append((content, graphs))
    return answers


def build(text, name, args):
    source, index = os.path.join(args.work, name + ".txt"), os.path.join(args.work, name + ".sqz.gguf")
    with open(source, "w", encoding="utf-8") as file:
        file.write(text)
    command = [os.path.join(TARGET, "release/sqz"), "build", "-m", MODEL, "-f", source, "-o", index, "-t", "2"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit("soak.py: " + run.stderr)
    return index


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=2700, help="of each of the two servers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", type=int, default=20, help="requests one at a time, compared with the plugin-less server")
    parser.add_argument("--unified", action="store_true", help="all slots on one cache")
    parser.add_argument("--shift", action="store_true", help="context shift on, and requests that need it")
    parser.add_argument("--budget", default="0.35")
    args = parser.parse_args()
    args.work = os.path.join(os.path.abspath(TARGET), "soak")
    os.makedirs(args.work, exist_ok=True)
    indexes = [build(PREFIX, "first", args), build(SECOND, "second", args)]
    plugin = {
        "GGML_BACKEND_PATH": os.path.abspath(os.path.join(TARGET, "release/libggml-squeeze.so")),
        "GGML_SQUEEZE_INDEX": ":".join(indexes),
        "GGML_SQUEEZE_BUDGET": args.budget,
        "GGML_SQUEEZE_MIN_PREFIX": "0",
        "GGML_SQUEEZE_LOG": "2",
    }
    loads, singles, statuses = [], [], []
    for name, variables in [("without", {}), ("with", plugin)]:
        server = Server(name, args, variables)
        try:
            singles.append(alone(server, args))
            load = Load(server, args)
            load.run()
            # The same answers after all that.
            singles.append(alone(server, args))
        finally:
            statuses.append(server.stop())
        loads.append(load)

    without, with_plugin = loads
    log = with_plugin.server.text()
    totals = [line for line in log.splitlines() if "squeeze: totals" in line]
    failures = []
    print(f"{'kind':10} {'requests':>8}   p50 ms without / with   p99 ms without / with")
    kinds = sorted(set(without.times) | set(with_plugin.times)) + ["all"]
    for kind in kinds:
        pair = [sum(l.times.values(), []) if kind == "all" else l.times.get(kind, []) for l in loads]
        cells = [f"{1e3 * quantile(times, q):9.0f}" for q in (0.5, 0.99) for times in pair]
        print(f"{kind:10} {len(pair[1]):8}   {cells[0]} /{cells[1]}   {cells[2]} /{cells[3]}")
    for name, load, status in zip(("without", "with"), loads, statuses):
        grown = list(load.memory.values())
        print(
            f"{name:8} {load.done} requests in {load.last - load.begin:.0f} s, {len(load.wrong)} wrong, {len(load.errors)} errors, "
            f"exit status {status}, resident {grown[0]} MiB early, {grown[-1]} MiB late"
        )
        for problem in (load.errors + (load.wrong if load is with_plugin else []))[:10]:
            print("  ", problem)
        if load.errors or status:
            failures.append(f"errors {name} the plugin")
    # An answer that the plugin-less server gets wrong too, among as many neighbours in a batch, says nothing of the plugin.
    known = {(number, kind) for number, kind, *_ in without.wrong}
    if any((number, kind) not in known and kind != "shift" for number, kind, *_ in with_plugin.wrong):
        failures.append("wrong answers")
    before, after, plugged, plugged_after = singles
    same = [a[0] == b[0] for a, b in zip(before, plugged)] + [a[0] == b[0] for a, b in zip(after, plugged_after)]
    dense = all(graphs and all(nodes == "0" for _, nodes in graphs) for _, graphs in plugged + plugged_after)
    print(f"alone: {sum(same)} of {len(same)} answers off the prefixes are those without the plugin; all dense: {dense}")
    if not (all(same) and dense):
        failures.append("another answer off the prefixes")
    early, late = [list(l.memory.values()) for l in loads][1][0], with_plugin.memory[with_plugin.done]
    growth = without.memory[without.done] - list(without.memory.values())[0]
    if late - early > max(growth, 0) + 48:
        failures.append("the server grows more with the plugin than without")
    print(totals[-1] if totals else "no totals")
    if not totals or "sparse 0 nodes" in totals[-1]:
        failures.append("the plugin was not used")
    if failures:
        print("FAILED: " + ", ".join(failures))
        return 1
    print("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
