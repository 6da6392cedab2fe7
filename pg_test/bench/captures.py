"""What one capture of a call stack takes, and the pure parts: criterion's medians from `cargo bench`."""

import json
import os
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
GOALS = {
    "capture, frame pointers, one stack/rheap": "40 ns",
    "capture, DWARF, one stack/rheap": "an 8th of framehop's",
    "capture, DWARF, a dozen stacks/rheap": "a 5th of framehop's",
}


def rows():
    """Reads what criterion has left; the bench script has run it just before."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", TOP / "target"))
    medians = {}
    for estimates in sorted((target / "criterion").glob("**/new/estimates.json")):
        benchmark = json.loads((estimates.parent / "benchmark.json").read_text())
        medians[benchmark["full_id"]] = json.loads(estimates.read_text())["median"]["point_estimate"]
    for name, nanoseconds in medians.items():
        yield name, f"{nanoseconds:,.1f} ns", GOALS.get(name, "")
