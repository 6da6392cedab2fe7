"""What needs a running server: wall times in alternating runs, memory, readers."""

import os
import re
import shutil
import statistics
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cluster import HERE, Cluster, run

LEAK = "SELECT sum(random()) FROM generate_series(1, 10000000)"


def timed(session, sql):
    start = time.monotonic()
    session(sql)
    return time.monotonic() - start


def alternating(clusters, measure, rounds):
    """Medians of `measure(cluster)` by name, and of the ratios to the first name within a round: the machine's speed
    swings, so that only what ran together compares. Who begins a round changes from one to the next."""
    names = list(clusters)
    times = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names):] + names[: i % len(names)]:
            times[name].append(measure(clusters[name]))
    base = times[names[0]]
    return {
        name: (statistics.median(t), statistics.median(a / b for a, b in zip(t, base))) for name, t in times.items()
    }


def leaked_pallocs(pg_config, rounds=5):
    """10,000,000 leaked pallocs in one session: each run in a session of its own, as the leak stays in it."""

    def once(cluster):
        session = cluster.session()
        try:
            session("SELECT 1")
            return timed(session, LEAK)
        finally:
            session.close()

    heaptrack = shutil.which("heaptrack")
    with Cluster(pg_config, preload="") as plain, Cluster(
        pg_config, rheap__mode="exact", rheap__memory_limit="1GB"
    ) as exact, Cluster(pg_config) as sampled:
        clusters = {"without": plain, "exact": exact, "sampled": sampled}
        measured = alternating(clusters, once, rounds)
        base = measured["without"][0]
        yield "10,000,000 leaked pallocs, without rheap", f"{base:.2f} s", ""
        yield "the same, exact, memory_limit 1GB", f"{measured['exact'][1]:.2f} times", "1.5 times"
        yield "the same, sampled", f"{measured['sampled'][1]:.2f} times", ""
        yield "the same under heaptrack", under_heaptrack(plain, base) if heaptrack else "not installed", ""
        yield "a tenth of it under a uprobe on palloc", under_uprobe(plain), ""


def under_heaptrack(cluster, base):
    session = cluster.session()
    out = cluster.root / "heaptrack"
    attached = subprocess.Popen(
        ["heaptrack", "-o", str(out), "-p", str(session.pid)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in attached.stdout:
            if "injection finished" in line:
                break
        else:
            return "could not attach"
        return f"{timed(session, LEAK) / base:.2f} times"
    finally:
        session.close()
        try:
            attached.wait(60)
        except subprocess.TimeoutExpired:
            attached.kill()


def under_uprobe(cluster, part=LEAK.replace("10000000", "1000000")):
    if not shutil.which("bpftrace"):
        return "bpftrace is not installed"
    session = cluster.session()
    session("SELECT 1")
    base = timed(session, part)
    program = f'uprobe:{cluster.bin}/postgres:palloc {{ @[ustack(20)] = count(); }}'
    probe = subprocess.Popen(
        ["bpftrace", "-p", str(session.pid), "-e", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = []
        for line in probe.stdout:
            # What it says before is a warning.
            if "Attaching" in line:
                break
            said.append(line.strip())
        else:
            return f"bpftrace cannot run here: {' '.join(said)[:60]}"
        time.sleep(2)
        return f"{timed(session, part) / base:.0f} times"
    finally:
        session.close()
        probe.terminate()
        try:
            # It has much to say.
            probe.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            probe.kill()


def connection_storm(pg_config, major, starts=10, connections=1200):
    """Processor time of a connection that selects once and leaves, the postmaster's fork included, of three servers at
    once: see `pgbench_select`. Two servers that are configured alike differ by some per cent for as long as they run, so
    each is started anew so often."""

    def connect(clusters, count):
        at_once(clusters, "-n", "-C", "-S", "-c", "2", "-t", str(count // 2))

    with three_servers(pg_config) as (clusters, restart):
        used = {name: 0 for name in clusters}
        for _ in range(starts):
            restart()
            # A first connection of a server has more to do.
            connect(clusters.values(), 20)
            used = count(used, clusters, lambda: connect(clusters.values(), connections))
        each, dearer = compared(used, starts * connections)
        yield (
            f"{major}: {starts * connections:,} connections: {each * 1e3:.2f} ms of processor time without rheap, with it",
            dearer,
            "+2 %",
        )


def own_memory(cluster, pid):
    return cluster.rows(f"SELECT own_bytes FROM rheap_processes({pid})")[0]["own_bytes"]


def private_bytes(pid):
    """Private memory of a process that is backed by nothing else, from the kernel."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.M)) * 1024


def memory(pg_config):
    def idle(cluster):
        session = cluster.session()
        session("SELECT count(*) FROM pg_class")
        return session, private_bytes(session.pid)

    with Cluster(pg_config, preload="") as plain, Cluster(pg_config) as sampled:
        idle(plain)
        without = statistics.median(idle(plain)[1] for _ in range(5))
        idle(sampled)
        session, _ = idle(sampled)
        with_rheap = statistics.median(idle(sampled)[1] for _ in range(5))
        yield (
            "an idle backend: own_bytes, and private memory more than without rheap",
            f"{own_memory(sampled, session.pid) / 1024:,.0f} kB, {(with_rheap - without) / 1024:,.0f} kB",
            "1 MB",
        )
    for limit in ("32MB", "1GB"):
        with Cluster(pg_config, rheap__mode="exact", rheap__memory_limit=limit) as cluster:
            session = cluster.session()
            session(LEAK)
            own = own_memory(cluster, session.pid)
            [row] = cluster.rows(
                f"SELECT sum(live_count) AS n FROM rheap_call_sites({session.pid}) WHERE function = 'drandom'"
            )
            yield f"{row['n']:,} live chunks, memory_limit {limit}: own_bytes", f"{own / 1048576:,.0f} MB", limit


def readers(pg_config, backends=100, sites=2000):
    """rheap_leaks() with many backends and call sites, all of them leaks; cold: the first call of a session."""
    with Cluster(pg_config, max_connections=backends + 20, rheap__mode="exact", rheap__min_leak_bytes="0") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        share = sites // backends
        for i in range(backends):
            session = cluster.session()
            for _ in range(20):
                session(f"SELECT leaky_sites({i * share}, {share}, 100)")
        cold, warm = [], []
        for _ in range(3):
            reader = cluster.session()
            reader("SELECT 1")
            cold.append(timed(reader, "SELECT count(*) FROM rheap_leaks()"))
            warm += [timed(reader, "SELECT count(*) FROM rheap_leaks()") for _ in range(3)]
            found = reader("SELECT count(*) FROM rheap_leaks() WHERE context ~ 'leaky sites'")
            reader.close()
        yield (
            f"rheap_leaks(), {backends} backends, {found} leaks: cold, warm",
            f"{statistics.median(cold) * 1000:,.0f} ms, {statistics.median(warm) * 1000:,.0f} ms",
            "1 s, 300 ms",
        )


def processor_time(pid):
    """Seconds that a process and its children that have ended have used, in the kernel and outside it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def three_servers(pg_config):
    """(servers by name, a function that starts them anew): without rheap, with it, and without again, all on one processor.
    They take turns within milliseconds, so that whatever else the machine does meets all of them alike; runs one after
    another differ by a sixth, whatever is loaded."""
    preloads = {"without": "", "sampled": "rheap", "without again": ""}
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(processors)})
    try:
        with ExitStack() as stack:
            clusters = {name: stack.enter_context(Cluster(pg_config, max_connections=120)) for name in preloads}
            for cluster in clusters.values():
                cluster.pgbench("-i", "-q")

            def restart():
                for name, cluster in clusters.items():
                    cluster.restart(shared_preload_libraries=preloads[name])

            yield clusters, restart
    finally:
        os.sched_setaffinity(0, processors)


def count(used, clusters, work):
    """Adds the processor time that each server uses for some work."""
    before = {name: processor_time(cluster.postmaster) for name, cluster in clusters.items()}
    work()
    # The time of a backend counts once it is gone.
    time.sleep(0.5)
    return {name: used[name] + processor_time(c.postmaster) - before[name] for name, c in clusters.items()}


def compared(used, units):
    """(seconds a unit without rheap, what the others take more)"""
    base = used["without"]
    dearer = {name: f"{(time_used / base - 1) * 100:+.1f} %" for name, time_used in used.items()}
    return base / units, f"{dearer['sampled']} (without again: {dearer['without again']})"


def pgbench_select(pg_config, clients=(1, 10, 100), starts=4, sessions=100, transactions=2000):
    """Processor time of a transaction, of three servers at once. So many backends on one processor leave each other next
    to nothing in its caches. However many clients there are at a time, there are as many sessions, and as long ones."""
    with three_servers(pg_config) as (clusters, restart):
        for n in clients:
            used = {name: 0 for name in clusters}

            def work():
                for _ in range(sessions // n):
                    at_once(clusters.values(), "-n", "-S", "-M", "prepared", "-c", str(n), "-t", str(transactions))

            for _ in range(starts):
                restart()
                used = count(used, clusters, work)
            each, dearer = compared(used, starts * sessions * transactions)
            yield (
                f"pgbench -S -M prepared, {n} clients: {each * 1e6:.1f} us of processor time without rheap, with it",
                dearer,
                "flat",
            )


def at_once(clusters, *pgbench):
    loads = [
        subprocess.Popen(
            [cluster.bin / "pgbench", *pgbench, "-h", cluster.root, "-U", "postgres", "postgres"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for cluster in clusters
    ]
    for load in loads:
        if load.wait() != 0:
            raise RuntimeError("pgbench failed")


def walks(pg_config, contexts=(100, 1000, 10_000, 50_000)):
    """How often a tree of so many contexts is walked when it is due at once: a walk may take 1 % of the time."""
    with Cluster(pg_config, rheap__walk_interval="10ms") as cluster:
        cluster.run_file(HERE / "modules/leaky.sql")
        for n in contexts:
            session = cluster.session()
            session(f"SELECT leaky_tree({n})")
            session("SELECT 1")
            count = lambda: cluster.rows(f"SELECT walks FROM rheap_processes({session.pid})")[0]["walks"]
            before, start = count(), time.monotonic()
            while time.monotonic() - start < 4:
                session("SELECT 1")
            passed = time.monotonic() - start
            made = count() - before
            session.close()
            yield (
                f"{n:,} contexts more, walk_interval 10ms: walks per second",
                f"{made / passed:.1f}, so at most {1e4 / max(made / passed, 0.01):,.0f} us each",
                "linear, 1 %",
            )
