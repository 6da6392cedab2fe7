"""Instructions per statement: `postgres --single` under callgrind, N statements against 2N. Counts repeat to a few
digits, whatever else the machine does."""

import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from cluster import USER, demote, run


class SingleUser:
    """A data folder that is worked on in single-user mode."""

    def __init__(self, pg_config):
        self.bin = Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip())
        self.root = Path(tempfile.mkdtemp(prefix="rheap-bench-"))
        if demote():
            shutil.chown(self.root, USER)
        self.root.chmod(0o755)
        run(self.bin / "initdb", "-D", self.root / "data", "-U", "postgres", "-A", "trust", "-N")
        self.single(
            "CREATE TABLE accounts (aid int PRIMARY KEY, balance int)\n"
            "INSERT INTO accounts SELECT g, 0 FROM generate_series(1, 100000) g\n"
            "VACUUM ANALYZE accounts\n"
        )

    def single(self, statements, *settings, under=()):
        done = subprocess.run(
            [*map(str, under), str(self.bin / "postgres"), "--single", "-D", str(self.root / "data"), *settings, "postgres"],
            input=statements, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", **demote(),
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-2000:])

    def counted(self, statements, settings):
        out = self.root / "callgrind"
        self.single(statements, *settings, under=["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"])
        return self.total(out)

    def of_a_backend(self, transactions, settings):
        """Instructions of the backend of a client that runs so many point selects over the extended protocol."""
        for old in self.root.glob("callgrind.*"):
            old.unlink()
        server = subprocess.Popen(
            ["valgrind", "--tool=callgrind", f"--callgrind-out-file={self.root}/callgrind.%p", str(self.bin / "postgres"),
             "-D", str(self.root / "data"), "-k", str(self.root), "-c", "listen_addresses=", "-c", "autovacuum=off", *settings],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **demote(),
        )
        target = ["-h", str(self.root), "-U", "postgres"]
        try:
            until = time.monotonic() + 120
            while run(self.bin / "pg_isready", "-q", *target, check=False).returncode != 0:
                if time.monotonic() > until:
                    raise RuntimeError("the server under callgrind does not start")
                time.sleep(0.2)
            script = self.root / "select.sql"
            script.write_text("\\set aid random(1, 100000)\nSELECT balance FROM accounts WHERE aid = :aid;\n")
            run(self.bin / "pgbench", "-n", "-f", script, "-M", "prepared", "-t", str(transactions), "--random-seed=1",
                *target, "postgres")
        finally:
            # The backend writes its file when it ends, which is before the server does.
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)
        # Of all processes it has done most.
        return max(self.total(out) for out in self.root.glob("callgrind.*"))

    @staticmethod
    def total(out):
        lines = [l for l in out.read_text().splitlines() if l.startswith(("summary:", "totals:"))]
        return int(lines[-1].split()[1])

    def per_transaction(self, n, settings=()):
        """Instructions of one more point select of a client."""
        return (self.of_a_backend(2 * n, settings) - self.of_a_backend(n, settings)) / n

    def per_statement(self, statements, n, settings=()):
        """Instructions of one more statement; `statements(n)` gives n of them."""
        return (self.counted(statements(2 * n), settings) - self.counted(statements(n), settings)) / n

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.root, ignore_errors=True)


def point_selects(n):
    lines = ["PREPARE p(int) AS SELECT balance FROM accounts WHERE aid = $1"]
    lines += [f"EXECUTE p({i * 37 % 100000 + 1})" for i in range(n)]
    return "\n".join(lines) + "\n"


def bound_by_palloc(n):
    # A row more is a statement more here: the query is one, over n rows.
    return f"SELECT sum(length(random()::text)) FROM generate_series(1, {n})\n"


def client_rows(pg_config, major):
    with SingleUser(pg_config) as server:
        base = server.per_transaction(1000)
        yield f"{major}: a client's point select, extended protocol, without rheap", f"{base:,.0f} instructions", ""
        for mode in ("sampled", "exact"):
            value = server.per_transaction(1000, settings(mode))
            yield f"{major}: a client's point select, extended protocol, {mode}", percent(base, value), ""


def settings(mode, scope="session"):
    return ["-c", "shared_preload_libraries=rheap", "-c", f"rheap.mode={mode}", "-c", f"rheap.scope={scope}"]


def percent(base, value):
    return f"{(value - base) * 100 / base:+.2f} %"


# Enough for what is learned once, which differs from run to run, to weigh little.
STATEMENTS = 16_000
# Where the server's strings happen to lie makes a difference of some tens of instructions: lengths of a setting that
# moves them.
LAYOUTS = (1, 500, 2100)


def point_select(server, settings=()):
    """Instructions of a point select in each layout, sorted."""
    padding = lambda length: ["-c", f"layout.padding={'x' * length}"]
    return sorted(server.per_statement(point_selects, STATEMENTS, [*settings, *padding(n)]) for n in LAYOUTS)


def rows(pg_config, major):
    """(what, measured, to reach)"""
    with SingleUser(pg_config) as server:
        base = statistics.median(point_select(server))
        yield f"{major}: prepared point select, without rheap", f"{base:,.0f} instructions", ""
        goals = {"off": "", "sampled": "+1.0 %", "exact": "+3.0 %" if major == 15 else "+4.0 %"}
        for mode, goal in goals.items():
            least, median, most = [percent(base, run) for run in point_select(server, settings(mode))]
            yield f"{major}: prepared point select, {mode}", f"{median} ({least} to {most})", goal
        for mode in ("sampled", "exact"):
            value = server.per_statement(point_selects, STATEMENTS, settings(mode, "all"))
            yield f"{major}: prepared point select, {mode}, scope all", percent(base, value), ""
        rows = 100_000
        base = server.per_statement(bound_by_palloc, rows)
        yield f"{major}: sum(length(random()::text)), a row, without rheap", f"{base:,.0f} instructions", ""
        goal = "+0.5 %" if major == 15 else "+1.5 %"
        value = server.per_statement(bound_by_palloc, rows, settings("sampled"))
        yield f"{major}: sum(length(random()::text)), sampled", percent(base, value), goal
        value = server.per_statement(bound_by_palloc, rows, settings("sampled", "all"))
        yield f"{major}: sum(length(random()::text)), sampled, scope all", percent(base, value), ""
