"""Everything that rheap's README says about cost, measured anew: `make bench`.

Arguments: pg_config of 15 and of the 17 without and with the leaks; then names of sections, or none for all.
"""

import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import captures, instructions, servers  # noqa: E402


def main(pg15, pg17, leaks, *wanted):
    sections = {
        "instructions15": lambda: instructions.rows(pg15, 15),
        "instructions17": lambda: instructions.rows(pg17, 17),
        "protocol15": lambda: instructions.client_rows(pg15, 15),
        "protocol17": lambda: instructions.client_rows(pg17, 17),
        "captures": captures.rows,
        "leaked": lambda: servers.leaked_pallocs(leaks),
        "storm": lambda: [*servers.connection_storm(pg15, 15), *servers.connection_storm(pg17, 17)],
        "memory": lambda: servers.memory(leaks),
        "readers": lambda: servers.readers(pg17),
        "clients": lambda: servers.pgbench_select(pg15),
        "walks": lambda: servers.walks(pg17),
    }
    unknown = set(wanted) - set(sections)
    if unknown:
        sys.exit(f"no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    table = []
    for name, section in sections.items():
        if wanted and name not in wanted:
            continue
        print(f"-- {name}", file=sys.stderr, flush=True)
        for row in section():
            table.append(row)
            print("  ".join(str(cell) for cell in row), file=sys.stderr, flush=True)
    processor = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "?")
    print(f"\n{processor}, {platform.release()}, {time.strftime('%Y-%m-%d')}, make bench\n")
    print("| what | measured | to reach |\n| --- | --- | --- |")
    for what, measured, goal in table:
        print(f"| {what} | {measured} | {goal} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
