"""Throw-away clusters and real psql sessions for the tests. Standard library only.

As root, servers and their tools run as the user `postgres` (or $RHEAP_TEST_USER): PostgreSQL refuses to run as root.
"""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
USER = os.environ.get("RHEAP_TEST_USER", "postgres")


def demote():
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam(USER)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def run(*command, check=True, **options):
    """Runs a command as the unprivileged user; returns the finished process with its output as text."""
    done = subprocess.run(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if options.pop("merge", True) else subprocess.PIPE,
        text=True,
        cwd="/",
        timeout=options.pop("timeout", 600),
        **demote(),
        **options,
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} exited {done.returncode}:\n{done.stdout}\n{done.stderr or ''}")
    return done


class SqlError(Exception):
    """An error that the server raised: sqlstate, message, hint."""

    def __init__(self, text):
        super().__init__(text)
        fields = {}
        for line in text.splitlines():
            name, _, value = line.partition(": ")
            fields.setdefault(name.strip().split(":")[-1], value.strip())
        head = next((l for l in text.splitlines() if "ERROR:" in l or "FATAL:" in l), "")
        # As psql writes it, or as it stands behind what psql says when it cannot connect: then without SQLSTATE.
        found = re.search(r"(?:ERROR|FATAL): +(?:([0-9A-Z]{5}): )?(.*)", head)
        self.sqlstate = (found.group(1) or "") if found else ""
        self.message = found.group(2).strip() if found else text
        self.hint = fields.get("HINT", "")


class Session:
    """A psql that stays connected; statements go in one by one."""

    def __init__(self, cluster, options=""):
        self.process = subprocess.Popen(
            [str(cluster.bin / "psql"), "-XqAt", "-F", "\t", "-v", "VERBOSITY=verbose", *cluster.target()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PGOPTIONS": options},
            cwd="/",
            **demote(),
        )
        self.pid = int(self("SELECT pg_backend_pid()"))

    def __call__(self, sql):
        """Runs SQL, returns its output lines joined; raises SqlError."""
        self.send(sql)
        return self.receive()

    def send(self, sql):
        """Starts SQL; `receive` waits for it."""
        self.process.stdin.write(sql.rstrip(";\n ") + "\n;\n\\echo <done>\n")
        self.process.stdin.flush()

    def receive(self):
        lines = []
        for line in self.process.stdout:
            if line == "<done>\n":
                break
            lines.append(line.rstrip("\n"))
        else:
            raise RuntimeError("psql ended:\n" + "\n".join(lines))
        text = "\n".join(lines)
        if any(l.startswith(("ERROR:", "FATAL:")) for l in lines):
            raise SqlError(text)
        return text

    def close(self):
        if self.process.poll() is None:
            self.process.stdin.close()
            self.process.wait(30)


class Cluster:
    """A cluster in a temporary folder, on a socket of its own, without TCP."""

    def __init__(self, pg_config, preload="rheap", **settings):
        self.bin = Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip())
        self.major = int(subprocess.check_output([pg_config, "--version"], text=True).split()[1].split(".")[0])
        self.root = Path(tempfile.mkdtemp(prefix="rheap-test-"))
        if os.getuid() == 0:
            shutil.chown(self.root, USER)
        self.root.chmod(0o755)
        self.data = self.root / "data"
        self.log = self.root / "log"
        self.sessions = []
        run(self.bin / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-N", "--no-instructions")
        defaults = dict(listen_addresses="", unix_socket_directories=self.root, max_connections=100, fsync="off")
        self.configure(shared_preload_libraries=preload, **{**defaults, **settings})
        self.start()
        if "rheap" in preload:
            self.sql("CREATE EXTENSION rheap")

    def configure(self, **settings):
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in settings.items():
                conf.write("{} = '{}'\n".format(name.replace("__", "."), value))

    def target(self, database="postgres"):
        return ["-h", str(self.root), "-U", "postgres", "-d", database]

    def start(self):
        run(self.bin / "pg_ctl", "start", "-w", "-D", self.data, "-l", self.log)
        self.postmaster = int((self.data / "postmaster.pid").read_text().split()[0])

    def stop(self, mode="fast", timeout=60):
        """Stops the server, returns the seconds that it took."""
        for session in self.sessions:
            if session.process.poll() is None and mode == "smart":
                session.close()
        started = time.monotonic()
        run(self.bin / "pg_ctl", "stop", "-w", "-D", self.data, "-m", mode, "-t", timeout)
        return time.monotonic() - started

    def reload(self, **settings):
        self.configure(**settings)
        run(self.bin / "pg_ctl", "reload", "-D", self.data)
        time.sleep(0.5)

    def restart(self, **settings):
        self.configure(**settings)
        self.stop()
        self.start()

    def session(self, options=""):
        session = Session(self, options)
        self.sessions.append(session)
        return session

    def sql(self, sql, user="postgres", database="postgres"):
        """One statement in a connection of its own."""
        done = run(
            self.bin / "psql", "-XqAt", "-F", "\t", "-v", "VERBOSITY=verbose", "-v", "ON_ERROR_STOP=1",
            "-h", self.root, "-U", user, "-d", database, "-c", sql, check=False,
        )
        if done.returncode != 0:
            raise SqlError(done.stdout)
        return done.stdout.rstrip("\n")

    def run_file(self, path):
        self.sql(Path(path).read_text())

    def rows(self, sql, **options):
        """Rows of a query as dictionaries."""
        import json

        text = self.sql(f"SELECT coalesce(json_agg(t), '[]') FROM ({sql}) t", **options)
        return json.loads(text)

    def pgbench(self, *arguments, timeout=900):
        return run(self.bin / "pgbench", *arguments, "-h", self.root, "-U", "postgres", "postgres", timeout=timeout).stdout

    def log_text(self):
        return self.log.read_text(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for session in self.sessions:
            session.close()
        if (self.data / "postmaster.pid").exists():
            run(self.bin / "pg_ctl", "stop", "-D", self.data, "-m", "immediate", check=False)
        if kind is not None:
            print("---- end of the server log ----")
            print("\n".join(self.log_text().splitlines()[-40:]))
        shutil.rmtree(self.root, ignore_errors=True)
